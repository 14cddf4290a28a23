"""Environment wrappers."""

from typing import Any

import gymnasium
import numpy as np


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
