"""Training from a config: offline RL, then online RL."""

import functools
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np

from envs.tasks import make_env, parse_task
from utils.data.batches import example_batch
from utils.devices import BATCH, RUNS, Layout, pick_devices, run_of
from utils.errors import UserError
from utils.observations import map_parts, shapes
from utils.output.intervals import wilson_interval
from utils.output.loggers import read_csv
from utils.rollout.evaluator import Evaluator
from utils.rollout.policy import decision_seconds, evaluation_policy
from utils.rollout.video import VideoUnavailable, record
from utils.run import checkpoints
from utils.run.agent_files import check_agent
from utils.run.config import CommonConfig, RunConfig
from utils.run.dataset import Dataset, load_dataset
from utils.run.directory import RunDirectory
from utils.run.evaluation_queue import EvaluationQueue
from utils.run.loading import load_base, load_run, restore_agent, warm_start
from utils.run.loop import OnCheckpoint, TrainingLoop
from utils.run.memory import check_memory, needed_memory
from utils.run.metrics import MetricLoggers, OnMetrics
from utils.run.phases import OfflinePhase, OnlinePhase, Phase, TrainState
from utils.run.runs import Runs
from utils.run.update_loop import UpdateLoop
from utils.system.jax_setup import matmul_precision, quick_compilation
from utils.system.signals import PreemptionGuard
from utils.trees import tree_slice, tree_stack

Saved = Sequence[Mapping[str, Any]]  # checkpoints of the active runs, empty for new runs


@dataclass(frozen=True)
class TrainResult:
    """Result of a config's runs.

    Attributes:
        directories: of the runs, in the order of --vary's values and the seeds.
    """

    directories: tuple[Path, ...]

    @property
    def directory(self) -> Path:
        """The first run's directory."""
        return self.directories[0]

    @functools.cached_property
    def agent(self) -> Any:
        """The first run's agent, from its newest checkpoint."""
        return load_run(self.directory)[0]


def train(
    config: RunConfig,
    *,
    data: dict[str, np.ndarray] | None = None,
    on_metrics: OnMetrics | None = None,
    on_checkpoint: OnCheckpoint | None = None,
) -> TrainResult:
    """Trains every run of a config (seeds × varied values) in one program; resumes existing runs.

    Args:
        config: settings of the runs.
        data: the arrays of `envs.gym_dataset.dataset_from_arrays`, in place of a file.
        on_metrics: called with every row after it is written: (run's directory, CSV file, step, row).
        on_checkpoint: called with every checkpoint after it is written: (run's directory, step, agent on the host).

    Raises:
        UserError: invalid settings or data; the message is one line that says what to do.
        Diverged: losses, parameters or actions of a run are not finite; all other runs were trained to their ends.
        Interrupted: SIGTERM or SIGINT; the runs are saved, and the same call resumes them.
    """
    config.validate()
    devices = pick_devices(config.devices)
    with Runs(config, parse_task(config.env_name), in_memory=data is not None) as runs, ExitStack() as stack:
        stack.enter_context(matmul_precision(config.matmul_precision))
        result = TrainResult(tuple(run.path for run in runs.all))
        if not (runs.active or runs.unconfirmed):
            return result
        dataset = load_dataset(config, runs.task, runs.agent_config.horizon_length, runs.sparse, data)
        stack.callback(dataset.close)
        if runs.unconfirmed:
            runs.confirm(dataset.record | start_record(runs, dataset))
        if not runs.active:
            return result
        agents = create_agents(runs, dataset)
        if config.start_from:
            agents, dataset.record["start"] = start_agents(runs, agents, dataset)
        state, saved = restore_runs(runs, agents, dataset)
        check_phase(runs, state.step, saved)
        updates = UpdateLoop(runs.keys(), config.dataset_placement, layout_of(runs, devices))
        updates.set_data(dataset.at(state.step))
        state = TrainState(state.step, updates.place(state.agents))
        guard = stack.enter_context(PreemptionGuard())
        program = compile_updates(updates, state.agents) if state.step < config.offline_steps else 0
        online = config.online_steps, dataset.observation()
        check_memory(needed_memory(updates, state.agents, config, *online, program), updates)
        phases: list[Phase] = [OfflinePhase(config.offline_steps, updates, dataset)]
        if config.online_steps:
            make, first, start = env_maker(config), config.offline_steps, config.start_training
            own = saved if state.step > first else ()
            phases += [OnlinePhase(runs, updates, make, dataset.observation(), guard, first, start, own)]
        run_phases(runs, state, saved, phases, dataset, guard, on_metrics, on_checkpoint)
        return result


