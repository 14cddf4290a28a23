"""Offline RL, then online: python main.py --agent=agents/otql.py --env_name=cube-double-play-singletask-task2-v0"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from envs import datasets as env_datasets
from envs.tasks import Task, make_env, parse_task
from utils import checkpoints, cli
from utils.datasets import ShardRotation, describe, first_observation, prepare
from utils.errors import UserError
from utils.online import Online
from utils.program import Program, define_flag, define_flags
from utils.starts import go_on_from
from utils.training import Trainer

FLAGS = flags.FlagValues()
define_flags(FLAGS, env_name="scene-play-singletask-task1-v0", log=5_000, evaluate=50_000, save=50_000)
_flag = functools.partial(define_flag, FLAGS)
_flag("integer", "offline_steps", 1_000_000, "Updates.", lower_bound=1)
_flag("integer", "online_steps", 0, "Environment steps after them.", lower_bound=0)
_flag("integer", "start_training", 5_000, "Environment steps before the first online update.", lower_bound=0)
_flag("integer", "utd_ratio", 1, "Updates an environment step.", lower_bound=1)
_flag("bool", "balanced_sampling", False, "Online: half of a batch from each of dataset and experience.")
_flag("string", "start_from", None, "Directory of a run to start from: its agent, or of another agent its flow.")
_flag("string", "dataset", None, "An .npz file to use as the dataset; needed for gym: and robot: tasks.")
_flag("enum", "dataset_source", "auto", "Where the dataset comes from.", enum_values=list(env_datasets.SOURCES))
_flag("string", "dataset_dir", env_datasets.DEFAULT_DATASET_DIR, "Where datasets are.")
_flag("integer", "dataset_episodes", None, "Episodes to collect; default: the official number.", lower_bound=1)
_flag("enum", "dataset_placement", "auto", "Memory that holds it.", enum_values=["auto", "device", "host"])
_flag("string", "ogbench_dataset_dir", None, "Directory of .npz shards, used in turn.")
_flag("integer", "dataset_replace_interval", 1_000, "Updates before the next shard.", lower_bound=1)


def load_data(task: Task, config: Any, sparse: bool) -> tuple[dict[str, np.ndarray], ShardRotation | None, dict]:
    """The prepared dataset (the first shard of several), the rotation of shards if there are, and what it is."""
    horizon = config.horizon_length

    def prepared(raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        env_datasets.check_horizon(raw, horizon)
        return prepare(raw, horizon, terminates=task.terminates)

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
    description = describe(data, Path(name).name) | ({"shards": len(rotation.paths)} if rotation else {})
    print(f"dataset: {name} ({origin}), {description['episodes']} episodes, {description['transitions']} transitions")
    return data, rotation, description


def start_from(program: Program, agents: Any, observation: Any) -> tuple[Any, dict[str, Any]]:
    """The agents as --start_from leaves them, and what the run records of that."""
    path = str(Path(FLAGS.start_from).expanduser().absolute())
    recorded = [run.files.recorded().get("dataset", {}).get("start", {}) for run in program.lanes]
    same = all(start.get("path") == path for start in recorded)
    if same and all(checkpoints.valid_steps(run.checkpoints) for run in program.lanes):
        return agents, recorded[0]  # What was begun goes on, whatever has become of the other run.
    agents, start = go_on_from(agents, Path(path), observation)
    return agents, start | {"path": path}


def train_offline(program: Program, trainer: Trainer, rotation: ShardRotation | None) -> None:
    """Trains on the dataset alone, up to --offline_steps."""
    interval = FLAGS.dataset_replace_interval if rotation else 0
    while program.step < FLAGS.offline_steps:
        program.visit()
        if rotation and program.step % interval == 0:
            trainer.set_data(rotation.at(program.step))
        until = min(program.until(interval), FLAGS.offline_steps)
        updates = until - program.step
        program.agents, info = trainer.train(program.agents, program.step, updates)
        program.advance(until, info, updates)


def main(argv: Sequence[str]) -> None:
    """Trains, evaluates and records; resumes what was begun before."""
    overrides = cli.parse(argv, FLAGS)
    task = parse_task(FLAGS.env_name)
    ends = FLAGS.offline_steps, FLAGS.offline_steps + FLAGS.online_steps
    program = Program(FLAGS, task, overrides, ends, logs=("online",) if FLAGS.online_steps else ())
    if not program.lanes:
        return
    data, rotation, dataset = load_data(task, program.config, program.sparse)
    make = functools.partial(make_env, FLAGS.env_name)
    agents = program.new_agents(data)
    if FLAGS.start_from:
        agents, dataset["start"] = start_from(program, agents, first_observation(data))
    program.start(agents, dataset, first_observation(data), make)
    program.check_phase("explorer", FLAGS.offline_steps)
    trainer = Trainer(program.batch_keys(), FLAGS.dataset_placement)
    trainer.set_data(rotation.at(program.step) if rotation else data)
    with program:
        train_offline(program, trainer, rotation)
        if FLAGS.online_steps:
            Online(program, trainer, FLAGS.offline_steps).train(
                FLAGS.start_training, FLAGS.utd_ratio, FLAGS.balanced_sampling
            )
        program.visit()
        program.finish()
    if rotation:
        rotation.close()


if __name__ == "__main__":
    cli.run(main)
