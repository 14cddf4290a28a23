"""Datasets in the compact layout, from OGBench's files, a download, a collection, or Minari.

Compact layout: rows are states in time order.
    observations [N, o] f32, actions [N, a] f32 in (-1, 1), rewards [N] f32, masks [N] f32 (0: no bootstrap),
    terminals [N] f32, 1 on the LAST ROW of each episode and nowhere else. The action of that row was not executed, so
    there is a transition from row i to row i + 1 if and only if terminals[i] is 0.
    images [N, C, h, w, 3] uint8, for tasks with images.
"""

import contextlib
import dataclasses
import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from envs import minari_store
from envs.action_units import Bounds, ranges, to_unit
from envs.collect import collect
from envs.data_card import DataCard, make_card
from envs.data_checks import check_actions, check_precision, check_rewards
from envs.gym_dataset import MEMORY, GymFile, parse_arrays, read_gym_file
from envs.npz import Arrays, check_flags, check_images, check_width, read_npz
from envs.ogbench import specs
from envs.ogbench.download import download
from envs.ogbench.specs import DEFAULT_DATASET_DIR
from envs.suspicions import suspicions
from envs.tasks import VISUAL, Task, action_bounds, make_env
from utils.errors import UserError
from utils.rollout.worker_pool import DEFAULT_TIMEOUT, START_SECONDS