def create_agents(runs: Runs, dataset: Dataset) -> Any:
    """Returns a new agent of each active run, stacked; a run's seed fixes its initialisation and all that it draws.

    Raises:
        UserError: the agent's file is not sound, or values of --vary need different networks.
    """
    example, agents = example_batch(dataset.at(0), runs.agent_config.horizon_length), []
    check_agent(runs.module, runs.agent_config, example, runs.config.agent)
    creators: dict[tuple, Callable[..., Any]] = {}
    for run, key in zip(runs.active, runs.keys(), strict=True):
        create = functools.partial(runs.module.Agent.create, config=run.spec.config)
        program = jax.jit(create, compiler_options=quick_compilation())
        creator = creators.setdefault(tuple(run.spec.varied.items()), program)
        agents.append(creator(key, example))
    if len({jax.tree.structure(agent) for agent in agents}) > 1:
        raise UserError(f"--vary={runs.config.vary}: the values need different networks; give each its own command")
    return tree_stack(agents)


def start_agents(runs: Runs, agents: Any, dataset: Dataset) -> tuple[Any, dict[str, Any]]:
    """Returns the agents that --start_from asks for, and the record of that run."""
    assert isinstance(runs.config, RunConfig) and runs.config.start_from
    path = Path(runs.config.start_from).expanduser().resolve()
    records = [run.read_flags().get("dataset", {}).get("start", {}) for run in runs.active]
    same = all(start.get("path") and Path(start["path"]).resolve() == path for start in records)
    if same and all(checkpoints.valid_steps(run.checkpoints) for run in runs.active):
        return agents, records[0]  # Existing runs resume, whatever has become of that run.
    agents, start = warm_start(agents, path, dataset.observation())
    return agents, start | {"path": str(path)}


def start_record(runs: Runs, dataset: Dataset) -> dict[str, Any]:
    """Returns the entry 'start' that finished runs have recorded of --start_from."""
    assert isinstance(runs.config, RunConfig)
    if not runs.config.start_from:
        return {}
    path, config = Path(runs.config.start_from).expanduser().resolve(), runs.agent_config
    chunk_dim = dataset.at(0)["actions"].shape[1] * config.horizon_length
    start = load_base(path, config, chunk_dim, dataset.observation())[1]
    return {"start": start | {"path": str(path)}}


def restore_runs(runs: Runs, agents: Any, dataset: Dataset) -> tuple[TrainState, Saved]:
    """Writes flags.json of the active runs, and returns them as of their newest common checkpoint.

    Args:
        runs: of the command. agents: new ones, stacked. dataset: of the runs.

    Raises:
        UserError: existing runs are of another dataset or longer, or their checkpoints do not fit the agents.
    """
    runs.check_dataset(dataset.record)
    step, saved = checkpoints.load_common([run.checkpoints for run in runs.active]) or (0, [])
    if step > runs.config.total_steps:
        raise UserError(f"{runs.active[0].path} is at step {step} already; give {step} steps or more in all")
    if saved:
        agents = tree_stack(
            [
                restore_agent(tree_slice(agents, index), state["agent"], run.path, runs.config.agent)
                for index, (run, state) in enumerate(zip(runs.active, saved, strict=True))
            ]
        )
        print(f"resuming at step {step}")
    widths = shapes(dataset.observation()) | {"chunk_dim": agents.config.action_dim, "nfe": agents.nfe}
    for run in runs.active:
        run.write_flags(run.settings | widths | {"data_card": dataset.card.record()}, dataset.record)
    return TrainState(step, agents), saved


def layout_of(runs: Runs, devices: Sequence[jax.Device]) -> Layout:
    """Returns the places of the active runs on the devices that --devices names, and prints them.

    Raises:
        UserError: --shard_batch, and the devices cannot have equal parts of a batch.
    """
    layout = Layout.spread(len(runs.active), devices, BATCH if runs.config.shard_batch else RUNS)
    if (size := runs.agent_config.batch_size) % layout.parts:
        advice = f"use a multiple of {layout.parts}, or other --devices"
        raise UserError(f"--shard_batch: {layout.parts} devices cannot share --agent.batch_size={size}; {advice}")
    if runs.config.shard_batch and layout.axis != BATCH:
        print("--shard_batch has no effect: there is one device")
    if line := layout.describe(len(devices)):
        print(line)
    return layout


