"""A task whose goal stands in the image alone, and demonstrations that mostly go to the wrong place.

    python tests/spot_env.py FILE.npz [--size=64] [--episodes=300] [--blind]

writes demonstrations. --env_name=gym:spot_env:Spot-v0 is the task, with this folder on PYTHONPATH, where SPOT_SIZE is
the size of the images (pixels) and SPOT_BLIND=1 makes them black.
"""

import os
import sys
from pathlib import Path

import gymnasium
import numpy as np

RIGHT = 0.3  # share of demonstrations that go to the goal
STEP, REACH, RADIUS, LIMIT = 0.3, 0.2, 0.75, 6
COLOURS = {"goal": (230, 60, 50), "lure": (60, 90, 230)}


class Spot(gymnasium.Env):
    """A point starts near the middle of [−1, 1]². Solved, and over, within REACH of the red spot; a blue one is a lure.

    Both lie at random places at the distance RADIUS from the middle, at least 60 degrees apart. Observation: the
    point's position as state, the spots in one image.
    """

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, size: int | None = None, blind: bool | None = None, render_mode: str | None = None):
        self.size = int(os.environ.get("SPOT_SIZE", 64)) if size is None else size
        self.blind = os.environ.get("SPOT_BLIND") == "1" if blind is None else blind
        self.render_mode = render_mode
        state, images = gymnasium.spaces.Box(-2, 2, (2,)), (1, self.size, self.size, 3)
        self.observation_space = gymnasium.spaces.Dict(
            {"state": state, "images": gymnasium.spaces.Box(0, 255, images, np.uint8)}
        )
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        angle = self.np_random.uniform(0, 2 * np.pi)
        angles = {"goal": angle, "lure": angle + self.np_random.uniform(np.pi / 3, 5 * np.pi / 3)}
        self.spots = {name: RADIUS * np.array([np.cos(a), np.sin(a)]) for name, a in angles.items()}
        self.position, self.steps = self.np_random.uniform(-0.1, 0.1, 2), 0
        self.image = self.render() * (not self.blind)
        return self._observe(), {"success": False}

    def step(self, action):
        self.position = np.clip(self.position + STEP * np.clip(action, -1, 1), -1, 1)
        self.steps += 1
        solved = bool(np.linalg.norm(self.position - self.spots["goal"]) < REACH)
        return self._observe(), float(solved) - 1, solved, self.steps == LIMIT, {"success": solved}

    def render(self):
        axis = (np.arange(self.size) + 0.5) / self.size * 2 - 1
        image = np.full((self.size, self.size, 3), 40, np.uint8)
        for name, colour in COLOURS.items():
            x, y = self.spots[name]
            image[(np.abs(axis[:, None] - y) < 0.2) & (np.abs(axis[None] - x) < 0.2)] = colour
        return image

    def _observe(self):
        return {"state": self.position.astype(np.float32), "images": self.image[None]}


gymnasium.register("Spot-v0", entry_point=Spot)


def write_demonstrations(path: Path, size: int = 64, episodes: int = 300, seed: int = 0, blind: bool = False) -> Path:
    """Writes a file in OGBench's layout, a share of RIGHT solved."""
    env, rng, rows = Spot(size, blind), np.random.default_rng(seed), []
    for episode in range(episodes):
        observation, _ = env.reset(seed=100_000 * (seed + 1) + episode)
        name, over = "goal" if rng.random() < RIGHT else "lure", False
        while not over:
            action = np.clip((env.spots[name] - env.position) / STEP, -1, 1) * rng.uniform(0.7, 1)
            action = np.clip(action + 0.1 * rng.normal(size=2), -1, 1)
            following, reward, solved, truncated, _ = env.step(action)
            rows.append((observation, action, reward, 1 - solved, 0))
            observation, over = following, solved or truncated
        rows.append((observation, np.zeros(2), 0, 1, 1))
    observations, *others = zip(*rows, strict=True)
    arrays = dict(zip(("actions", "rewards", "masks", "terminals"), (np.float32(x) for x in others), strict=True))
    arrays["observations"] = np.stack([observation["state"] for observation in observations])
    arrays["images"] = np.stack([observation["images"] for observation in observations])
    np.savez_compressed(path, **arrays)
    return path


if __name__ == "__main__":
    options = dict(argument.removeprefix("--").split("=") for argument in sys.argv[2:] if "=" in argument)
    numbers = {name: int(value) for name, value in options.items()}
    print(write_demonstrations(Path(sys.argv[1]), blind="--blind" in sys.argv, **numbers))
