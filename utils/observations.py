"""Observations: state vectors, or states with camera images, in NumPy or JAX arrays; it does not import JAX."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Observation(NamedTuple):
    """One or more observations of an environment or robot with cameras; a pytree.

    Attributes:
        state: [..., o] float32; o may be 0.
        images: [b..., C, h, w, 3] uint8, one image for each of C cameras. The axes b... are the last ones of the
            state's leading axes: repeated states, as of several candidate actions, share their images.
    """

    state: Any
    images: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the state, [..., o], as for observations without images."""
        return self.state.shape


def observe(state: Any, images: Any = None) -> Any:
    """Returns an observation of state and images, or the state itself if there are no images."""
    return state if images is None else Observation(state, images)


def as_observation(observation: Any) -> Any:
    """Converts an environment's observation to a float32 vector, or to an `Observation` with a float32 state."""
    if isinstance(observation, Observation):
        return observation._replace(state=np.asarray(observation.state, np.float32))
    return np.asarray(observation, np.float32)


def state_of(observation: Any) -> Any:
    """Returns the state of an observation with or without images."""
    return observation.state if isinstance(observation, Observation) else observation


def columns(observation: Any) -> dict[str, Any]:
    """Returns an observation's parts by their names in a dataset (utils/data/batches.py)."""
    if isinstance(observation, Observation):
        return {"observations": observation.state, "images": observation.images}
    return {"observations": observation}


def blank(size: int, width: int, image_shape: Sequence[int] | None) -> Any:
    """Returns `size` observations of zeros: states [size, width], and images [size, C, h, w, 3] if given a shape."""
    images = None if image_shape is None else np.zeros((size, *image_shape), np.uint8)
    return observe(np.zeros((size, width), np.float32), images)


def map_parts(function: Any, observations: Sequence[Any]) -> Any:
    """Applies `function`, from a list of arrays to one array, to the states and, if there are any, to the images."""
    if isinstance(observations[0], Observation):
        return Observation(*(function(list(parts)) for parts in zip(*observations, strict=True)))
    return function(list(observations))


def shapes(observation: Any) -> dict[str, Any]:
    """Returns a run's record of an observation: the width of its state and, if it has images, their shape."""
    widths: dict[str, Any] = {"observation_dim": state_of(observation).shape[-1]}
    if isinstance(observation, Observation):
        widths["image_shape"] = list(observation.images.shape[-4:])
    return widths
