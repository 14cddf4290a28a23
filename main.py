"""Offline RL, then online.

For example: python main.py --agent=agents/otql.py --env_name=cube-double-play-singletask-task2-v0
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from envs import datasets as env_datasets
from envs.action_units import UNITS
from envs.data_card import DataCard
from envs.tasks import Task, make_env, parse_task
from utils.data.batches import describe, first_observation, prepare
from utils.data.shards import ShardRotation
from utils.errors import UserError
from utils.run import checkpoints
from utils.run.identity import content
from utils.run.loading import load_base, warm_start
from utils.run.online import Online
from utils.run.program import Program, define_flag, define_flags
from utils.run.update_loop import UpdateLoop
from utils.system.cli import parse
from utils.system.entry_point import run_main

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
_flag("enum", "dataset_actions", "auto", "Units of its actions; scaled: to [-1, 1].", enum_values=list(UNITS))
_flag("enum", "dataset_source", "auto", "Where the dataset comes from.", enum_values=list(env_datasets.SOURCES))
_flag("string", "dataset_dir", env_datasets.DEFAULT_DATASET_DIR, "Where datasets are.")
_flag("integer", "dataset_episodes", None, "Episodes to collect; default: the official number.", lower_bound=1)
_flag("enum", "dataset_placement", "auto", "Memory that holds it.", enum_values=["auto", "device", "host"])
_flag("string", "ogbench_dataset_dir", None, "Directory of .npz shards, used in turn.")
_flag("integer", "dataset_replace_interval", 1_000, "Updates before the next shard.", lower_bound=1)


def load_data(
    task: Task, config: Any, sparse: bool
) -> tuple[dict[str, np.ndarray], ShardRotation | None, dict, DataCard]:
    """Loads the dataset and shows its card.

    Returns:
        the prepared dataset (the first shard of several), the rotation of shards if there are, what the run records of
        it, and the card.
    """

    def prepared(raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        env_datasets.check_horizon(raw, config.horizon_length)
        return prepare(raw, terminates=task.terminates)

    rotation: ShardRotation | None = None
    cards: dict[Path, DataCard] = {}

    def load_shard(path: Path) -> dict[str, np.ndarray]:
        """Loads a shard; all are in the units of the first one."""
        units = cards[paths[0]].units if cards else FLAGS.dataset_actions
        raw, card = env_datasets.read_dataset(task, path, sparse, units)
        if cards and path not in cards:
            card.warn()
        cards[path] = card
        return prepared(raw)

    if FLAGS.ogbench_dataset_dir and FLAGS.dataset:
        raise UserError("--dataset and --ogbench_dataset_dir exclude each other; give one of them")
    if FLAGS.ogbench_dataset_dir:
        paths = env_datasets.list_shards(FLAGS.ogbench_dataset_dir)
        rotation = ShardRotation(paths, load_shard, FLAGS.dataset_replace_interval)
        data, name, origin, card = rotation.at(0), FLAGS.ogbench_dataset_dir, f"{len(paths)} shards", cards[paths[0]]
    else:
        raw, _, info = env_datasets.load_dataset(
            task,
            source=FLAGS.dataset_source,
            dataset_dir=FLAGS.dataset_dir,
            dataset_path=FLAGS.dataset,
            sparse=sparse,
            collect_episodes=FLAGS.dataset_episodes,
            with_val=False,
            actions=FLAGS.dataset_actions,
        )
        data, name, origin, card = prepared(raw), str(info.path), info.origin, info.card
    description = describe(data, Path(name).name) | ({"shards": len(rotation.paths)} if rotation else {})
    print(f"dataset: {name} ({origin}), {description['episodes']} episodes, {description['transitions']} transitions")
    card.show()
    return data, rotation, description, card


def start_from(program: Program, agents: Any, observation: Any) -> tuple[Any, dict[str, Any]]:
    """The agents as --start_from leaves them, and what the run records of that."""
    path = Path(FLAGS.start_from).expanduser().resolve()
    recorded = [run.files.recorded().get("dataset", {}).get("start", {}) for run in program.lanes]
    same = all(start.get("path") and Path(start["path"]).resolve() == path for start in recorded)
    if same and all(checkpoints.valid_steps(run.checkpoints) for run in program.lanes):
        return agents, recorded[0]  # What was begun goes on, whatever has become of the other run.
    agents, start = warm_start(agents, path, observation)
    return agents, start | {"path": str(path)}


def start_of(program: Program, data: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the entry 'start' that finished runs have recorded of --start_from."""
    if not FLAGS.start_from:
        return {}
    path, width = Path(FLAGS.start_from).expanduser().resolve(), data["actions"].shape[1]
    start = load_base(path, program.config, width * program.config.horizon_length, first_observation(data))[1]
    return {"start": start | {"path": str(path)}}


def train_offline(program: Program, trainer: UpdateLoop, rotation: ShardRotation | None) -> None:
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
    overrides = parse(argv, FLAGS)
    task = parse_task(FLAGS.env_name)
    ends = FLAGS.offline_steps, FLAGS.offline_steps + FLAGS.online_steps
    program = Program(FLAGS, task, overrides, ends, logs=("online",) if FLAGS.online_steps else ())
    if not (program.lanes or program.unconfirmed):
        return
    data, rotation, dataset, card = load_data(task, program.config, program.sparse)
    if rotation:
        dataset["contents"] = {str(number): content(path) for number, path in enumerate(rotation.paths)}
    if program.unconfirmed:
        program.confirm(dataset | start_of(program, data))
    if not program.lanes:
        return
    make = functools.partial(make_env, FLAGS.env_name)
    agents = program.new_agents(data)
    if FLAGS.start_from:
        agents, dataset["start"] = start_from(program, agents, first_observation(data))
    program.start(agents, dataset, first_observation(data), make, card.record())
    program.check_phase("explorer", FLAGS.offline_steps)
    trainer = UpdateLoop(program.batch_keys(), FLAGS.dataset_placement)
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
    run_main(main)
