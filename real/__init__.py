"""The robot bridge: exports policies to LeRobot and imports its recordings. Programs on a robot's PC need no JAX."""

import sys
from pathlib import Path

# `python -m` searches the working directory first, which may contain another `utils`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
