"""The parts of `benchmarks.paper`: one analysis of the paper in each module."""
