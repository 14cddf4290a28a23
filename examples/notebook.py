"""From Python: arrays → training → actions, evaluation, a video. Each block is a cell of a notebook."""

# %% Data: any arrays with a row a step. Here, random play of MuJoCo's Reacher.
import functools

import gymnasium
import jax
import numpy as np

from envs.gym_dataset import dataset_from_arrays
from envs.tasks import make_env
from utils.rollout.evaluate import evaluate, record_video
from utils.rollout.policy import ChunkPolicy
from utils.run.config import RunConfig
from utils.run.loading import load_run
from utils.run.train import train

env = gymnasium.make("Reacher-v5")
env.action_space.seed(0)
rows = []
for episode in range(50):
    (observation, _), over = env.reset(seed=episode), False
    while not over:
        action = env.action_space.sample()
        following, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, reward, terminated, truncated))
        observation, over = following, terminated or truncated
o, a, r, t, cut = (np.array(column) for column in zip(*rows, strict=True))

# %% Train. The same call resumes: Ctrl-C (or "interrupt the kernel") saves first.
data = dataset_from_arrays(observations=o, actions=a, rewards=r, terminals=t, timeouts=cut)
config = RunConfig(env_name="gym:Reacher-v5", preset="cpu", offline_steps=10_000, eval_episodes=10, log_interval=1_000)
result = train(config, data=data, on_metrics=lambda run, name, step, row: print(name, step, row))

# %% Actions: chunks of H for a batch of observations, or one at a time.
chunks = result.agent.sample_actions(o[:8], jax.random.key(0))  # [8, H · A]
policy = ChunkPolicy(result.agent, seed=0)
observation, _ = env.reset(seed=policy.reset())
action = policy.act(observation)

# %% Later: load a run, evaluate it, record it.
agent, settings, step = load_run(result.directory)
make = functools.partial(make_env, "gym:Reacher-v5")
print(evaluate(agent, make, episodes=20, seed=1)["return_mean"])
record_video(agent, make, "reacher.mp4")
