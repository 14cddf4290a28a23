"""Observation spaces of other libraries, laid out as networks take them: one vector, and the images of all cameras.

A space is a Box, or a Dict of them, possibly nested. Boxes of uint8 that are images become cameras, in the order of
their names: [h, w], [h, w, 1] or [h, w, 3] with sides of at least 32 pixels, as Minari tells images from other numbers,
or [C, h, w, 3]. Grey images are repeated in three channels. All other numbers are joined in one vector, in the order of
their names: 'achieved_goal' before 'desired_goal' before 'observation'.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict
from jaxtyping import Float, UInt8

from utils.errors import UserError
from utils.observations import Observation

SMALLEST_IMAGE = 32  # pixels a side
Names = tuple[str, ...]  # keys of nested dictionaries


@dataclasses.dataclass(frozen=True)
class Layout:
    """Parts of an observation.

    Attributes:
        state: names and shape of each part of the vector. images: names and shape of each camera's images.
        plain: whether the observation is the vector.
    """

    state: tuple[tuple[Names, tuple[int, ...]], ...]
    images: tuple[tuple[Names, tuple[int, ...]], ...]
    plain: bool

    @property
    def width(self) -> int:
        """Width of the vector."""
        return sum(math.prod(shape) for _, shape in self.state)

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """Shape [C, h, w, 3] of the images; None without."""
        if not self.images:
            return None
        cameras = sum(shape[0] if len(shape) == 4 else 1 for _, shape in self.images)
        return (cameras, *_sides(self.images[0][1]), 3)

    def states(self, observations: Any, count: int) -> Float[np.ndarray, "N o"]:
        """Returns the vectors [N, width], float32, of `count` observations that are stacked in each part."""
        parts = [np.asarray(_part(observations, names), np.float32).reshape(count, -1) for names, _ in self.state]
        return np.concatenate([np.zeros((count, 0), np.float32), *parts], axis=1)

    def stacked_images(self, observations: Any, count: int) -> UInt8[np.ndarray, "N C h w 3"]:
        """Returns the images [N, C, h, w, 3] of `count` observations that are stacked in each part."""
        assert self.image_shape is not None
        parts = []
        for names, shape in self.images:
            images = np.asarray(_part(observations, names))
            if len(shape) < 4:
                images = images.reshape(count, 1, *_sides(shape), -1)  # A grey one has one channel.
            parts.append(np.broadcast_to(images, (*images.shape[:-1], 3)))
        return np.concatenate(parts, axis=1)

    def one(self, observation: Any) -> Float[np.ndarray, " o"] | Observation:
        """Returns a single observation: the vector, or with images an `Observation`."""
        batch = _stack_one(observation)
        state = self.states(batch, 1)[0]
        return Observation(state, self.stacked_images(batch, 1)[0]) if self.images else state

    def describe(self) -> str:
        """Returns the parts in their order, such as 'desired_goal [2], observation [4], camera [64, 64, 3]'."""
        return ", ".join(f"{'/'.join(names) or 'vector'} {list(shape)}" for names, shape in (*self.state, *self.images))


def layout_of(name: str, space: gymnasium.Space) -> Layout:
    """Returns the layout of an observation space.

    Args:
        name: of the task, for messages.
        space: a Box, or a Dict of them.

    Raises:
        UserError: it holds something else, or images of several sizes.
    """
    state, images = [], []
    for names, box in _boxes(name, space):
        where = f"'{name}' has observations '{'/'.join(names)}'" if names else f"'{name}' has observations"
        if not _is_image(box):
            if box.dtype.kind not in "fiub":
                raise UserError(f"{where} of {box.dtype}; they must be numbers")
            state.append((names, box.shape))
            continue
        if len(box.shape) > 2 and box.shape[-1] not in (1, 3):
            raise UserError(f"{where} with images {list(box.shape)}; they must have 1 or 3 channels, the last axis")
        images.append((names, box.shape))
    if len({_sides(shape) for _, shape in images}) > 1:
        raise UserError(
            f"'{name}' has images of several sizes ({', '.join(str(list(shape)) for _, shape in images)}); "
            "wrap the environment so that all cameras have one size"
        )
    plain = isinstance(space, Box) and not images and len(space.shape) == 1
    return Layout(tuple(state), tuple(images), plain)


def _boxes(name: str, space: gymnasium.Space, names: Names = ()) -> Iterator[tuple[Names, Box]]:
    """Yields the names and the space of each part, sorted by name.

    Raises:
        UserError: a part is neither a Box nor a Dict.
    """
    if isinstance(space, Dict):
        for key in sorted(space.spaces):
            yield from _boxes(name, space.spaces[key], (*names, key))
    elif isinstance(space, Box):
        yield names, space
    else:
        where = f"observations '{'/'.join(names)}'" if names else "observations"
        raise UserError(f"'{name}' has {where} in {space}; only Box, and Dict of them, can be trained on")


def _is_image(box: Box) -> bool:
    """True for a space of images, of one camera or a stack of cameras."""
    sides = box.shape[1:3] if len(box.shape) == 4 else box.shape[:2]
    large = len(box.shape) in (2, 3, 4) and min(sides) >= SMALLEST_IMAGE
    return box.dtype == np.uint8 and large and bool((box.low == 0).all() and (box.high == 255).all())


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns height and width of an image's shape."""
    height, width = shape[1:3] if len(shape) == 4 else shape[:2]
    return height, width


def _part(observations: Any, names: Names) -> Any:
    """Returns the entry of nested dictionaries."""
    for name in names:
        observations = observations[name]
    return observations


def _stack_one(observation: Any) -> Any:
    """Returns a single observation with a leading axis of 1 in each part."""
    if isinstance(observation, dict):
        return {key: _stack_one(value) for key, value in observation.items()}
    return np.asarray(observation)[None]


class Joined(gymnasium.ObservationWrapper):
    """Gives observations as the vector, or the `Observation`, of a layout."""

    def __init__(self, env: gymnasium.Env, layout: Layout) -> None:
        super().__init__(env)
        self._layout = layout
        state = Box(-np.inf, np.inf, (layout.width,), np.float32)
        self.observation_space = state
        if layout.image_shape is not None:
            self.observation_space = Dict({"state": state, "images": Box(0, 255, layout.image_shape, np.uint8)})

    def observation(self, observation: Any) -> Float[np.ndarray, " o"] | Observation:
        """Returns the environment's observation in the layout."""
        return self._layout.one(observation)
