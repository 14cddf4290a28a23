"""Diagnosis of a run: causes of changes in its success, and the quality of its advantages.

    python -m experiments.diagnose RUN_DIR…

For each run of an agent with a flow and a critic, from its two newest checkpoints:

    swap       success of the flow of one checkpoint with its candidates ranked by the critic of the other
    average    success of the trained flow and of its Polyak average, at each checkpoint
    value      advantages A = Q − V̂ from k flow samples compared with those from 64: correlation over a batch, and
               total variation between their marginals p (agents with a λ)

All policies act in the same episodes: the same initial states and the same noise.

With --between, the swap is between the newest checkpoints of several runs, which must have the same networks; it shows
whether one run is better by its flow or by its critic. For each run also, over states s of the dataset,

    samples    mean deviation of flow samples a at a state, and the spread of the mean action E[a|s] over states,
               relative to the first run's
    predicted  that spread as its coupling should reduce it, if the first run is unbiased (runs with coupling 'ot')
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from envs.datasets import load_dataset
from envs.tasks import make_env, parse_task
from utils.arrays import Number
from utils.coupling import tilted_marginal
from utils.data.batches import assemble, gather, prepare, sample_starts
from utils.errors import UserError
from utils.output.intervals import wilson_interval
from utils.random_streams import Stream, stream_key
from utils.rollout.evaluator import Evaluator
from utils.rollout.policy import act
from utils.run import checkpoints
from utils.run.directory import checkpoint_dir
from utils.run.loading import load_run
from utils.system.cli import parse
from utils.system.entry_point import run_main
from utils.trees import tree_stack

FLAGS = flags.FlagValues()
flags.DEFINE_integer("episodes", 50, "Episodes per policy.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_bool("between", False, "Swap between runs, not between checkpoints.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 12345, "Seed of the episodes.", lower_bound=0, flag_values=FLAGS)


def mixed(flow_of: Any, critic_of: Any, averaged: bool = True) -> Any:
    """Returns an agent that samples from one agent's flow, averaged or not, and ranks by another agent's critic."""
    flow = flow_of.acting_flow if averaged else flow_of.params["flow"]
    return flow_of.replace(
        params=flow_of.params | {"critic": critic_of.params["critic"]}, targets=flow_of.targets | {"flow": flow}
    )


def success(agent: Any, evaluator: Evaluator) -> str:
    """Evaluates an agent, and formats its success rate with the 95 % Wilson interval.

    Raises:
        UserError: the environment reports no success.
    """
    agents, key = tree_stack([agent]), stream_key(FLAGS.seed, Stream.EVALUATION_ACTING, 0)

    def policy(observations: Any, episodes: Int32[np.ndarray, " B"], chunks: Int32[np.ndarray, " B"]) -> Any:
        return act(agents, 0, observations, key, episodes, chunks)

    rate = evaluator.evaluate(policy, FLAGS.episodes, FLAGS.seed).get("success_rate")
    if rate is None:
        raise UserError("the environment reports no success; add 'success' to the info of its last step")
    low, high = wilson_interval(rate, FLAGS.episodes)
    return f"{rate:.2f} ({low:.2f} to {high:.2f})"


def diagnose_swap(agents: dict[Any, Any], evaluator: Evaluator) -> None:
    """Prints the success of each agent's flow with each one's critic."""
    for flow, critic in itertools.product(agents, repeat=2):
        rate = success(mixed(agents[flow], agents[critic]), evaluator)
        print(f"  flow of {flow}, critic of {critic}: success {rate}", flush=True)


def diagnose_average(by_step: dict[int, Any], evaluator: Evaluator) -> None:
    """Prints the success of each checkpoint's trained flow, without averaging."""
    for step, agent in by_step.items():
        print(f"  step {step}, flow not averaged: success {success(mixed(agent, agent, False), evaluator)}", flush=True)


