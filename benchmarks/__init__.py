"""Benchmarks: each is one command, `python -m benchmarks.NAME`, in a checkout."""

import sys
from pathlib import Path

# What is measured is this checkout, installed or not.
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
