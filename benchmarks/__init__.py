"""Benchmarks of speed and memory, which print tables. This package is not installed."""
