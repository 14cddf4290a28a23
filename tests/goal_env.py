"""Environments with dictionaries of observations, for datasets of Minari: a point on a line that is to reach a goal."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Text, Tuple

IMAGE = 32


class Goal(gymnasium.Env):
    """The point moves by 0.2 times the action; an episode terminates at the goal, at 1 or −1.

    Observations are dictionaries: 'observation' [2], 'desired_goal' [1], and nested 'arm': 'position' [1]; with
    `cameras` also 'front' [32, 32, 3] and 'grey' [32, 32], which show the position. `odd` replaces them by a space
    that cannot be trained on.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, cameras: bool = False, odd: str = "", bound: float = 2.0, render_mode: str | None = None):
        self.cameras, self.odd, self.render_mode = cameras, odd, render_mode
        vector = {name: Box(-10, 10, (size,), np.float64) for name, size in (("observation", 2), ("desired_goal", 1))}
        spaces = vector | {"arm": Dict({"position": Box(-10, 10, (1,), np.float32)})}
        if cameras:
            spaces |= {"front": Box(0, 255, (IMAGE, IMAGE, 3), np.uint8), "grey": Box(0, 255, (IMAGE, IMAGE), np.uint8)}
        odds = {"text": Text(5), "discrete": Discrete(3), "tuple": Tuple([Box(-1, 1, (1,))])}
        self.observation_space = Dict(spaces | {"odd": odds[odd]} if odd else spaces)
        self.action_space = Box(-bound, bound, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.steps = float(self.np_random.uniform(-0.1, 0.1)), 0
        self.goal = float(self.np_random.choice([-1, 1]))
        return self._observe(), {}

    def step(self, action):
        self.x += 0.2 * float(action[0])
        self.steps += 1
        solved = abs(self.x - self.goal) < 0.2
        return self._observe(), float(solved), solved, False, {"success": solved}

    def render(self):
        return np.full((64, 64, 3), 127, np.uint8)

    def _observe(self):
        parts = {
            "observation": np.array([self.x, self.steps / 10]),
            "desired_goal": np.array([self.goal]),
            "arm": {"position": np.array([10 * self.x], np.float32)},
        }
        if self.cameras:
            shade = np.uint8(np.clip(128 + 50 * self.x, 0, 255))
            grey = np.full((IMAGE, IMAGE), shade, np.uint8)
            parts |= {"front": np.stack([grey, grey // 2, grey // 3], axis=-1), "grey": grey}
        odds = {"text": "ab", "discrete": 1, "tuple": (np.zeros(1, np.float32),)}
        return parts | ({"odd": odds[self.odd]} if self.odd else {})


gymnasium.register("Goal-v0", entry_point="goal_env:Goal", max_episode_steps=12)
