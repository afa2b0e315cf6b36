"""Benchmarks of the native ops: each case is checked against its reference before it is timed. See bench/README.md."""
