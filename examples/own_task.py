"""A custom task: writes a dataset of a Gymnasium environment and trains on it.

    python examples/own_task.py [any flag of main.py]

The data here are random actions on the pendulum. Replace them, and the environment's id, with your own.
"""

import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np

ENV_ID, EPISODES, PATH = "Pendulum-v1", 50, Path("pendulum.npz")

env = gymnasium.make(ENV_ID)
env.action_space.seed(0)
rows = {"observations": [], "actions": [], "rewards": [], "next_observations": [], "terminals": [], "timeouts": []}
for episode in range(EPISODES):
    (observation, _), over = env.reset(seed=episode), False
    while not over:
        action = env.action_space.sample()
        following, reward, terminated, truncated, _ = env.step(action)
        step = (observation, action / env.action_space.high, reward, following, terminated, truncated)  # in [-1, 1]
        for column, value in zip(rows.values(), step, strict=True):
            column.append(value)
        observation, over = following, terminated or truncated
np.savez(PATH, **{name: np.asarray(column, np.float32) for name, column in rows.items()})

main = Path(__file__).resolve().parent.parent / "main.py"
command = [sys.executable, str(main), f"--env_name=gym:{ENV_ID}", f"--dataset={PATH}", "--preset=cpu", *sys.argv[1:]]
print(" ".join(command), flush=True)
sys.exit(subprocess.run(command, check=False).returncode)
