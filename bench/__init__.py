"""Benchmarks: each prints ratios against a baseline of the same run. `make bench`, or `make bench ARGS=hold`."""
