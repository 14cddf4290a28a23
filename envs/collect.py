"""Collects an OGBench dataset with the oracles of the ogbench package, on all cores.

    python -m envs.collect --env_name=scene-play-v0 --episodes=200 --workers=4

The files do not depend on the number of workers. Rerun the same command to resume.
"""

import dataclasses
import functools
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from envs.npz import Arrays, write_npz
from envs.ogbench import specs
from envs.parallel_episodes import EpisodeCache, make_missing
from utils.errors import UserError
from utils.system.cli import parse
from utils.system.entry_point import run_main
from utils.system.files import read_json, write_json
from utils.system.locks import exclusive_lock
from utils.system.rendering import check_mujoco, choose_renderer, set_rendering_backend
from utils.system.resources import usable_cores

if TYPE_CHECKING:
    from envs.ogbench.oracles import Collector


def collect(
    name: str,
    *,
    episodes: int | None = None,
    dataset_dir: str | Path = specs.DEFAULT_DATASET_DIR,
    workers: int | None = None,
    seed: int = 0,
    max_steps: int | None = None,
) -> Path:
    """Collects a dataset, or resumes its collection; does nothing if it already exists.

    Args:
        name: dataset name, such as 'scene-play-v0', or one of its single tasks.
        episodes: training episodes (default: as released); the validation file gets a tenth on top.
        dataset_dir: directory of the two files and, while unfinished, of the folder '<stem>.parts'.
        workers: number of processes (default: one per core).
        seed: each seed gives another dataset, under another name.
        max_steps: rows of an episode (default: as released).

    Returns:
        The path of the training file.

    Raises:
        UserError: unknown dataset, invalid number, files of other settings, full disk, or a worker that died.
        KeyboardInterrupt: with a message that says what is kept.
    """
    spec = specs.find_spec(name)
    episodes = spec.episodes if episodes is None else episodes
    max_steps = spec.max_steps if max_steps is None else max_steps
    workers = usable_cores() if workers is None else workers
    least_values = (("episodes", episodes, 1), ("workers", workers, 1), ("max_steps", max_steps, 2), ("seed", seed, 0))
    for label, value, least in least_values:
        if value < least:
            raise UserError(f"{label} is {value}; it must be at least {least}")
    if spec.rendered:
        set_rendering_backend()
    choose_renderer()
    check_mujoco()  # Before the workers, which could not report it.
    stem = specs.file_stem(spec, episodes, seed, max_steps)
    train_path, val_path = specs.dataset_files(dataset_dir, stem)
    settings = _settings(spec, max_steps, seed)
    with exclusive_lock(train_path.with_name(f"{stem}.lock")):
        if _exists(train_path, val_path, settings):
            print(f"{train_path} already exists.", file=sys.stderr)
            return train_path
        cache = EpisodeCache(train_path.with_name(f"{stem}.parts"), settings)
        counts = {"train": episodes, "val": specs.val_episodes(episodes)}
        make_missing(cache, counts, functools.partial(_episode, spec, max_steps, seed), workers)
        write_npz(val_path, cache.merge("val", counts["val"]))
        write_json(train_path.with_suffix(".json"), settings)
        write_npz(train_path, cache.merge("train", counts["train"]))  # Last: it marks the dataset as complete.
        cache.remove()
    return train_path


def _settings(spec: specs.DatasetSpec, max_steps: int, seed: int) -> dict:
    """Returns everything that an episode depends on, as JSON values."""
    settings = dataclasses.asdict(spec) | {"max_steps": max_steps, "seed": seed, "p_stack": list(spec.p_stack)}
    del settings["episodes"]  # An episode does not depend on how many there are.
    versions = {package: importlib.metadata.version(package) for package in ("mujoco", "numpy", "ogbench")}
    if spec.rendered:
        versions["renderer"] = os.environ["MUJOCO_GL"]  # Their images differ slightly.
    return settings | {"versions": versions}


def _exists(train_path: Path, val_path: Path, settings: dict) -> bool:
    """True if both files exist; a file made with other settings is never overwritten.

    Raises:
        UserError: the training file was made with other settings, or its validation file is missing.
    """
    if not train_path.exists():
        return False
    record = read_json(train_path.with_suffix(".json"), missing_ok=True)
    ours, theirs = ({k: v for k, v in d.items() if k != "versions"} for d in (settings, record or settings))
    if ours != theirs:
        raise UserError(f"{train_path} was collected with other settings; move it away or choose another directory")
    if not val_path.exists():
        raise UserError(f"{train_path} exists but {val_path.name} does not; move the first away to collect both")
    return True


@functools.cache
def _collector(spec: specs.DatasetSpec, max_steps: int) -> "Collector":
    """Returns this process's collector of a dataset."""
    from envs.ogbench.oracles import Collector  # Here, as MuJoCo must not be imported before a renderer is chosen.

    return Collector(spec, max_steps)


def _episode(spec: specs.DatasetSpec, max_steps: int, seed: int, split: str, index: int) -> Arrays:
    return _collector(spec, max_steps).episode(seed, split, index)


def _define_flags() -> flags.FlagValues:
    """Returns the flags, in a set of their own: importing this module must not add flags to another program's."""
    values = flags.FlagValues()
    flags.DEFINE_string("env_name", None, "Dataset, such as 'scene-play-v0'.", flag_values=values)
    flags.DEFINE_integer("episodes", None, "Training episodes; default: as released.", flag_values=values)
    flags.DEFINE_string("dataset_dir", specs.DEFAULT_DATASET_DIR, "Folder of the files.", flag_values=values)
    flags.DEFINE_integer("workers", None, "Number of processes; default: one per core.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Seed of the dataset.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    values = _define_flags()
    if overrides := parse(argv, values):
        raise UserError(f"unknown flag --agent.{min(overrides)}; a collection has no agent")
    if not values.env_name:
        raise UserError("--env_name is missing; for example --env_name=scene-play-v0")
    given: dict[str, Any] = {name: values[name].value for name in ("episodes", "dataset_dir", "workers", "seed")}
    print(f"The dataset is in {collect(values.env_name, **given)}")


if __name__ == "__main__":
    # Workers look functions up in the importable module, not in __main__.
    from envs.collect import main as importable_main

    run_main(importable_main)
