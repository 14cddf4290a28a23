"""Environment wrappers."""

from collections.abc import Callable
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from utils.errors import UserError, failure, failure_line
from utils.observations import Observation

RESET = "reset(*, seed=None, options=None) must return (observation, info), as in Gymnasium"
STEP = "step(action) must return (observation, reward, terminated, truncated, info), as in Gymnasium"


class SeededReset(gymnasium.Wrapper):
    """Makes an OGBench episode a function of `reset(seed=...)` and the actions.

    OGBench's resets also draw from NumPy's global generator and from the action space (a few random steps to show
    the goal), which `reset(seed=...)` does not seed. In manipulation the action space is a property that returns a new,
    unseeded space at each access, so it is replaced with one. Side effect: NumPy's global generator is seeded.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        base = env.unwrapped
        if isinstance(getattr(type(base), "action_space", None), property):
            space = base.action_space
            base.__class__ = type(type(base).__name__, (type(base),), {"action_space": space})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets the environment; a seed (non-negative) seeds all three generators."""
        if seed is not None:
            global_seed, space_seed = np.random.SeedSequence(seed).generate_state(2)
            np.random.seed(global_seed)
            self.env.unwrapped.action_space.seed(int(space_seed))
        return self.env.reset(seed=seed, options=options)


def action_box(env: gymnasium.Env) -> Box:
    """Returns the action space, a Box with one axis, of an environment from `make_env`."""
    return cast(Box, env.action_space)


class UnitActions(gymnasium.wrappers.RescaleAction):
    """Takes actions in [-1, 1] and maps them affinely to the environment's own bounds.

    Attributes:
        own_bounds: (low [a], high [a]) of the environment's own actions.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env, np.float32(-1), np.float32(1))
        space = action_box(env)
        self.own_bounds = space.low, space.high


def in_unit_box(env: gymnasium.Env) -> gymnasium.Env:
    """Returns the environment, rescaled if its actions are not in [-1, 1] in every dimension."""
    actions = action_box(env)
    return env if (actions.low == -1).all() and (actions.high == 1).all() else UnitActions(env)


def with_images(env: gymnasium.Env) -> gymnasium.Env:
    """Returns the environment, wrapped to give `Observation`s if it has images.

    It has images if its observation space is a Box of uint8 [h, w, 3], or a Dict with 'images', a Box of uint8
    [C, h, w, 3], and optionally 'state', a Box [o].
    """
    space = env.observation_space
    parts: dict[str, gymnasium.Space] = dict(space.spaces) if isinstance(space, Dict) else {}
    if isinstance(space, Box) and len(space.shape) == 3:
        parts = {"images": Box(0, 255, (1, *space.shape), space.dtype)}
    images, state = parts.get("images"), parts.get("state", Box(-np.inf, np.inf, (0,)))
    if not (isinstance(images, Box) and isinstance(state, Box) and parts.keys() <= {"images", "state"}):
        return env
    if images.dtype != np.uint8 or images.shape[3:] != (3,) or len(state.shape) != 1:
        return env
    return Cameras(env, state, images)


class Cameras(gymnasium.ObservationWrapper):
    """Gives observations as `Observation(state [o], images [C, h, w, 3])`; see `with_images`."""

    def __init__(self, env: gymnasium.Env, state: Box, images: Box) -> None:
        super().__init__(env)
        self.observation_space = Dict({"state": state, "images": images})

    def observation(self, observation: Any) -> Observation:
        """Returns the environment's observation as an `Observation`."""
        parts = observation if isinstance(observation, dict) else {"images": observation[None]}
        return Observation(np.asarray(parts.get("state", ()), np.float32), np.array(parts["images"]))


