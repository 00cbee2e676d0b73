"""Measurements of the package on this machine: each module is run as `python -m benchmarks.NAME`."""
