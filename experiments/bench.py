"""Speed, as ratios taken side by side in one run: python -m experiments.bench

Evaluation: the batched evaluator against the public code bases' loop, which steps one environment and asks the policy
at every step, with the same policy at the paper's settings.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from envs.tasks import make_env, parse_task
from utils import cli, runs
from utils.evaluation import Evaluator
from utils.training import act, stack

FLAGS = flags.FlagValues()
flags.DEFINE_string("agent", "agents/otql.py", "Agent file.", flag_values=FLAGS)
flags.DEFINE_string("env_name", "scene-play-singletask-task1-v0", "Task.", flag_values=FLAGS)
flags.DEFINE_integer("episodes", 8, "Episodes a round of the evaluator; the loop runs a quarter.", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 2, "Rounds, the two in turn.", lower_bound=1, flag_values=FLAGS)


def loop_one_environment(policy: Any, env: Any, horizon: int, num_episodes: int) -> None:
    """Runs episodes one by one, asking for a chunk at every step and using it when the last one is executed."""
    for episode in range(num_episodes):
        observation, _ = env.reset(seed=episode)
        queue, done, chunk = [], False, 0
        while not done:
            row = np.full(1, chunk, np.int32)
            actions = np.asarray(policy(observation[None].astype(np.float32), row, row))
            queue = queue or list(actions.reshape(horizon, -1))
            observation, _, terminated, truncated, _ = env.step(np.clip(queue.pop(0), -1, 1))
            done, chunk = terminated or truncated, chunk + 1


def bench_evaluation() -> None:
    """Prints episodes a minute of both, and their ratio."""
    module, task = runs.load_agent(FLAGS.agent), parse_task(FLAGS.env_name)
    config, _, _ = runs.resolve_config(module, task.domain, "paper", {})
    make = functools.partial(make_env, FLAGS.env_name)
    env, horizon = make(), config.horizon_length
    observation, width = env.observation_space.sample()[None], env.action_space.shape[0]
    example = {"observations": observation, "actions": np.zeros((1, horizon * width), np.float32)}
    agents = stack([module.Agent.create(jax.random.PRNGKey(0), example, config)])
    key = jax.random.PRNGKey(1)

    def policy(observations: np.ndarray, episodes: np.ndarray, chunks: np.ndarray) -> Any:
        return act(agents, 0, observations, key, episodes, chunks)

    seconds, counts = {"loop": 0.0, "batched": 0.0}, {"loop": max(1, FLAGS.episodes // 4), "batched": FLAGS.episodes}
    with Evaluator(make, horizon) as evaluator:
        # Compilation and the start of the workers are paid before the clock runs.
        evaluator.evaluate(policy, evaluator.batch_size, 0)
        loop_one_environment(policy, env, horizon, 1)
        for _ in range(FLAGS.rounds):
            start = time.perf_counter()
            loop_one_environment(policy, env, horizon, counts["loop"])
            middle = time.perf_counter()
            evaluator.evaluate(policy, counts["batched"], 0)
            seconds["loop"] += middle - start
            seconds["batched"] += time.perf_counter() - middle
    rate = {name: 60 * FLAGS.rounds * counts[name] / seconds[name] for name in seconds}
    print(f"evaluation, episodes a minute: loop {rate['loop']:.1f}, batched {rate['batched']:.1f}")
    print(f"ratio {rate['batched'] / rate['loop']:.2f}")


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    cli.parse(argv, FLAGS)
    bench_evaluation()


if __name__ == "__main__":
    cli.run(main)
