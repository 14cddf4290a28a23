"""Experiments: quickstart, sweeps, reports, ablations, diagnosis, benchmarks, toy and coupling studies."""

import sys
from pathlib import Path

# `python -m` puts the working directory first, which may have a `utils` of its own.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils  # noqa: F401 (before Matplotlib, which needs a home directory)
