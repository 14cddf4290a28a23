"""Programs that compare runs: sweeps, reports, ablations, diagnosis, benchmarks."""

import sys
from pathlib import Path

# With `python -m`, the working directory comes first, and may have a `utils` of its own.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils  # noqa: F401 (before Matplotlib, which needs a home directory)