SOURCES = ("auto", "download", "collect")
ACTION_LIMIT = 1 - 1e-5
OGBENCH_IMAGES = (1, 64, 64, 3)  # of its tasks with images


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Origin and content of a dataset.

    Attributes:
        path: the training file.
        origin: its origin in a few words.
        episodes: number of training episodes.
        transitions: number of training transitions.
        has_val: whether there is a validation set.
        card: summary of the content.
    """

    path: Path
    origin: str
    episodes: int
    transitions: int
    has_val: bool
    card: DataCard

    def __str__(self) -> str:
        val = "" if self.has_val else ", no validation file"
        return f"{self.path} ({self.origin}; {self.episodes} episodes, {self.transitions} transitions{val})"


def load_dataset(
    task: Task,
    *,
    source: str = "auto",
    dataset_dir: str | Path = DEFAULT_DATASET_DIR,
    dataset_path: str | Path | None = None,
    sparse: bool = False,
    collect_episodes: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    with_val: bool = True,
    actions: str = "auto",
) -> tuple[Arrays, Arrays | None, DatasetInfo]:
    """Finds (or makes) and loads the dataset of a task.

    Args:
        task: from `parse_task`.
        source: 'auto': OGBench's file if it is in the directory, else the largest collected one there, else a
            download, else (manipulation and pointmaze) a collection. 'download': OGBench's file, from the directory
            or the server. 'collect': the collected file of the given size, from the directory or collected now.
        dataset_dir: directory of the files.
        dataset_path: a file to use instead of these; needed for 'gym:' tasks. Its validation set is '<file>-val.npz'
            if that exists. 'minari:' tasks name their dataset themselves.
        sparse: set nonzero rewards to -1.
        collect_episodes: number of training episodes to collect (default: as in OGBench's dataset).
        seed: of the collection, NOT of the run: each seed gives another dataset.
        workers: number of processes of the collection (default: one per core).
        with_val: load the validation set too; None is returned for it otherwise.
        actions: units of the file's actions, one of UNITS (envs/action_units.py).

    Returns:
        Training set and validation set (None if it has no file) in the compact layout, and their origin.

    Raises:
        UserError: no data available, or an invalid file.
    """
    if source not in SOURCES:
        raise UserError(f"unknown dataset source '{source}'; use one of {', '.join(SOURCES)}")
    if task.kind == "minari":
        if dataset_path is not None:
            raise UserError(f"{task.name} names its dataset; leave out --dataset, or give --env_name=gym:<id> with it")
        path, origin = minari_store.data_folder(task.name), "Minari"
    elif dataset_path is not None:
        path, origin = Path(dataset_path).expanduser(), "file given"
    elif task.dataset is None:
        raise UserError(f"'{task.name}' has no dataset of its own; give one with --dataset=<file.npz>")
    else:
        path, origin = _find_or_make(
            task.dataset, source, Path(dataset_dir).expanduser(), collect_episodes, seed, workers
        )
    train, card = read_dataset(task, path, sparse, actions)
    val = load_validation(task, path, sparse, card.units) if with_val and task.kind != "minari" else None
    info = DatasetInfo(path, origin, card.episodes, card.transitions, val is not None, card)
    return train, val, info


def _find_or_make(
    name: str, source: str, directory: Path, episodes: int | None, seed: int, workers: int | None
) -> tuple[Path, str]:
    """Returns the path of the training file and its origin."""
    if source == "collect":
        return collect(name, episodes=episodes, dataset_dir=directory, workers=workers, seed=seed), "collected"
    official = specs.dataset_files(directory, name)[0]
    if official.exists():
        return official, "collected at OGBench's size" if official.with_suffix(".json").exists() else "OGBench's file"
    found = specs.find_collected(directory, name) if source == "auto" else []
    if found:
        return found[0].path, f"the largest of {len(found)} collected in {directory}" if found[1:] else "collected"
    failure = download(name, directory)
    if official.exists():
        return official, "downloaded" if failure is None else f"downloaded, validation file failed: {failure}"
    if source == "download":
        raise UserError(f"cannot download {name} ({failure}); put {official.name} into {directory}")
    if name not in specs.DATASET_SPECS:
        raise UserError(
            f"there is no {official.name} in {directory}, and it cannot be downloaded ({failure}) or collected "
            f"(its expert policy does not ship with ogbench); put the file there, or give its folder by --dataset_dir"
        )
    print(f"Cannot download {name} ({failure}): collecting it into {directory}.", file=sys.stderr, flush=True)
    return collect(name, episodes=episodes, dataset_dir=directory, workers=workers, seed=seed), "collected"


def load_file(task: Task, path: str | Path, sparse: bool = False, actions: str = "auto") -> Arrays:
    """Loads one file in the compact layout; see `read_dataset`."""
    return read_dataset(task, path, sparse, actions)[0]


def read_dataset(
    task: Task, source: str | Path | Arrays, sparse: bool = False, actions: str = "auto"
) -> tuple[Arrays, DataCard]:
    """Loads one file, or arrays in memory, in the compact layout, and its card.

    An OGBench file gets the rewards and masks of the task.

    Args:
        task: from `parse_task`.
        source: the file, or the arrays of `dataset_from_arrays`, for gym: and robot: tasks; for a minari: task the
            dataset's folder in Minari's local store.
        sparse: see `load_dataset`.
        actions: units of the file's actions, one of UNITS (envs/action_units.py).

    Raises:
        UserError: the file is invalid.
    """
    read: Callable[..., GymFile]
    if isinstance(source, dict):
        path, read = MEMORY, functools.partial(parse_arrays, MEMORY, source)
    else:
        path = Path(source).expanduser()
        read = functools.partial(read_gym_file, path)
    bounds, extra = None, dict[str, Any]()
    if task.kind == "robot":
        file = read(units=actions)
    elif task.kind == "minari":
        file, bounds, extra = _read_minari(task, source, actions)
    else:
        # OGBench's rewards are functions of the physical state: computing them needs no rendering.
        env = sized_env(task.name) if task.kind == "gym" else _labelling_env(task.name.removeprefix(VISUAL))
        bounds = action_bounds(env)
        if task.kind == "gym":
            width, image_shape = observed_shapes(env)
            file = read(width, env.action_space.shape[0], image_shape, bounds, actions)
        elif isinstance(source, dict):
            raise UserError(f"arrays in memory are for gym: and robot: tasks; give {task.name} a file by --dataset")
        else:
            file = _read_ogbench_file(task, path, env, actions)
    dataset = file.arrays
    if sparse:
        dataset["rewards"] = -(dataset["rewards"] != 0).astype(np.float32)
    dataset["actions"] = np.clip(dataset["actions"], -ACTION_LIMIT, ACTION_LIMIT)
    dataset["terminals"][-1] = 1.0  # No row follows the last one.
    # OGBench's are known to be sparse: the card shows if nothing is solved.
    signs = [*check_rewards(path, dataset), *suspicions(path, dataset)] if task.dataset is None else []
    rescaled = bounds is not None and not ((bounds[0] == -1).all() and (bounds[1] == 1).all())
    card = make_card(
        dataset,
        masks_tell=task.dataset is not None,
        ends=file.ends,
        unused=file.unused,
        unused_reward=file.unused_reward,
        units=file.units,
        bounds=ranges(*bounds) if bounds and rescaled else "",
        **extra,
        warnings=(*file.warnings, *signs, *check_actions(path, dataset)),
    )
    return dataset, card


def load_validation(task: Task, train_path: str | Path, sparse: bool = False, actions: str = "auto") -> Arrays | None:
    """Loads '<train file>-val.npz', or returns None if it does not exist.

    Raises:
        UserError: the file is invalid.
    """
    path = Path(train_path).expanduser()
    path = path.with_name(f"{path.stem}-val.npz")
    return load_file(task, path, sparse, actions) if path.exists() else None


def _read_minari(task: Task, source: Any, units: str) -> tuple[GymFile, Bounds, dict[str, Any]]:
    """Reads a dataset of Minari; returns its content, the bounds of its actions, and what its card adds."""
    from envs.minari_data import read_minari

    if source != minari_store.data_folder(task.name):
        raise UserError(f"{task.name} names its dataset; leave out other files, or give --env_name=gym:<id> with them")
    data = read_minari(task.name, scaled=units == "scaled")
    layout, units = data.layout, "raw" if units == "auto" else units
    width, images = data.arrays["actions"].shape[1], layout.image_shape
    file = parse_arrays(data.path, data.arrays, layout.width, width, images, data.bounds, units)
    about = {
        "observed": "" if layout.plain else layout.describe(),
        "reference": minari_store.reference_scores(task.name),
    }
    return dataclasses.replace(file, warnings=[*data.warnings, *file.warnings]), data.bounds, about


@functools.lru_cache(maxsize=2)
def sized_env(env_name: str) -> Any:
    """Returns the task's environment, for its spaces.

    Raises:
        UserError: its constructor takes too long.
    """
    seconds = int(DEFAULT_TIMEOUT + START_SECONDS)
    with time_limit(seconds, f"{env_name}: its constructor has not returned after {seconds} s"):
        return make_env(env_name)


@functools.lru_cache(maxsize=2)
def _labelling_env(env_name: str) -> Any:
    """Returns OGBench's environment, reset, for its sizes and its goal."""
    env = make_env(env_name)
    env.reset(seed=0)
    return env


@contextlib.contextmanager
def time_limit(seconds: int, message: str) -> Iterator[None]:
    """Limits the time of a block, if it runs in the main thread and signals can interrupt it.

    Raises:
        UserError: `message`.
    """

    def stop(*_: Any) -> None:
        raise UserError(message)

    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def observed_shapes(env: Any) -> tuple[int, tuple[int, ...] | None]:
    """Returns the width of the state, and the shape of the images or None, of an environment from `make_env`."""
    space = env.observation_space
    return (space["state"].shape[0], space["images"].shape) if hasattr(space, "spaces") else (space.shape[0], None)


def _read_ogbench_file(task: Task, path: Path, env: Any, units: str) -> GymFile:
    """Reads a file of OGBench and computes the rewards of the task."""
    raw = _read_raw(task, path, env)
    raw["actions"], units = to_unit(path, raw["actions"], action_bounds(env), units)
    dataset = _relabel(task, env, raw)
    ends = raw["terminals"] > 0
    kinds = {"cut by a time limit": int(ends.sum()), "cut by the end of the file": int(not ends[-1])}
    unused = int((ends & (raw["actions"] != 0).any(axis=1)).sum())
    given = {name: array for name, array in raw.items() if name in ("observations", "actions")}
    return GymFile(dataset, kinds, unused, 0.0, units, check_precision(path, given))


def _read_raw(task: Task, path: Path, env: Any) -> Arrays:
    """Reads the raw arrays, with the physical state that the rewards are functions of."""
    base = env.unwrapped
    buttons = getattr(base, "_num_buttons", 0) if task.kind == "manipulation" else 0
    needed = ("observations", "actions", "terminals", "qpos") + (("button_states",) if buttons else ())
    arrays = read_npz(path, needed)
    check_flags(path, "terminals", arrays["terminals"])
    check_width(path, "qpos", arrays["qpos"], base.model.nq)
    check_width(path, "actions", arrays["actions"], env.action_space.shape[0])
    if buttons:
        check_width(path, "button_states", arrays["button_states"], buttons)
    if task.rendered:  # The observations are images of one camera.
        arrays["images"] = arrays.pop("observations")[:, None]
        check_images(path, arrays["images"], OGBENCH_IMAGES)
        arrays["observations"] = np.zeros((len(arrays["images"]), 0), np.float32)
    else:
        check_width(path, "observations", arrays["observations"], observed_shapes(env)[0])
    return arrays


def _relabel(task: Task, env: Any, arrays: Arrays) -> Arrays:
    """Returns the compact layout with the rewards and masks of the state acted FROM."""
    from ogbench.relabel_utils import relabel_dataset

    relabel_dataset(task.env_id, env, arrays)
    names = ("observations", "actions", "rewards", "masks", "terminals")
    images = {name: arrays[name] for name in ("images",) if name in arrays}
    return images | {name: np.asarray(arrays[name], dtype=np.float32) for name in names}


def check_horizon(dataset: Arrays, horizon: int) -> None:
    """Checks that a window of `horizon` consecutive transitions exists.

    Raises:
        UserError: every episode is shorter.
    """
    ends = np.flatnonzero(dataset["terminals"])
    longest = int(np.diff(ends, prepend=-1).max()) - 1  # An episode of L rows has L - 1 transitions.
    if longest < 1:
        raise UserError(
            "the dataset has no transition: each episode is a single row without a next state; "
            "set terminals only in the last row of an episode, or give next_observations"
        )
    if longest < horizon:
        raise UserError(
            f"no episode of the dataset has {horizon} consecutive transitions (the longest has {longest}); "
            "use a smaller --horizon_length"
        )


def list_shards(directory: str | Path) -> list[Path]:
    """Returns the sorted training files of a dataset that OGBench splits into shards.

    Raises:
        UserError: the directory does not exist, or has no .npz file.
    """
    directory = Path(directory).expanduser()
    shards = sorted(path for path in directory.glob("*.npz") if not path.stem.endswith("-val"))
    if not shards:
        raise UserError(f"there are no .npz files in {directory}; give the directory of the downloaded shards")
    return shards


def load_shard(task: Task, path: str | Path, sparse: bool = False, actions: str = "auto") -> Arrays:
    """Loads one shard in the compact layout; see `load_file` and `load_validation`."""
    return load_file(task, path, sparse, actions)
