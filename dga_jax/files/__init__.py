"""Paths, flags that take a path, storage, locks and hashes of files."""
