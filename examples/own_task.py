"""A custom task: writes a dataset of a Gymnasium environment and trains on it.

    python examples/own_task.py [any flag of main.py]

The data here are random actions on the pendulum. Replace them, and the environment's id, with your own.
"""

from collections.abc import Sequence
from pathlib import Path

import gymnasium
import numpy as np

from utils.run.config import RunConfig
from utils.run.flags import parse_flags
from utils.run.train import train
from utils.system.cli import last_of_each
from utils.system.entry_point import run_main

ENV_ID, EPISODES, PATH = "Pendulum-v1", 50, Path("pendulum.npz")
COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")


def write_dataset() -> None:
    """Writes random play as one array a column, a row a step."""
    env = gymnasium.make(ENV_ID)
    env.action_space.seed(0)
    rows = []
    for episode in range(EPISODES):
        (observation, _), over = env.reset(seed=episode), False
        while not over:
            action = env.action_space.sample()
            following, reward, terminated, truncated, _ = env.step(action)
            # Actions in [-1, 1].
            rows.append((observation, action / env.action_space.high, reward, following, terminated, truncated))
            observation, over = following, terminated or truncated
    columns = {name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)}
    np.savez(PATH, **{name: np.asarray(column, np.float32) for name, column in columns.items()})


def main(argv: Sequence[str]) -> None:
    """Writes the dataset and trains on it."""
    write_dataset()
    flags = (f"--env_name=gym:{ENV_ID}", f"--dataset={PATH}", "--preset=cpu")
    train(parse_flags((argv[0], *last_of_each((*flags, *argv[1:]))), RunConfig))


if __name__ == "__main__":
    run_main(main)
