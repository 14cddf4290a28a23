"""A small environment with a right and a wrong way, and demonstrations that mostly take the wrong one."""

import os
import time
from pathlib import Path

import gymnasium
import numpy as np

RIGHT = 0.3  # share of demonstrations


class Fork(gymnasium.Env):
    """Four steps of at most a quarter; solved, and over, once x exceeds 0.4. Observation: x, y and the step.

    A step takes FORK_SECONDS, of the environment's variables, to make a run last.
    """

    observation_space = gymnasium.spaces.Box(-4, 4, (3,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.position = 0, np.array([0.0, self.np_random.uniform(-1, 1)])
        return self._observation(), {}

    def step(self, action):
        time.sleep(float(os.environ.get("FORK_SECONDS", 0)))
        self.steps, self.position = self.steps + 1, self.position + 0.25 * action
        solved = bool(self.position[0] > 0.4)
        return self._observation(), float(solved) - 1, solved, self.steps == 4, {"success": solved}

    def _observation(self):
        return np.array([*self.position, self.steps / 4], np.float32)


gymnasium.register("Fork-v0", entry_point=Fork)


def write_demonstrations(path: Path, episodes: int = 60, seed: int = 0) -> Path:
    """Writes a file in OGBench's layout, a share of RIGHT solved."""
    rng, env, rows = np.random.default_rng(seed), Fork(), []
    for episode in range(episodes):
        observation, way, over = env.reset(seed=seed + episode)[0], 1 if episode < RIGHT * episodes else -1, False
        while not over:
            action = np.clip([way * rng.uniform(0.7, 1), rng.normal() / 4], -1, 1)
            following, reward, solved, truncated, _ = env.step(action)
            row = {"observations": observation, "actions": action, "rewards": reward, "masks": 1 - solved}
            rows.append(row | {"terminals": 0})
            observation, over = following, solved or truncated
        last = {"observations": observation, "actions": np.zeros(2), "rewards": 0, "masks": 1, "terminals": 1}
        rows.append(last)
    np.savez(path, **{key: np.array([row[key] for row in rows], np.float32) for key in rows[0]})
    return path
