"""The dataset of a command's runs."""

from pathlib import Path
from typing import Any

import numpy as np

from envs import datasets
from envs.data_card import DataCard
from envs.tasks import Task
from utils.data.batches import describe, first_observation, prepare
from utils.data.rewards import Affine
from utils.data.shards import ShardRotation
from utils.errors import UserError
from utils.run.config import CommonConfig, RunConfig
from utils.run.identity import content


class Dataset:
    """One set of arrays, or shards used one after the other.

    Attributes:
        record: entry 'dataset' of flags.json, by which runs are compared. card: its summary.
        interval: steps before the next shard; 0 if there is one set.
    """

    interval = 0

    def __init__(self, arrays: dict[str, np.ndarray], record: dict[str, Any], card: DataCard):
        self._arrays, self.record, self.card = arrays, record, card

    def at(self, step: int) -> dict[str, np.ndarray]:
        """Returns the arrays (utils/data/batches.py) that updates from `step` on use."""
        return self._arrays

    def observation(self) -> Any:
        """Returns the first observation."""
        return first_observation(self._arrays)

    def close(self) -> None:
        """Stops loading in the background."""


class ShardedDataset(Dataset):
    """Shards used one after the other, the next one loaded in the background."""

    def __init__(self, rotation: ShardRotation, record: dict[str, Any], card: DataCard):
        super().__init__(rotation.at(0), record, card)
        self._rotation, self.interval = rotation, rotation.interval

    def at(self, step: int) -> dict[str, np.ndarray]:
        """Returns the shard that updates from `step` on use."""
        return self._rotation.at(step)

    def close(self) -> None:
        """Stops loading in the background."""
        self._rotation.close()


def load_dataset(
    config: RunConfig, task: Task, horizon: int, sparse: bool, data: dict[str, np.ndarray] | None = None
) -> Dataset:
    """Loads the dataset that a config asks for, and prints its summary.

    Args:
        config: of the runs. task: theirs. horizon: actions in a chunk. sparse: whether rewards are made sparse.
        data: the arrays of `envs.gym_dataset.dataset_from_arrays`, if they are in memory.

    Raises:
        UserError: there are no data, or they cannot be used.
    """
    if data is not None:
        if config.dataset or config.ogbench_dataset_dir:
            raise UserError("the config names a dataset, and arrays are given as well; give one of them")
        raw, card = datasets.read_dataset(task, data, sparse, config.dataset_actions)
        dataset = make_dataset(raw, card, "arrays", task, horizon, rewards_of(config))
        _show(dataset, "arrays", "in memory")
        return dataset
    if task.kind == "minari" and (config.eval_episodes or config.online_steps or config.video_episodes):
        datasets.sized_env(task.name)  # Before training, which may end in an evaluation that fails.
    if config.ogbench_dataset_dir:
        return _load_shards(config, task, horizon, sparse)
    raw, _, info = datasets.load_dataset(
        task,
        source=config.dataset_source,
        dataset_dir=config.dataset_dir,
        dataset_path=config.dataset,
        sparse=sparse,
        collect_episodes=config.dataset_episodes,
        with_val=False,
        actions=config.dataset_actions,
    )
    name = task.env_id if task.kind == "minari" else info.path.name
    dataset = make_dataset(raw, info.card, name, task, horizon, rewards_of(config))
    _show(dataset, str(info.path), info.origin)
    return dataset


def rewards_of(config: CommonConfig) -> Affine:
    """Returns the rewards that agents are trained on, as a function of the task's."""
    return Affine(config.reward_scale, config.reward_shift)


def make_dataset(
    raw: dict[str, np.ndarray], card: DataCard, name: str, task: Task, horizon: int, rewards: Affine
) -> Dataset:
    """Returns the dataset of arrays that were read.

    Args:
        raw, card: of `envs.datasets.read_dataset`. name: recorded as the file's. task: of the runs.
        horizon: actions in a chunk. rewards: of `rewards_of`.

    Raises:
        UserError: no episode has that many steps.
    """
    arrays = _prepare(raw, task, horizon, rewards)
    return Dataset(arrays, describe(arrays, name), card)


def _prepare(raw: dict[str, np.ndarray], task: Task, horizon: int, rewards: Affine) -> dict[str, np.ndarray]:
    """Returns arrays that windows of `horizon` steps can be sampled from, with rewards scaled and shifted."""
    datasets.check_horizon(raw, horizon)
    followed = raw["terminals"] == 0  # Rows with an action, and so a reward.
    scaled = np.where(followed, rewards(raw["rewards"]), raw["rewards"]).astype(np.float32)
    return prepare(raw | {"rewards": scaled}, terminates=task.terminates)


def _load_shards(config: RunConfig, task: Task, horizon: int, sparse: bool) -> Dataset:
    assert config.ogbench_dataset_dir
    paths, cards = datasets.list_shards(config.ogbench_dataset_dir), dict[Path, DataCard]()

    def load(path: Path) -> dict[str, np.ndarray]:
        """Loads a shard; all are in the units of the first one."""
        units = cards[paths[0]].units if cards else config.dataset_actions
        raw, card = datasets.read_dataset(task, path, sparse, units)
        if cards and path not in cards:
            card.warn()
        cards[path] = card
        return _prepare(raw, task, horizon, rewards_of(config))

    rotation = ShardRotation(paths, load, config.dataset_replace_interval)
    record = describe(rotation.at(0), Path(config.ogbench_dataset_dir).name) | {"shards": len(paths)}
    dataset = ShardedDataset(rotation, record, cards[paths[0]])
    _show(dataset, config.ogbench_dataset_dir, f"{len(paths)} shards")
    record["contents"] = {str(number): content(path) for number, path in enumerate(paths)}
    return dataset


def _show(dataset: Dataset, name: str, origin: str) -> None:
    """Prints the dataset's file, size and card."""
    record = dataset.record
    print(f"dataset: {name} ({origin}), {record['episodes']} episodes, {record['transitions']} transitions")
    dataset.card.show()
