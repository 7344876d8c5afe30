"""One module per section of docs/benchmarks.md, and `paper`; `./workspace bench NAME` runs it."""
