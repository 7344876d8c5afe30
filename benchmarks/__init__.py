"""One module per section of docs/benchmarks.md; `./workspace bench NAME` runs it."""
