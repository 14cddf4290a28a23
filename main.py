"""Offline RL on one task: python main.py --agent=agents/otql.py --env_name=cube-double-play-singletask-task2-v0"""

import functools
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax.serialization import from_state_dict, to_state_dict

from envs import datasets as env_datasets
from envs.tasks import Task, make_env, parse_task
from utils import checkpoints, cli, runs
from utils.datasets import ShardRotation, example_batch, prepare
from utils.errors import UserError
from utils.evaluation import Evaluator, WorkerError
from utils.files import atomic_write_text
from utils.logging import CsvLogger, ProgressBar, WandbLogger
from utils.plotting import learning_curve
from utils.training import SEGMENT, Trainer, act, lane, stack
from utils.video import VideoUnavailable, record

FLAGS = flags.FlagValues()


def _flag(kind: str, name: str, default: Any, text: str, **bounds: Any) -> None:
    getattr(flags, f"DEFINE_{kind}")(name=name, default=default, help=text, flag_values=FLAGS, **bounds)


_flag("string", "agent", "agents/otql.py", "Agent file; --agent.<field>=<value> changes a setting of it.")
_flag("string", "env_name", "scene-play-singletask-task1-v0", "OGBench single task, or gym:<Gymnasium id>.")
_flag("string", "preset", "paper", "paper: published settings of the domain; cpu: small networks, short runs; none.")
_flag("integer", "seed", 0, "First seed.", lower_bound=0, upper_bound=2**31)
_flag("integer", "num_seeds", 1, "Seeds trained side by side in one program.", lower_bound=1)
_flag("string", "vary", None, "Lanes over a real-valued setting, for example agent.lam=0.2,0.4,1.")
_flag("integer", "offline_steps", 1_000_000, "Updates.", lower_bound=1)
_flag("integer", "log_interval", 5_000, "Updates between rows of train.csv.", lower_bound=1)
_flag("integer", "eval_interval", 50_000, "Updates between evaluations; 0: only at the end.", lower_bound=0)
_flag("integer", "save_interval", 50_000, "Updates between checkpoints; 0: only at the end.", lower_bound=0)
_flag("integer", "eval_episodes", 50, "Episodes an evaluation.", lower_bound=1)
_flag("integer", "eval_workers", None, "Processes that step environments; default: one a core.", lower_bound=1)
_flag("integer", "video_episodes", 0, "Episodes of the final policy in videos/.", lower_bound=0)
_flag("integer", "video_frame_skip", 3, "Environment steps a frame.", lower_bound=1)
_flag("string", "save_dir", "exp", "Runs are kept in <save_dir>/<run_group>/<env_name>/<agent>/sd<seed>.")
_flag("string", "run_group", "debug", "Name of a group of runs.")
_flag("enum", "wandb", "disabled", "Weights & Biases.", enum_values=["online", "offline", "disabled"])
_flag("integer", "horizon_length", None, "Actions in a chunk; default: the preset's.", lower_bound=1)
_flag("bool", "sparse", None, "Rewards -1 until solved, then 0; default: the preset's.")
_flag("string", "dataset", None, "An .npz file to use as the dataset; needed for gym: tasks.")
_flag("enum", "dataset_source", "auto", "Where the dataset comes from.", enum_values=list(env_datasets.SOURCES))
_flag("string", "dataset_dir", env_datasets.DEFAULT_DATASET_DIR, "Where datasets are.")
_flag("integer", "dataset_episodes", None, "Episodes to collect; default: the official number.", lower_bound=1)
_flag("enum", "dataset_placement", "auto", "Memory that holds it.", enum_values=["auto", "device", "host"])
_flag("string", "ogbench_dataset_dir", None, "Directory of .npz shards, used in turn.")
_flag("integer", "dataset_replace_interval", 1_000, "Updates before the next shard.", lower_bound=1)


class Run:
    """One lane's directory, logs and checkpoints."""

    def __init__(self, spec: runs.Lane, settings: dict[str, Any]):
        self.spec = spec
        self.settings = settings | {"seed": spec.seed, "config": spec.config.to_dict(), "varied": spec.varied}
        self.files = runs.RunFiles(spec.directory, self.settings)
        self.checkpoints = runs.checkpoint_dir(spec.directory)

    def open_logs(self, positions: dict[str, int]) -> None:
        """Opens the CSV files at the positions of a checkpoint, or anew."""
        root = self.spec.directory
        self.csv = {name: CsvLogger(root / f"{name}.csv", positions.get(name)) for name in ("train", "eval", "timing")}
        group, name = FLAGS.run_group, f"{root.parent.name}-{FLAGS.env_name}-{root.name}"
        self.wandb = WandbLogger(FLAGS.wandb, root, group, name, self.settings)

    def log(self, name: str, step: int, row: dict[str, float]) -> None:
        """Appends a row to <name>.csv."""
        # Wall-clock times have a file of their own: train.csv and eval.csv must resume to the same bytes.
        self.csv[name].log(step, row)
        self.wandb.log(step, {f"{name}/{key}": value for key, value in row.items()})

    def save(self, step: int, agent: Any, evaluated: bool) -> None:
        """Writes a checkpoint of everything that the run needs to go on."""
        positions = {name: self.csv[name].position() for name in self.csv}
        state = {"agent": to_state_dict(jax.device_get(agent)), "csv": positions, "evaluated": evaluated}
        checkpoints.save(self.checkpoints, step, state)