def windows(agent: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns a batch of 1024 windows of the run's dataset."""
    task = parse_task(settings["env_name"])
    raw, _, _ = load_dataset(
        task,
        dataset_dir=settings["flags"]["dataset_dir"],
        dataset_path=settings["flags"]["dataset"],
        sparse=settings["sparse"],
        with_val=False,
        actions=settings["flags"].get("dataset_actions", "auto"),
    )
    horizon, cfg = settings["config"]["horizon_length"], agent.cfg
    data = prepare(raw, terminates=task.terminates)
    positions = np.asarray(sample_starts(stream_key(0, Stream.STUDY, 0), 0, 1024, len(data["starts"])))
    rows = gather(data, data["starts"][positions], horizon)
    return jax.tree.map(jnp.asarray, assemble(rows, cfg.discount, cfg.window_rule))


def diagnose_samples(
    agent: Any, samples: Float[np.ndarray, "n m d"], reference: Float[np.ndarray, "n m d"], batch: dict[str, Any]
) -> None:
    """Prints the deviation of an agent's flow samples, and the spread of their mean relative to the reference's."""
    spread = relative_spread(samples, reference)
    line = f"  flow samples: deviation {samples.std(axis=0).mean():.3f}, spread of the mean action {spread:.3f}"
    if agent.config.get("coupling") == "ot":
        line += f", predicted {predicted_spread(reference, np.asarray(batch['actions']), agent.cfg.epsilon):.3f}"
    print(line)


def relative_spread(samples: Float[np.ndarray, "n m d"], reference: Float[np.ndarray, "n m d"]) -> float:
    """Returns the spread of the mean action over the m states, relative to the reference's."""
    own, whole = (np.linalg.norm(x.mean(axis=0) - x.mean(axis=(0, 1))) for x in (samples, reference))
    return float(own / whole)


def predicted_spread(samples: Float[np.ndarray, "n m d"], actions: Float[np.ndarray, "m d"], epsilon: Number) -> float:
    """Predicts the relative spread of the mean action of a flow whose noise is coupled by a plan over many states.

    With M the mean of ‖z − a‖², the plan ∝ exp(2 z·a / (ε M)) makes noise follow the action with slope k = 2 / (ε M)
    at every state. Where the mean action is μ, training has noise around k (μ − E μ), but acting has noise around 0. A
    flow maps noise to actions with a slope of about Σ^½, where Σ is the covariance of its samples at that state, so
    actions are off by −k Σ^½ (μ − E μ). Holds to first order in k, for normal actions, without the condition's term.

    Args:
        samples: unbiased actions, n for each of m states.
        actions: of the data.
        epsilon: relative to M, as in `utils.coupling.solve_plan`.
    """
    k = 2 / (epsilon * (actions.shape[1] + np.square(actions).sum(axis=1).mean()))
    means = samples.mean(axis=0)
    spread = samples - means
    values, vectors = np.linalg.eigh(np.einsum("nij,nik->ijk", spread, spread) / len(samples))
    means = means - means.mean(axis=0)
    along = np.einsum("ijk,ij->ik", vectors, means)  # In the eigenbasis of Σ.
    return float(1 - k * np.sum(np.sqrt(np.maximum(values, 0)) * along**2) / np.sum(means**2))


def diagnose_values(agent: Any, batch: dict[str, Any]) -> None:
    """Prints how close advantages from k flow samples are to those from 64."""
    cfg = agent.cfg
    q = agent.apply("critic", batch["observations"], batch["actions"]).mean(axis=0)

    @functools.partial(jax.jit, static_argnums=1)
    def advantages(key: PRNGKeyArray, k: int) -> Float[Array, " m"]:
        observations, actions = agent.candidates(batch["observations"], key, k)
        return q - agent.apply("critic", observations, actions).mean(axis=(0, 1))

    def marginal(a: Float[Array, " m"]) -> Float[Array, " m"]:
        return tilted_marginal(a, batch["valid"], cfg.lam, cfg.w_max)

    reference = advantages(stream_key(0, Stream.STUDY, 1), 64)
    for k in (1, 2, 4, 8, 16):
        sampled = advantages(stream_key(0, Stream.STUDY, 2), k)
        correlation = np.corrcoef(sampled, reference)[0, 1]
        distance = 0.5 * jnp.abs(marginal(sampled) - marginal(reference)).sum()
        print(f"  {k} value samples: correlation of A {correlation:.3f}, p moves by {distance:.3f} in total variation")


def load(directory: str) -> tuple[Any, dict[str, Any], int]:
    """Loads the newest agent of a run, its settings, and its step.

    Raises:
        UserError: the directory is not a run's, or its agent has no flow with a critic.
    """
    agent, settings, step = load_run(directory)
    if not {"critic", "flow"} <= set(agent.params):
        raise UserError(f"{directory}: the agent has no flow with a critic; choose another run")
    return agent, settings, step


def diagnose_between(directories: list[str]) -> None:
    """Prints the swap between runs, and each one's flow samples.

    Raises:
        UserError: fewer than two runs, or their tasks or networks differ.
    """
    loaded = {directory: load(directory) for directory in directories}
    if len(loaded) < 2:
        raise UserError("--between needs at least two runs")
    first, settings, _ = loaded[directories[0]]
    for directory, (agent, others, _) in loaded.items():
        # A flow and a critic must have the same task and networks.
        for name in ("env_name", "sparse"):
            if others[name] != settings[name]:
                raise UserError(f"{directory} has {name} {others[name]}, {directories[0]} {settings[name]}")
        shapes = [jax.tree.map(jnp.shape, {k: a.params[k] for k in ("flow", "critic")}) for a in (first, agent)]
        if shapes[0] != shapes[1]:
            raise UserError(f"the networks of {directory} and {directories[0]} differ")
    agents = {number: agent for number, (agent, _, _) in enumerate(loaded.values(), 1)}
    batch = windows(first, settings)
    key = stream_key(0, Stream.STUDY, 3)
    samples = {n: np.asarray(agent.candidates(batch["observations"], key, 128)[1]) for n, agent in agents.items()}
    for (number, agent), (directory, (_, _, step)) in zip(agents.items(), loaded.items(), strict=True):
        print(f"{number}: {directory}, step {step}")
        diagnose_samples(agent, samples[number], samples[1], batch)
    print(f"{FLAGS.episodes} episodes of {settings['env_name']} with seed {FLAGS.seed}")
    with Evaluator(functools.partial(make_env, settings["env_name"]), first.config.horizon_length) as evaluator:
        diagnose_swap(agents, evaluator)


def main(argv: Sequence[str]) -> None:
    """Diagnoses each run."""
    directories = [argument for argument in argv[1:] if not argument.startswith("--")]
    parse([argument for argument in argv if argument not in directories], FLAGS)
    if not directories:
        raise UserError("name at least one directory of a run: python -m experiments.diagnose exp/…/sd0")
    if FLAGS.between:
        diagnose_between(directories)
        return
    for directory in directories:
        agent, settings, _ = load(directory)
        steps = checkpoints.valid_steps(checkpoint_dir(directory))[-2:]
        by_step = {step: load_run(directory, step)[0] for step in steps}
        print(f"{directory}, {FLAGS.episodes} episodes of {settings['env_name']} with seed {FLAGS.seed}")
        with Evaluator(functools.partial(make_env, settings["env_name"]), agent.config.horizon_length) as evaluator:
            diagnose_swap(by_step, evaluator)
            diagnose_average(by_step, evaluator)
        if "lam" in agent.hyper:
            diagnose_values(agent, windows(agent, settings))


if __name__ == "__main__":
    run_main(main)
