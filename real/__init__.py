"""The robot bridge: policies to LeRobot, its recordings back to datasets. What a robot's PC runs needs no JAX."""

import sys
from pathlib import Path

# With `python -m`, the working directory comes first, and may have a `utils` of its own.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
