"""A small environment that fails when told to, and draws from every source of randomness."""

import os
import signal
import time
from pathlib import Path

import gymnasium
import numpy as np

SPACES = {
    "observation_space": gymnasium.spaces.Box(-4, 4, (3,), np.float32),
    "action_space": gymnasium.spaces.Box(-1, 1, (2,), np.float32),
}


class Faults(gymnasium.Env):
    """A walk of 6 to 15 steps; solved at x > 1. The file $FAULTS_FILE holds what the next step does: hang or crash."""

    observation_space, action_space = SPACES.values()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.steps = self.np_random.uniform(-0.5, 0.5, 2), 0
        self.length = 6 + int(self.np_random.integers(10))
        return self._observation(), {}

    def step(self, action):
        file = Path(os.environ.get("FAULTS_FILE", "/nonexistent"))
        if file.exists():
            if file.read_text() == "hang":
                time.sleep(1e6)
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(0.002)
        self.steps += 1
        self.position = self.position + 0.3 * np.asarray(action) + 0.05 * np.random.uniform(-1, 1, 2)
        solved = bool(self.position[0] > 1)
        return self._observation(), float(solved), solved, self.steps >= self.length, {"success": solved}

    def _observation(self):
        return np.array([*np.clip(self.position, -4, 4), self.steps / 15], np.float32)


gymnasium.register("Faults-v0", entry_point=Faults)


def write_data(path: Path, episodes: int = 40) -> None:
    """Writes random walks, a row a transition."""
    rng, env, rows = np.random.default_rng(0), Faults(), []
    np.random.seed(0)
    for episode in range(episodes):
        observation, over = env.reset(seed=episode)[0], False
        while not over:
            action = np.clip(rng.normal(0.3, 0.5, 2), -1, 1).astype(np.float32)
            following, reward, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
            rows.append((observation, action, reward, following, float(terminated), float(truncated)))
            observation = following
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    np.savez(
        path, **{name: np.array(part, np.float32) for name, part in zip(names, zip(*rows, strict=True), strict=True)}
    )
