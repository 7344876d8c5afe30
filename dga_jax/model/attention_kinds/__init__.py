"""Attention kinds: one small class or factory in a file each; `registry` lists them by name."""
