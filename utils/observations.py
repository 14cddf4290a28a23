"""Observations: a state vector, or a state with camera images. NumPy and JAX alike, and without importing JAX."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Observation(NamedTuple):
    """What an environment or a robot with cameras gives, and any batch of it; a pytree.

    Attributes:
        state: [..., o] float32; o may be 0.
        images: [b..., C, h, w, 3] uint8, one for each of C cameras. The axes b... are the last of the state's leading
            ones, so that the repeated states of several candidate actions share their images.
    """

    state: Any
    images: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The state's, which is that of an observation without images: [..., o]."""
        return self.state.shape


def observe(state: Any, images: Any = None) -> Any:
    """An observation of the two, or the state itself if there are no images."""
    return state if images is None else Observation(state, images)


def as_observation(observation: Any) -> Any:
    """An environment's observation as it is kept: the state, or the vector that it is all of, as float32."""
    if isinstance(observation, Observation):
        return observation._replace(state=np.asarray(observation.state, np.float32))
    return np.asarray(observation, np.float32)


def state_of(observation: Any) -> Any:
    """The state of an observation with or without images."""
    return observation.state if isinstance(observation, Observation) else observation


def columns(observation: Any) -> dict[str, Any]:
    """An observation by the names that its parts have in a dataset (utils/data/batches.py)."""
    if isinstance(observation, Observation):
        return {"observations": observation.state, "images": observation.images}
    return {"observations": observation}


def blank(size: int, width: int, image_shape: Sequence[int] | None) -> Any:
    """`size` observations of zeros: states [size, width] and, unless the shape is None, images [size, C, h, w, 3]."""
    images = None if image_shape is None else np.zeros((size, *image_shape), np.uint8)
    return observe(np.zeros((size, width), np.float32), images)


def map_parts(function: Any, observations: Sequence[Any]) -> Any:
    """Joins observations of one kind by `function`, which maps a list of states, or of images, to one array."""
    if isinstance(observations[0], Observation):
        return Observation(*(function(list(parts)) for parts in zip(*observations, strict=True)))
    return function(list(observations))


def shapes(observation: Any) -> dict[str, Any]:
    """What a run records of one observation: the width of its state and, if it has images, their shape."""
    widths: dict[str, Any] = {"observation_dim": state_of(observation).shape[-1]}
    if isinstance(observation, Observation):
        widths["image_shape"] = list(observation.images.shape[-4:])
    return widths
