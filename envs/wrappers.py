"""Environment wrappers."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from utils.observations import Observation


class SeededReset(gymnasium.Wrapper):
    """Makes an OGBench episode a function of `reset(seed=...)` and the actions.

    OGBench's resets also draw from NumPy's global generator and from the action space (a few random steps to show
    the goal), which `reset(seed=...)` leaves alone. In manipulation the action space is a property that gives a new,
    unseeded space at each access, so it is pinned to one. Side effect: NumPy's global generator is seeded.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        base = env.unwrapped
        if isinstance(getattr(type(base), "action_space", None), property):
            space = base.action_space
            base.__class__ = type(type(base).__name__, (type(base),), {"action_space": space})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets, and seeds all three generators if a seed (non-negative) is given."""
        if seed is not None:
            global_seed, space_seed = np.random.SeedSequence(seed).generate_state(2)
            np.random.seed(global_seed)
            self.env.unwrapped.action_space.seed(int(space_seed))
        return self.env.reset(seed=seed, options=options)


class UnitActions(gymnasium.wrappers.RescaleAction):
    """Takes actions in [-1, 1] and maps them affinely to the environment's own bounds.

    Attributes:
        own_bounds: (low [a], high [a]) of the environment's own actions.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env, np.float32(-1), np.float32(1))
        self.own_bounds = env.action_space.low, env.action_space.high


def with_images(env: gymnasium.Env) -> gymnasium.Env:
    """The environment, with observations that are `Observation`s if they have images.

    That is so if its observation space is a Box of uint8 [h, w, 3], or a Dict with 'images', a Box of uint8
    [C, h, w, 3], and perhaps 'state', a Box [o].
    """
    space = env.observation_space
    parts = dict(space.spaces) if isinstance(space, Dict) else {}
    if isinstance(space, Box) and len(space.shape) == 3:
        parts = {"images": Box(0, 255, (1, *space.shape), space.dtype)}
    images, state = parts.get("images"), parts.get("state", Box(-np.inf, np.inf, (0,)))
    boxes = isinstance(images, Box) and isinstance(state, Box) and parts.keys() <= {"images", "state"}
    if not boxes or images.dtype != np.uint8 or images.shape[3:] != (3,) or len(state.shape) != 1:
        return env
    return Cameras(env, state, images)


class Cameras(gymnasium.ObservationWrapper):
    """Gives observations as `Observation(state [o], images [C, h, w, 3])`; see `with_images`."""

    def __init__(self, env: gymnasium.Env, state: Box, images: Box) -> None:
        super().__init__(env)
        self.observation_space = Dict({"state": state, "images": images})

    def observation(self, observation: Any) -> Observation:
        """Of the environment's own observation."""
        parts = observation if isinstance(observation, dict) else {"images": observation[None]}
        return Observation(np.asarray(parts.get("state", ()), np.float32), np.array(parts["images"]))
