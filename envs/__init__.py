"""Environments and datasets: names to environments, OGBench files, and collection with OGBench's oracles."""

import sys
from pathlib import Path

# `python -m` searches the working directory first, which may contain another `utils`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
