"""Speed, as ratios taken side by side in one run.

    python -m experiments.bench --public=DIR --public_python=PYTHON

Updates: updates a second of every agent in agents/ with paper networks on made-up data, beside those of the public QAM
code in DIR (a checkout of github.com/ColinQiyangLi/qam), where it has that agent. PYTHON is one that the checkout runs
under, for example with jax 0.5.3, tensorflow-probability 0.25, distrax, flax, ml_collections and optax. Without
--public, ours alone. --agent.<field>=<value> changes a setting of all agents, and of theirs where both have it.

Seeds: updates a second, summed, of --lanes agents of --agent's kind side by side in one program, over those of one that
is driven as the public code drives it: one jitted update a Python step, its batch sampled on the host. The picture goes
to --output.

Evaluation: the batched evaluator against the public code bases' loop, which steps one environment and asks the policy
at every step, with the same policy at the paper's settings.

Actions: time of every agent to decide on a chunk, at the paper's settings of --env_name, over the first of --agents.

Starts: seconds from main.py's start to its first update, of a run's first and of its second start on --env_name (with
--dataset, or what main.py finds), and the peak memory with 1 and with --lanes seeds.

The report is printed part by part and written to bench.md in --output, beside the picture.
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
from utils.trees import tree_stack

Part = tuple[str, bool]  # a part of the report in Markdown, and whether all in it could be measured
FLAGS = flags.FlagValues()
flags.DEFINE_enum(
    "part", "all", ["all", "updates", "seeds", "evaluation", "actions", "starts"], "What to measure.", flag_values=FLAGS
)
flags.DEFINE_integer("rounds", 2, "Rounds, the two sides in turn.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("cores", None, "Cores to run on; default: all.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_list("agents", [], "Updates, actions: agents to measure; default: all in agents/.", flag_values=FLAGS)
flags.DEFINE_string("public", None, "Updates: a checkout of github.com/ColinQiyangLi/qam.", flag_values=FLAGS)
flags.DEFINE_string("public_python", sys.executable, "Updates: a Python that runs it.", flag_values=FLAGS)
flags.DEFINE_float("seconds", 20.0, "Updates: length of a measurement.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_enum(
    *("matmul_precision", "float32", ["float32", "tensorfloat32", "bfloat16"]),
    "Updates: precision of matrix products, on both sides; a processor knows float32 alone.",
    flag_values=FLAGS,
)
flags.DEFINE_list("lanes", "1,2,4,8", "Seeds, starts: numbers of agents side by side.", flag_values=FLAGS)
flags.DEFINE_string("output", "exp/bench", "Directory of the report.", flag_values=FLAGS)
flags.DEFINE_string("agent", "agents/otql.py", "Seeds, evaluation, starts: agent file.", flag_values=FLAGS)
flags.DEFINE_string("run", None, "Evaluation: directory of a run whose agent acts.", flag_values=FLAGS)
flags.DEFINE_string(
    "env_name", "scene-play-singletask-task1-v0", "Evaluation, actions, starts: task.", flag_values=FLAGS
)
flags.DEFINE_string("dataset", None, "Starts: an .npz file to use as the dataset.", flag_values=FLAGS)
flags.DEFINE_integer(
    "episodes", 8, "Evaluation: episodes a round of the evaluator; the loop runs a quarter.", flag_values=FLAGS
)


def loop_one_environment(policy: Any, env: Any, horizon: int, num_episodes: int, first: int = 0) -> list[float]:
    """Runs episodes one by one, asking for a chunk at every step and using it when the last one is executed.

    Returns:
        whether each episode succeeded.
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
    """The agent of --run, or an untrained one at the paper's settings, as the only one of a stack; makes its task."""
    if FLAGS.run:
        agent, settings, _ = load_run(FLAGS.run)
        return tree_stack([agent]), functools.partial(make_env, settings["env_name"])
    make = functools.partial(make_env, FLAGS.env_name)
    env, domain = make(), parse_task(FLAGS.env_name).domain
    observation, width = env.observation_space.sample()[None], action_box(env).shape[0]
    return bench_actions.new_agent(FLAGS.agent, domain, {}, observation, width), make


