"""Benchmarks: each is one command, `python -m benchmarks.NAME`, in a checkout."""
