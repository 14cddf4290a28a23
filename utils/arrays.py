"""Array types, and the names of axes in signatures.

    *b  any number of leading axes      m  windows of a batch             K  critics of an ensemble
    o   width of a state                A  width of an action             H  actions in a chunk
    d   H·A, width of a chunk           c  width of a condition           N  rows of a dataset

Tests check dtypes and shapes at run time (tests/conftest.py). Modules that environment workers or a robot's computer
import use plain `np.ndarray`: jaxtyping takes 0.1 s to import, and a robot's computer may lack it.
"""

import numpy as np
from jaxtyping import Array, Float, Num

from utils.observations import Observation

Scalar = Float[Array, ""]
Number = float | Float[Array | np.ndarray, ""]  # such as a setting of an agent, traced or loaded
Info = dict[str, Num[Array, ""]]  # scalars to log
Observations = Float[Array | np.ndarray, "*b o"] | Observation  # the state of the latter is [*b, o]
