"""One module per table of the README; `./workspace bench NAME` runs it."""
