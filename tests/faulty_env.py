"""A small environment that fails in a way and at a moment that the variable FAULT says, and data of it.

FAULT is '<kind> <step> [<seed>]': in that step of an episode, of the one reset with that seed if it is given, it hangs,
exits, raises, or gives a reward or an observation that is no number. Read at each step, from the file FAULT_FILE if
that variable is set.
"""

import os
import time
from pathlib import Path

import gymnasium
import numpy as np


class Track(gymnasium.Env):
    """A cart on a track: 6 steps of a third at most; over, and solved, beyond the goal. Observation: place and step.

    Args:
        report: when info has 'success': always, solved (in solved episodes alone) or never.
    """

    observation_space = gymnasium.spaces.Box(-9, 9, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, report="always", endless=False, goal=1.0):
        self.report, self.endless, self.goal = report, endless, goal

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed_given, self.steps, self.place = seed, 0, self.np_random.uniform(-0.3, 0.3)
        return self._observation(), {}

    def step(self, action):
        self.steps += 1
        # Drawn from, so that a step too many or too few would show.
        self.place += float(action[0]) / 3 + 0.01 * np.random.random()
        solved = not self.endless and self.place > self.goal
        reward, kind = float(solved) - 1, fault(self.steps, self.seed_given)
        if kind == "hang":
            time.sleep(1000)
        elif kind == "exit":
            os._exit(3)
        elif kind == "raise":
            raise RuntimeError("the cart left the track")
        elif kind == "reward":
            reward = float("nan")
        elif kind == "observation":
            self.place = float("inf")
        info = {"success": solved} if self.report == "always" or (self.report == "solved" and solved) else {}
        return self._observation(), reward, bool(solved), not self.endless and self.steps == 6, info

    def _observation(self):
        return np.array([self.place, self.steps], np.float32)


def fault(step, seed):
    """The kind of fault that is due."""
    file = os.environ.get("FAULT_FILE")
    text = Path(file).read_text() if file and Path(file).exists() else os.environ.get("FAULT", "")
    kind, at, *seeds = text.split() or ("", "0")
    return kind if step == int(at) and (not seeds or int(seeds[0]) == seed) else ""


for suffix, options in {"": {}, "Solved": {"report": "solved", "goal": 0.4}, "Never": {"report": "never"}}.items():
    gymnasium.register(f"Track{suffix}-v0", entry_point=Track, kwargs=options)
gymnasium.register("TrackEndless-v0", entry_point=Track, kwargs={"endless": True})


def write_data(path: Path, episodes: int = 30) -> Path:
    """Writes a file of random play with a drift to the goal."""
    rng, env, rows = np.random.default_rng(0), Track(), []
    for episode in range(episodes):
        observation, over = env.reset(seed=episode)[0], False
        while not over:
            action = np.clip(rng.normal(0.5, 0.5, 1), -1, 1)
            following, reward, solved, truncated, _ = env.step(action)
            over = solved or truncated
            rows.append((observation, action, reward, following, solved, truncated))
            observation = following
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    columns = (np.array(column, np.float32) for column in zip(*rows, strict=True))
    np.savez(path, **dict(zip(names, columns, strict=True)))
    return path