def check_together(lanes: list[Run]) -> None:
    """Refuses to train side by side what is not at the same step: starting over would overwrite what is further on.

    Raises:
        UserError: names the run that is further on and one that is not.
    """
    steps = [set(checkpoints.saved_steps(run.checkpoints)) for run in lanes]
    if set.intersection(*steps) or not any(steps):
        return
    # Killed between the first saves of two lanes: no run has anything but that one checkpoint.
    together = all(run.files.begun() for run in lanes) and not any(run.files.finished(0) for run in lanes)
    if together and len(set.union(*steps)) == 1:
        return
    newest = [max(own, default=0) for own in steps]
    ahead, behind = (lanes[newest.index(pick(newest))].spec.directory for pick in (max, min))
    raise UserError(
        f"{ahead} is at step {max(newest)} and {behind} at step {min(newest)}, so they cannot go on side by side; "
        "give each its own command (--seed, --num_seeds=1, one value of --vary), or use another --run_group"
    )


def load_data(task: Task, config: Any, sparse: bool) -> tuple[dict[str, np.ndarray], ShardRotation | None, dict]:
    """The prepared dataset (the first shard of several), the rotation of shards if there are, and what it is."""
    horizon = config.horizon_length

    def prepared(raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        env_datasets.check_horizon(raw, horizon)
        return prepare(raw, horizon, terminates=task.kind == "gym")

    rotation = None
    if FLAGS.ogbench_dataset_dir and FLAGS.dataset:
        raise UserError("--dataset and --ogbench_dataset_dir exclude each other; give one of them")
    if FLAGS.ogbench_dataset_dir:
        paths = env_datasets.list_shards(FLAGS.ogbench_dataset_dir)
        rotation = ShardRotation(
            paths, lambda path: prepared(env_datasets.load_shard(task, path, sparse)), FLAGS.dataset_replace_interval
        )
        data, name, origin = rotation.at(0), FLAGS.ogbench_dataset_dir, f"{len(paths)} shards"
    else:
        raw, _, info = env_datasets.load_dataset(
            task,
            source=FLAGS.dataset_source,
            dataset_dir=FLAGS.dataset_dir,
            dataset_path=FLAGS.dataset,
            sparse=sparse,
            collect_episodes=FLAGS.dataset_episodes,
            with_val=False,
        )
        data, name, origin = prepared(raw), str(info.path), info.origin
    description = {
        "file": Path(name).name,
        "episodes": int(data["terminals"].sum()),
        "transitions": int((data["terminals"] == 0).sum()),
        "checksum": functools.reduce(
            lambda crc, name: zlib.crc32(data[name], crc), ("observations", "actions", "rewards", "masks"), 0
        ),
    } | ({"shards": len(rotation.paths)} if rotation else {})
    print(f"dataset: {name} ({origin}), {description['episodes']} episodes, {description['transitions']} transitions")
    return data, rotation, description


def initial_agents(module: Any, lanes: list[runs.Lane], data: dict[str, np.ndarray]) -> Any:
    """Stacks a new agent for each lane; a lane's seed fixes its initialisation and all that it draws."""
    example, creators = example_batch(data, lanes[0].config.horizon_length), {}
    for spec in lanes:
        create = functools.partial(module.Agent.create, config=spec.config)
        creators.setdefault(tuple(spec.varied.items()), jax.jit(create))
    agents = [creators[tuple(spec.varied.items())](jax.random.PRNGKey(spec.seed), example) for spec in lanes]
    if len({jax.tree.structure(agent) for agent in agents}) > 1:
        raise UserError(
            f"--vary={FLAGS.vary}: these values differ in the networks they need; give each its own command"
        )
    return stack(agents)


def evaluate(agents: Any, lanes: list[Run], evaluator: Evaluator, step: int, signals: cli.Signals) -> None:
    """Evaluates every lane and appends to its eval.csv; noise and initial states are functions of (seed, step)."""
    with ProgressBar(FLAGS.eval_episodes * len(lanes), description="evaluation", unit=" episodes") as bar:

        def progress(*_: int) -> None:
            bar.update(1)
            signals.check()

        results = []
        for index, run in enumerate(lanes):
            policy, seed = lane_policy(agents, index, run.spec.seed, step)
            try:
                results.append(evaluator.evaluate(policy, FLAGS.eval_episodes, seed, progress))
            except FloatingPointError as error:
                advice = "start again with a smaller --agent.lr in another --run_group"
                raise UserError(f"{run.spec.directory}, step {step}: {error}; {advice}") from error
            except WorkerError as error:
                report = run.spec.directory / "worker_error.txt"
                atomic_write_text(report, f"{error}\n")
                raise UserError(f"evaluation failed, {str(error).splitlines()[0]} (all of it: {report})") from error
    for run, result in zip(lanes, results, strict=True):
        row = {key: value for key, value in result.items() if np.ndim(value) == 0}
        run.log("eval", step, {"episodes": FLAGS.eval_episodes} | row)
        learning_curve(run.spec.directory, run.spec.directory / "learning_curve.png", title=FLAGS.env_name)
        figures = ", ".join(f"{key} {value:.3g}" for key, value in row.items())
        print(f"step {step}, {run.spec.directory.parent.name}/{run.spec.directory.name}: {figures}", flush=True)


def lane_policy(agents: Any, index: int, seed: int, step: int) -> tuple[Any, int]:
    """One lane's policy for the evaluator, and the seed of the episodes: functions of (seed, step)."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.PRNGKey(seed), 1), step)
    episode_seed = int(np.random.SeedSequence((seed, step)).generate_state(1)[0])
    return lambda observations, episodes, chunks: act(agents, index, observations, key, episodes, chunks), episode_seed


def next_boundary(step: int, intervals: Sequence[int]) -> int:
    """The first step after `step` at which a segment ends or something is due."""
    return min((step // interval + 1) * interval for interval in (SEGMENT, *intervals) if interval)


def train(agents: Any, lanes: list[Run], step: int, evaluated: bool, data: Any, rotation: Any, evaluator: Any) -> Any:
    """Trains all lanes from `step` to the end, with logs, evaluations and checkpoints on the way."""
    signals, total = cli.Signals(), FLAGS.offline_steps
    keys = np.stack([jax.random.fold_in(jax.random.PRNGKey(run.spec.seed), 2) for run in lanes])
    trainer = Trainer(keys, FLAGS.dataset_placement)
    trainer.set_data(rotation.at(step) if rotation else data)
    intervals = (FLAGS.log_interval, FLAGS.eval_interval, FLAGS.save_interval)
    shard_interval = FLAGS.dataset_replace_interval if rotation else 0

    def due(interval: int) -> bool:
        return step == total or (interval and step and step % interval == 0)

    def save(evaluated: bool) -> None:
        for index, run in enumerate(lanes):
            run.save(step, lane(agents, index), evaluated)

    clock, bar = time.perf_counter(), ProgressBar(total, initial=step)
    try:
        while True:
            if due(FLAGS.eval_interval) and not evaluated:
                evaluate(agents, lanes, evaluator, step, signals)
                clock, evaluated = time.perf_counter(), True
            if due(FLAGS.save_interval):
                save(evaluated)
            if step == total:
                return agents
            signals.check()
            if rotation and step % shard_interval == 0:
                trainer.set_data(rotation.at(step))
            until = min(next_boundary(step, (*intervals, shard_interval)), total)
            agents, info = trainer.train(agents, step, until - step)
            info = jax.device_get(info)
            done, step, evaluated = until - step, until, False
            bar.update(done, {key: value[0] for key, value in info.items() if key.endswith("loss")})
            if due(FLAGS.log_interval):
                seconds, clock = time.perf_counter() - clock, time.perf_counter()
                for index, run in enumerate(lanes):
                    run.log("train", step, {key: float(value[index]) for key, value in info.items()})
                    run.log("timing", step, {"seconds": seconds})
    except cli.Interrupted:
        save(evaluated)
        raise
    finally:
        bar.close()
        signals.release()


def video_path(run: Run) -> Path:
    """Where the video of the final policy goes."""
    return run.spec.directory / "videos" / f"step_{FLAGS.offline_steps}.mp4"


def milliseconds_per_action(agents: Any, observation: np.ndarray, horizon: int) -> float:
    """Median time to choose one environment action: a chunk for one observation [o] takes `horizon` times as long."""
    seconds, arguments = [], (observation[None], np.zeros(1, np.int32), np.zeros(1, np.int32))
    for _ in range(21):  # The first one compiles.
        clock = time.perf_counter()
        jax.block_until_ready(act(agents, 0, arguments[0], jax.random.PRNGKey(0), *arguments[1:]))
        seconds.append(time.perf_counter() - clock)
    return 1000 * float(np.median(seconds[1:])) / horizon


def finish(agents: Any, lanes: list[Run], observation: np.ndarray) -> None:
    """Records videos and marks the runs as finished."""
    step, config = FLAGS.offline_steps, lanes[0].spec.config
    cost = {"milliseconds_per_action": milliseconds_per_action(agents, observation, config.horizon_length)}
    for index, run in enumerate(lanes):
        if FLAGS.video_episodes:
            policy, episode_seed = lane_policy(agents, index, run.spec.seed, step)
            try:
                record(
                    functools.partial(make_env, FLAGS.env_name, render_mode="rgb_array", width=320, height=320),
                    policy,
                    FLAGS.video_episodes,
                    episode_seed,
                    video_path(run),
                    run.spec.config.horizon_length,
                    frame_skip=FLAGS.video_frame_skip,
                )
            except VideoUnavailable as reason:
                print(f"no video: {reason}", file=sys.stderr)
        run.files.finish({"step": step} | cost)
        print(f"finished: {run.spec.directory}")


def plan(overrides: dict[str, Any]) -> tuple[Task, Any, bool, list[Run]]:
    """The task, the agent's module, whether rewards are sparse, and the runs that are not finished yet, all checked."""
    task, module = parse_task(FLAGS.env_name), runs.load_agent(FLAGS.agent)
    given = {name: FLAGS[name].value for name in ("horizon_length", "sparse") if FLAGS[name].value is not None}
    if given.keys() & overrides.keys():
        raise UserError("--horizon_length and --agent.horizon_length are one setting; give one of them")
    config, sparse, note = runs.resolve_config(module, task.domain, FLAGS.preset, overrides | given)
    agent = Path(FLAGS.agent).stem
    root = Path(FLAGS.save_dir).expanduser() / FLAGS.run_group / FLAGS.env_name.replace("/", "_").replace(":", "_")
    seeds = range(FLAGS.seed, FLAGS.seed + FLAGS.num_seeds)
    settings = {"env_name": FLAGS.env_name, "agent": agent, "sparse": sparse, "domain": task.domain, "preset": note}
    # Two agent files of one name share a directory, but never a run.
    settings["agent_module"] = module.__name__ if module.__name__.startswith("agents.") else module.__file__
    settings["flags"] = FLAGS.flag_values_dict()
    lanes = [Run(spec, settings) for spec in runs.make_lanes(config, seeds, FLAGS.vary, root, agent)]
    # A finished run is taken up again for a video that it lacks.
    finished = [
        run
        for run in lanes
        if run.files.finished(FLAGS.offline_steps) and not (FLAGS.video_episodes and not video_path(run).exists())
    ]
    unfinished = [run for run in lanes if run not in finished]
    if finished:
        names = ", ".join(str(run.spec.directory) for run in finished)
        print(f"finished before: {names}{'' if unfinished else '; nothing to do'}")
    if unfinished:
        check_together(unfinished)
        print(f"{agent} on {FLAGS.env_name}; {note}; sparse={sparse}")
        print("\n".join(f"  {key} = {value}" for key, value in sorted(config.items())), flush=True)
    return task, module, sparse, unfinished


def restore(agents: Any, lanes: list[Run]) -> tuple[Any, int, bool]:
    """The agents at their newest common checkpoint, its step, and whether that was evaluated; opens the logs there."""
    restored = checkpoints.load_common([run.checkpoints for run in lanes])
    step, states = restored or (0, [{"csv": {}, "evaluated": False}] * len(lanes))
    if step > FLAGS.offline_steps:
        raise UserError(f"{lanes[0].spec.directory} is at step {step} already; give --offline_steps={step} or more")
    if restored:
        agents = stack([from_state_dict(lane(agents, index), state["agent"]) for index, state in enumerate(states)])
        print(f"resuming at step {step}")
    for run, state in zip(lanes, states, strict=True):
        run.open_logs(state["csv"])
    return agents, step, all(state["evaluated"] for state in states)


def main(argv: Sequence[str]) -> None:
    """Trains, evaluates and records; resumes what was begun before."""
    task, module, sparse, lanes = plan(cli.parse(argv, FLAGS))
    if not lanes:
        return
    config = lanes[0].spec.config
    data, rotation, dataset = load_data(task, config, sparse)
    agents = initial_agents(module, [run.spec for run in lanes], data)
    widths = {"observation_dim": data["observations"].shape[1], "chunk_dim": agents.config.action_dim}
    for run in lanes:
        run.files.settle(run.settings | {"dataset": dataset, "nfe": agents.nfe} | widths)
    agents, step, evaluated = restore(agents, lanes)
    make = functools.partial(make_env, FLAGS.env_name)
    with Evaluator(make, config.horizon_length, num_workers=FLAGS.eval_workers) as evaluator:
        agents = train(agents, lanes, step, evaluated, data, rotation, evaluator)
        finish(agents, lanes, data["observations"][0])
    if rotation:
        rotation.close()


if __name__ == "__main__":
    cli.run(main)