def evaluation(overrides: dict[str, str]) -> Part:
    """Episodes a minute of both, their ratio and, where it is known, their success."""
    (agents, make), key = evaluated_agent(), jax.random.PRNGKey(1)
    env, horizon = make(), agents.config.horizon_length

    def policy(observations: Any, episodes: Int32[np.ndarray, " B"], chunks: Int32[np.ndarray, " B"]) -> Any:
        return act(agents, 0, observations, key, episodes, chunks)

    seconds, counts = {"loop": 0.0, "batched": 0.0}, {"loop": max(1, FLAGS.episodes // 4), "batched": FLAGS.episodes}
    successes: dict[str, list[float]] = {"loop": [], "batched": []}
    with Evaluator(make, horizon) as evaluator:
        # Compilation and the start of the workers are paid before the clock runs.
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
    lines = [
        "## Evaluation",
        "",
        f"Episodes a minute, batched over one by one: **{rate['batched'] / rate['loop']:.2f}**",
    ]
    lines.append(f"({rate['batched']:.1f} and {rate['loop']:.1f} on this machine).")
    for name, outcomes in successes.items():
        if outcomes and np.isfinite(outcomes).all():
            low, high = wilson_interval(float(np.mean(outcomes)), len(outcomes))
            about = f"{np.mean(outcomes):.2f} ({low:.2f} to {high:.2f}) over {len(outcomes)} episodes."
            lines.append(f"Success, {name}: {about}")
    return "\n".join(lines), True


def lanes() -> list[int]:
    """The numbers of --lanes.

    Raises:
        UserError: they are none.
    """
    if not all(text.isdecimal() and int(text) for text in FLAGS.lanes) or not FLAGS.lanes:
        raise UserError(f"--lanes={','.join(FLAGS.lanes)} needs whole numbers above 0, such as 1,2,4,8")
    return sorted({int(text) for text in FLAGS.lanes})


def updates(overrides: dict[str, str]) -> Part:
    """Every agent beside the public code's."""
    timing = FLAGS.rounds, FLAGS.seconds, FLAGS.matmul_precision
    return bench_updates.compare(FLAGS.agents, overrides, FLAGS.public, FLAGS.public_python, *timing)


def seeds(overrides: dict[str, str]) -> Part:
    """What agents side by side bring; their picture goes to --output."""
    name = Path(FLAGS.agent).stem
    if name not in AGENTS:
        raise UserError(f"--agent={FLAGS.agent}: seeds are measured of agents/{{{','.join(AGENTS)}}}.py")
    timing = FLAGS.rounds, FLAGS.seconds, FLAGS.matmul_precision
    text, picture = bench_seeds.compare(name, overrides, lanes(), *timing)
    if picture is None:
        return text, False
    atomic_write_bytes(output() / f"seeds_{name}.png", picture)
    return f"{text}\n\n![](seeds_{name}.png)", True


def actions(overrides: dict[str, str]) -> Part:
    """Time per decision."""
    names = bench_updates.named_agents(FLAGS.agents)
    return bench_actions.compare(names, FLAGS.env_name, overrides, FLAGS.rounds), True


def starts(overrides: dict[str, str]) -> Part:
    """Seconds to the first update, and memory."""
    return bench_starts.compare(FLAGS.agent, FLAGS.env_name, FLAGS.dataset, overrides, lanes()), True


def output() -> Path:
    """The directory of the report."""
    return Path(FLAGS.output).expanduser()


def main(argv: Sequence[str]) -> None:
    """Measures the parts asked for; progress goes to stderr."""
    overrides = parse(argv, FLAGS)
    if FLAGS.cores:
        # Of this process, and of all that it starts.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: FLAGS.cores])
    report: list[str] = []
    complete = True
    for measure in PARTS.values() if FLAGS.part == "all" else (PARTS[FLAGS.part],):
        text, whole = measure(overrides)
        report, complete = [*report, text], complete and whole
        print(f"{text}\n", flush=True)
        atomic_write_text(output() / "bench.md", "\n\n".join(report) + "\n")
    print(f"report: {output() / 'bench.md'}", file=sys.stderr)
    if not complete:
        sys.exit(1)


PARTS: dict[str, Callable[[dict[str, str]], Part]] = {
    "updates": updates,
    "seeds": seeds,
    "evaluation": evaluation,
    "actions": actions,
    "starts": starts,
}

if __name__ == "__main__":
    run_main(main)
