"""Environments and datasets: names to environments, OGBench files, and collection with OGBench's oracles."""

import sys
from pathlib import Path

# With `python -m`, the working directory comes first, and may have a `utils` of its own.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
