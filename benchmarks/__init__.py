"""Peers side by side in one run; only ratios are claims. `make bench`, or `python -m benchmarks --json FILE`."""
