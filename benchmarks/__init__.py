"""Measurements behind benchmarks/RESULTS.md: `python -m benchmarks --help`."""