def compile_updates(updates: UpdateLoop, agents: Any) -> int:
    """Compiles the update, and prints how long it took; returns its bytes beside its inputs."""
    print("compiling the update …", end=" ", flush=True)
    clock = time.perf_counter()
    program = updates.compile(agents)
    print(f"{time.perf_counter() - clock:.1f} s", flush=True)
    return program


def check_phase(runs: Runs, step: int, saved: Saved) -> None:
    """Checks that the online phase of existing runs starts where that of the config does.

    Raises:
        UserError: the steps of the phases are not those of the existing runs.
    """
    if not saved:
        return
    first, online = runs.config.phase_ends[0], "explorer" in saved[0]
    if (online and step < first) or (not online and step > first):
        raise UserError(f"{runs.active[0].path} is at step {step}, in another phase; give the same steps as before")


def env_maker(config: CommonConfig) -> Callable[..., gymnasium.Env]:
    """Returns a picklable function that makes the config's environment; it takes the keywords of `make_env`."""
    return functools.partial(make_env, config.env_name, max_episode_steps=config.max_episode_steps)


def run_phases(
    runs: Runs,
    state: TrainState,
    saved: Saved,
    phases: Sequence[Phase],
    dataset: Dataset,
    guard: PreemptionGuard,
    on_metrics: OnMetrics | None,
    on_checkpoint: OnCheckpoint | None,
) -> None:
    """Trains the active runs through all phases, records their videos and marks them as finished.

    Raises:
        Diverged: a run has diverged; all others have finished.
    """
    config, horizon = runs.config, runs.agent_config.horizon_length
    patience: dict[str, Any] = {"name": runs.task.name, "timeout": config.env_timeout}
    evaluator = Evaluator(env_maker(config), horizon, num_workers=config.eval_workers, **patience)
    with (
        MetricLoggers(runs, [own["csv"] for own in saved], state.step, on_metrics) as logs,
        EvaluationQueue(evaluator, runs, logs, guard.check) as evaluations,
    ):
        if saved:
            actors = phases[-1].actors
            evaluations.load_state_dict(
                saved, state.step, lambda step: run_of(actors(TrainState(step, state.agents)), 0)
            )
        state = TrainingLoop(runs, logs, evaluations, guard, on_checkpoint).run(state, phases)
    seconds = decision_seconds(state.agents, map_parts(np.stack, [dataset.observation()]))
    for index in runs.alive:
        if config.video_episodes:
            record_final_policy(runs, state, index, guard)
        runs.active[index].write_summary(
            {"step": state.step, "milliseconds_per_action": 1000 * float(np.median(seconds)) / horizon}
        )
        print_result(runs.active[index], config)
    runs.raise_divergences()


def print_result(run: RunDirectory, config: CommonConfig) -> None:
    """Prints a finished run's last evaluation, and where its files are."""
    print(f"finished: {run.path}")
    rows = read_csv(run.path / "eval.csv")
    if rows:
        last = {name: values[-1] for name, values in rows.items()}
        episodes = int(last.get("episodes", config.eval_episodes))  # Files of older versions may lack columns.
        result, rate = f"return {last['return_mean']:.4g}", last.get("success_rate", np.nan)
        if np.isfinite(rate):
            low, high = wilson_interval(rate, episodes)
            result = f"success {rate:.2f} [{low:.2f}, {high:.2f}], {result}"
        if np.isfinite(score := last.get("normalized_score", np.nan)):
            result += f", normalised score {score:.3f}"
        print(f"  result      {result} ({episodes} episodes)")
        print(f"  curve       {run.path / 'learning_curve.png'}")
    for video in sorted((run.path / "videos").glob("*")):
        print(f"  video       {video}")
    print(f"  checkpoint  {checkpoints.path_of(run.checkpoints, config.total_steps)}")
    if rows:
        print(f"  evaluate    python -m experiments.evaluate {shlex.quote(str(run.path))} --episodes=100", flush=True)


def record_final_policy(runs: Runs, state: TrainState, index: int, guard: PreemptionGuard) -> None:
    """Records a run's video."""
    config, run = runs.config, runs.active[index]
    size = runs.task.video_size
    make = functools.partial(env_maker(config), render_mode="rgb_array", width=size, height=size)
    policy, seed = evaluation_policy(run.spec.seed, state.agents, index, state.step)
    horizon, file = runs.agent_config.horizon_length, runs.video_path(run)
    limits: dict[str, Any] = {"timeout": config.env_timeout, "check": guard.check}
    try:
        record(make, policy, config.video_episodes, seed, file, horizon, frame_skip=config.video_frame_skip, **limits)
    except VideoUnavailable as reason:
        print(f"no video: {reason}", file=sys.stderr)
