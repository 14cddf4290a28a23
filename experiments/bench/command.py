"""Command line of the benchmarks, which measure speed as ratios within one run.

    python -m experiments.bench --public=DIR --public_python=PYTHON

Updates: updates per second of every agent in agents/ with paper networks, or those of --preset=cpu, on synthetic data,
relative to the public QAM code in DIR (a checkout of github.com/ColinQiyangLi/qam), if it has that agent. PYTHON must
have that code's dependencies, for example jax 0.5.3, tensorflow-probability 0.25, distrax, flax, ml_collections and
optax. Without --public, only our side is measured. --agent.<field>=<value> changes a setting of all agents, on both
sides if both have it.

Seeds: summed updates per second of --num_seeds agents of --agent trained in parallel in one program, relative to one
agent driven as in the public code: one jitted update per Python step, on a batch sampled on the host.

Evaluation: the batched evaluator relative to the loop of public code bases, which steps one environment and calls the
policy at every step, with the same policy and the paper's settings.

Actions: time of every agent to decide on an action chunk with the settings of --preset for --env_name, relative to the
first of --agents.

Kernels: number of kernels that one update of each of --agents launches on a GPU, for each of --num_seeds, and seconds
to compile it. It needs JAX's CUDA compiler, but no GPU, and is not part of 'all'.

Starts: seconds from the start of main.py to its first update, for a run's first and second start on --env_name (with
--dataset, or the dataset that main.py finds), and the peak memory with 1 and with --num_seeds seeds.

The report is printed part by part, and written with its figure to --output as bench.md.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jaxtyping import Float, Int32

from agents import AGENTS
from envs.tasks import make_env, parse_task
from envs.wrappers import action_box
from experiments.bench import actions as bench_actions
from experiments.bench import kernels as bench_kernels
from experiments.bench import seeds as bench_seeds
from experiments.bench import startup as bench_starts
from experiments.bench import updates as bench_updates
from utils.errors import UserError
from utils.output.intervals import wilson_interval
from utils.rollout.evaluator import Evaluator
from utils.rollout.policy import act
from utils.rollout.worker_pool import episode_success
from utils.run.loading import load_run
from utils.system.cli import parse
from utils.system.entry_point import run_main
from utils.system.files import atomic_write_bytes, atomic_write_text
from utils.system.jax_setup import PRECISIONS
from utils.trees import tree_stack

Part = tuple[str, bool]  # A part of the report in Markdown, and whether all its measurements succeeded.
FLAGS = flags.FlagValues()
flags.DEFINE_enum(
    *("part", "all", ["all", "updates", "seeds", "evaluation", "actions", "starts", "kernels"], "What to measure."),
    flag_values=FLAGS,
)
flags.DEFINE_integer("rounds", 2, "Rounds, alternating between the sides.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("cores", None, "Number of cores to use; default: all.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_list(
    "agents", [], "Updates, actions, kernels: agents to measure; default: all in agents/.", flag_values=FLAGS
)
flags.DEFINE_enum("preset", "paper", ["paper", "cpu"], "Updates, actions: settings of our agents.", flag_values=FLAGS)
flags.DEFINE_string("public", None, "Updates: a checkout of github.com/ColinQiyangLi/qam.", flag_values=FLAGS)
flags.DEFINE_string("public_python", sys.executable, "Updates: a Python that can run it.", flag_values=FLAGS)
flags.DEFINE_float("seconds", 20.0, "Updates, seeds: length of a measurement.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_enum(
    *("matmul_precision", "float32", PRECISIONS),
    "Updates, seeds: precision of matrix products on both sides; CPUs support only float32.",
    flag_values=FLAGS,
)
flags.DEFINE_list("num_seeds", "1,2,4,8", "Seeds, starts, kernels: numbers of seeds in parallel.", flag_values=FLAGS)
flags.DEFINE_alias("lanes", "num_seeds", flag_values=FLAGS)
flags.DEFINE_string("output", "exp/bench", "Directory of the report.", flag_values=FLAGS)
flags.DEFINE_string("agent", "agents/otql.py", "Seeds, evaluation, starts: agent file.", flag_values=FLAGS)
flags.DEFINE_string("run", None, "Evaluation: directory of the run whose agent acts.", flag_values=FLAGS)
flags.DEFINE_string(
    "env_name", "scene-play-singletask-task1-v0", "Evaluation, actions, starts: task.", flag_values=FLAGS
)
flags.DEFINE_string("dataset", None, "Starts: an .npz file to use as the dataset.", flag_values=FLAGS)
flags.DEFINE_integer(
    "episodes", 8, "Evaluation: episodes per round of the evaluator; the loop runs a quarter.", flag_values=FLAGS
)


def loop_one_environment(policy: Any, env: Any, horizon: int, num_episodes: int, first: int = 0) -> list[float]:
    """Runs episodes one by one, and computes a chunk at every step but uses it only when the last one is executed.

    Returns:
        the success of each episode.
    """
    successes = []
    for episode in range(first, first + num_episodes):
        observation, _ = env.reset(seed=episode)
        queue: list[Float[np.ndarray, " A"]] = []
        info: dict[str, Any] = {}
        done, step = False, 0
        while not done:
            numbers = np.full(1, episode, np.int32), np.full(1, step, np.int32)
            actions = np.asarray(policy(observation[None].astype(np.float32), *numbers))
            queue = queue or list(actions.reshape(horizon, -1))
            observation, _, terminated, truncated, info = env.step(np.clip(queue.pop(0), -1, 1))
            done, step = terminated or truncated, step + 1
        successes.append(episode_success(info))
    return successes


def evaluated_agent() -> tuple[Any, Any]:
    """Returns --run's agent, or an untrained one with the paper's settings, as a stack of one, and its `make_env`."""
    if FLAGS.run:
        agent, settings, _ = load_run(FLAGS.run)
        return tree_stack([agent]), functools.partial(make_env, settings["env_name"])
    make = functools.partial(make_env, FLAGS.env_name)
    env, domain = make(), parse_task(FLAGS.env_name).domain
    observation, width = env.observation_space.sample()[None], action_box(env).shape[0]
    return bench_actions.new_agent(FLAGS.agent, domain, {}, observation, width), make


def evaluation(overrides: dict[str, str]) -> Part:
    """Measures episodes per minute of the evaluator and the loop, their ratio and, if known, their success."""
    (agents, make), key = evaluated_agent(), jax.random.PRNGKey(1)
    env, horizon = make(), agents.config.horizon_length

    def policy(observations: Any, episodes: Int32[np.ndarray, " B"], chunks: Int32[np.ndarray, " B"]) -> Any:
        return act(agents, 0, observations, key, episodes, chunks)

    seconds, counts = {"loop": 0.0, "batched": 0.0}, {"loop": max(1, FLAGS.episodes // 4), "batched": FLAGS.episodes}
    successes: dict[str, list[float]] = {"loop": [], "batched": []}
    with Evaluator(make, horizon) as evaluator:
        # Compiles and starts the workers before the measurement.
        evaluator.evaluate(policy, evaluator.batch_size, 0)
        loop_one_environment(policy, env, horizon, 1)
        for turn in range(FLAGS.rounds):
            start = time.perf_counter()
            successes["loop"] += loop_one_environment(policy, env, horizon, counts["loop"], turn * counts["loop"])
            middle = time.perf_counter()
            result = evaluator.evaluate(policy, counts["batched"], turn)
            seconds["loop"] += middle - start
            seconds["batched"] += time.perf_counter() - middle
            successes["batched"] += list(result.get("success", []))
    rate = {name: 60 * FLAGS.rounds * counts[name] / seconds[name] for name in seconds}
    ratio = f"**{rate['batched'] / rate['loop']:.2f}**"
    lines = ["## Evaluation", "", f"Episodes per minute, batched relative to one by one: {ratio}"]
    lines.append(f"({rate['batched']:.1f} and {rate['loop']:.1f} on this machine).")
    for name, outcomes in successes.items():
        if outcomes and np.isfinite(outcomes).all():
            low, high = wilson_interval(float(np.mean(outcomes)), len(outcomes))
            about = f"{np.mean(outcomes):.2f} ({low:.2f} to {high:.2f}) over {len(outcomes)} episodes."
            lines.append(f"Success, {name}: {about}")
    return "\n".join(lines), True


def seed_counts() -> list[int]:
    """Returns the numbers of --num_seeds, sorted.

    Raises:
        UserError: one is not a whole number above 0, or there is none.
    """
    texts = FLAGS.num_seeds
    if not texts or not all(text.isdecimal() and int(text) for text in texts):
        raise UserError(f"--num_seeds={','.join(texts)} needs whole numbers above 0, such as 1,2,4,8")
    return sorted({int(text) for text in texts})


def updates(overrides: dict[str, str]) -> Part:
    """Measures updates per second of every agent, relative to the public code."""
    timing = FLAGS.rounds, FLAGS.seconds, FLAGS.matmul_precision
    return bench_updates.compare(FLAGS.agents, overrides, FLAGS.public, FLAGS.public_python, *timing, FLAGS.preset)


def seeds(overrides: dict[str, str]) -> Part:
    """Measures seeds in parallel, and writes the figure to --output."""
    name = Path(FLAGS.agent).stem
    if name not in AGENTS:
        raise UserError(f"--agent={FLAGS.agent} cannot be measured; give one of agents/{{{','.join(AGENTS)}}}.py")
    timing = FLAGS.rounds, FLAGS.seconds, FLAGS.matmul_precision
    text, png = bench_seeds.compare(name, overrides, seed_counts(), *timing)
    if png is None:
        return text, False
    atomic_write_bytes(output() / f"seeds_{name}.png", png)
    return f"{text}\n\n![](seeds_{name}.png)", True


def actions(overrides: dict[str, str]) -> Part:
    """Measures the time per decision."""
    names = bench_updates.named_agents(FLAGS.agents)
    return bench_actions.compare(names, FLAGS.env_name, overrides, FLAGS.rounds, FLAGS.preset), True


def starts(overrides: dict[str, str]) -> Part:
    """Measures seconds to the first update, and memory."""
    return bench_starts.compare(FLAGS.agent, FLAGS.env_name, FLAGS.dataset, overrides, seed_counts()), True


def kernels(overrides: dict[str, str]) -> Part:
    """Counts the kernels of an update on a GPU."""
    return bench_kernels.compare(bench_updates.named_agents(FLAGS.agents), seed_counts(), overrides)


def output() -> Path:
    """Returns the directory of the report."""
    return Path(FLAGS.output).expanduser()


def main(argv: Sequence[str]) -> None:
    """Measures the parts that --part selects, and shows progress on stderr."""
    overrides = parse(argv, FLAGS)
    if FLAGS.cores:
        # Child processes inherit the cores.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: FLAGS.cores])
    report: list[str] = []
    complete = True
    everything = [measure for name, measure in PARTS.items() if name != "kernels"]
    for measure in everything if FLAGS.part == "all" else (PARTS[FLAGS.part],):
        text, whole = measure(overrides)
        report, complete = [*report, text], complete and whole
        print(f"{text}\n", flush=True)
        atomic_write_text(output() / "bench.md", "\n\n".join(report) + "\n")
    print(f"report: {output() / 'bench.md'}", file=sys.stderr)
    if not complete:
        sys.exit(1)


PARTS: dict[str, Callable[[dict[str, str]], Part]] = {
    part.__name__: part for part in (updates, seeds, evaluation, actions, starts, kernels)
}

if __name__ == "__main__":
    run_main(main)
