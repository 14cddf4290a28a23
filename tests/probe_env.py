"""Environments that show in what they give where a run draws from, and how their episodes end."""

from pathlib import Path

import gymnasium
import numpy as np


class Probe(gymnasium.Env):
    """Episodes of 3 to 9 steps, of which about half end in a success and the others by time.

    Observation: steps done over 10, a draw of the reset, 1 if the episode ends by time, and what NumPy's global
    generator gives at each step. Reward: 0 in every third step, else ±½.
    """

    observation_space = gymnasium.spaces.Box(-1, 1, (4,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.length = 0, int(self.np_random.integers(3, 10))
        self.draw, self.timed = self.np_random.uniform(), bool(self.np_random.uniform() < 0.5)
        return self._observation(), {}

    def step(self, action):
        self.steps += 1
        over, reward = self.steps == self.length, [0.0, 0.5, -0.5][self.steps % 3]
        return self._observation(), reward, over and not self.timed, over and self.timed, {"success": not self.timed}

    def _observation(self):
        return np.array([self.steps / 10, self.draw, self.timed, np.random.random()], np.float32)


class Still(gymnasium.Env):
    """Six steps with one and the same observation; the reward is the action's first component."""

    observation_space = gymnasium.spaces.Box(-1, 1, (4,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.full(4, 0.1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.full(4, 0.1, np.float32), float(action[0]), False, self.steps == 6, {"success": False}


gymnasium.register("Probe-v0", entry_point=Probe)
gymnasium.register("Still-v0", entry_point=Still)


def write_data(path: Path, episodes: int = 30) -> Path:
    """Writes what uniform actions do in Probe, in OGBench's layout."""
    rng, env, rows = np.random.default_rng(0), Probe(), []
    np.random.seed(0)
    for episode in range(episodes):
        observation, over = env.reset(seed=episode)[0], False
        while not over:
            action = rng.uniform(-1, 1, 2)
            following, reward, terminated, truncated, _ = env.step(action)
            rows.append((observation, action, reward + 0.1 * rng.random(), 1 - terminated, 0))
            observation, over = following, terminated or truncated
        rows.append((observation, np.zeros(2), 0, 1, 1))
    names = ("observations", "actions", "rewards", "masks", "terminals")
    np.savez(path, **{k: np.array(v, np.float32) for k, v in zip(names, zip(*rows, strict=True), strict=True)})
    return path