class Checked(gymnasium.Wrapper):
    """Checks that a user's environment follows Gymnasium's interface; violations end in one-line errors.

    Arrays of one number are accepted for the reward and the flags. Observations must have the shapes of the observation
    space, and become arrays if that is a Box.

    Raises:
        UserError: in `reset` and `step`, if the environment raises or returns something else; names its file and line.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        space = env.observation_space
        self._shape = space.shape if isinstance(space, Box) else None
        self._parts = dict(space.spaces) if isinstance(space, Dict) else {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets the environment and checks the result."""
        try:
            result = self.env.reset(seed=seed, options=options)
        except Exception as error:
            raise self._failure(error, "reset", RESET) from error
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            raise self._rejected("reset", f"it returned {_outline(result)}", RESET)
        return self._observation("reset", result[0]), result[1]

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Steps the environment and checks the result."""
        try:
            result = self.env.step(action)
        except Exception as error:
            raise self._failure(error, "step", STEP) from error
        if not (isinstance(result, tuple) and len(result) == 5 and isinstance(result[4], dict)):
            raise self._rejected("step", f"it returned {_outline(result)}", STEP)
        observation, reward, terminated, truncated, info = result
        if type(reward) is not float:
            reward = float(self._number("reward", reward))
        if type(terminated) is not bool:
            terminated = bool(self._number("terminated", terminated))
        if type(truncated) is not bool:
            truncated = bool(self._number("truncated", truncated))
        return self._observation("step", observation), reward, terminated, truncated, info

    def render(self) -> Any:
        """Renders the environment."""
        try:
            return self.env.render()
        except Exception as error:
            raise self._failure(error, "render", "it must return an image, uint8 [height, width, 3]") from error

    def _observation(self, method: str, observation: Any) -> Any:
        """Returns the observation, checked, and as an array if its space is a Box."""
        if self._shape is not None:
            return self._array(method, "the observation", observation, self._shape)
        if not self._parts:
            return observation
        if not isinstance(observation, dict) or observation.keys() != self._parts.keys():
            expected = f"the observation space has {sorted(self._parts)}"
            raise self._rejected(method, f"the observation is {_outline(observation)}", expected)
        for name, space in self._parts.items():
            if isinstance(space, Box):
                part = self._array(method, f"the observation's '{name}'", observation[name], space.shape)
                if space.dtype == np.uint8 and part.dtype != np.uint8:
                    raise self._rejected(method, f"the observation's '{name}' is {part.dtype}", "its space says uint8")
        return observation

    def _array(self, method: str, name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Returns a part of an observation as an array of numbers, checked for its shape."""
        try:
            array = value if type(value) is np.ndarray else np.asarray(value)
        except ValueError:  # Lists of different lengths.
            array = np.empty(0, object)
        if array.dtype.kind not in "fiub":
            raise self._rejected(method, f"{name} is {_outline(value)}", f"an array of numbers {list(shape)} is needed")
        if array.shape != shape:
            what = f"{name} has shape {list(array.shape)}"
            raise self._rejected(method, what, f"the observation space says {list(shape)}")
        return array

    def _number(self, name: str, value: Any) -> Any:
        """Returns a number or flag, possibly given as an array of one.

        Raises:
            UserError: it is neither.
        """
        array = np.asarray(value) if not isinstance(value, list | tuple) or len(value) == 1 else np.empty(0)
        if array.size != 1 or array.dtype.kind not in "fiub":
            kind = "a number" if name == "reward" else "True or False"
            raise self._rejected("step", f"{name} is {_outline(value)}", f"it must be {kind}")
        return array.item()

    def _failure(self, error: Exception, method: str, expected: str) -> UserError:
        """Returns the error to raise for one that the environment raised."""
        return error if isinstance(error, UserError) else failure(error, method, expected, self._source(method))

    def _rejected(self, method: str, what: str, expected: str) -> UserError:
        """Returns the error to raise for an invalid result."""
        return UserError(failure_line(TypeError(what), method, expected, self._source(method)))

    def _source(self, method: str) -> Callable[..., Any]:
        return getattr(type(self.env.unwrapped), method)


def _outline(value: Any) -> str:
    """Returns a short description of a value."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}, shape {list(value.shape)}"
    if isinstance(value, tuple):
        return f"{len(value)} values ({', '.join(type(part).__name__ for part in value)})"
    text = repr(value)
    return text if len(text) <= 60 else type(value).__name__
