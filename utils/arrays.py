"""Types of arrays that recur, and the names of axes in signatures.

    *b  leading axes of any number      m  windows of a batch             K  critics of an ensemble
    o   width of a state                A  width of an action             H  actions in a chunk
    d   H·A, width of a chunk           c  width of a condition           N  rows of a dataset

Tests check dtypes and shapes at run time (tests/conftest.py). Modules that environment workers or a robot's computer
import have plain `np.ndarray`: jaxtyping takes 0.1 s to import, and a robot's computer need not have it.
"""

import numpy as np
from jaxtyping import Array, Float, Num

from utils.observations import Observation

Scalar = Float[Array, ""]
Number = float | Float[Array | np.ndarray, ""]  # such as an agent's setting: traced, or loaded
Info = dict[str, Num[Array, ""]]  # what to log
Observations = Float[Array, "*b o"] | Observation  # with images, the state is [*b, o]
