"""Collects an OGBench dataset with the oracles of the ogbench package, on all cores.

    python -m envs.collect --env_name=scene-play-v0 --episodes=200 --workers=4

The files do not depend on the number of workers. A run that was stopped goes on when started again.
"""

import contextlib
import dataclasses
import importlib.metadata
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from absl import flags
from tqdm import tqdm

from envs.npz import read_json, write_json, write_npz
from envs.ogbench import specs
from envs.parallel_episodes import EpisodeCache
from utils.errors import UserError
from utils.system.locks import exclusive_lock
from utils.system.rendering import check_mujoco, choose_renderer, set_rendering_backend


def collect(
    name: str,
    *,
    episodes: int | None = None,
    dataset_dir: str | Path = specs.DEFAULT_DATASET_DIR,
    workers: int | None = None,
    seed: int = 0,
    max_steps: int | None = None,
) -> Path:
    """Collects a dataset, or finishes one that was begun; does nothing if it is there already.

    Args:
        name: dataset name, such as 'scene-play-v0', or one of its single tasks.
        episodes: training episodes (default: as released); the validation file gets a tenth on top.
        dataset_dir: directory of the two files and, while unfinished, of the folder '<stem>.parts'.
        workers: processes (default: one a core).
        seed: any seed gives another dataset, under another name.
        max_steps: rows of one episode (default: as released).

    Returns:
        The path of the training file.

    Raises:
        UserError: unknown dataset, bad number, files in the way, full disk, or a worker that died.
        KeyboardInterrupt: with a message that says what was kept.
    """
    spec = specs.find_spec(name)
    episodes = spec.episodes if episodes is None else episodes
    max_steps = spec.max_steps if max_steps is None else max_steps
    workers = usable_cores() if workers is None else workers
    for label, value, least in (("episodes", episodes, 1), ("workers", workers, 1), ("max_steps", max_steps, 2)):
        if value < least:
            raise UserError(f"{label} is {value}; it must be at least {least}")
    if seed < 0:
        raise UserError(f"seed is {seed}; it must not be negative")

    if spec.rendered:
        set_rendering_backend()
    choose_renderer()
    check_mujoco()  # Before workers do, which could not say why they end.
    stem = specs.file_stem(spec, episodes, seed, max_steps)
    train_path, val_path = specs.dataset_files(dataset_dir, stem)
    settings = _settings(spec, max_steps, seed)
    with exclusive_lock(train_path.with_name(f"{stem}.lock")):
        if _is_there(train_path, val_path, settings):
            print(f"{train_path} is there already.", file=sys.stderr)
            return train_path
        folder = EpisodeCache(train_path.with_name(f"{stem}.parts"), settings)
        counts = {"train": episodes, "val": specs.val_episodes(episodes)}
        _make_missing(folder, spec, max_steps, seed, counts, workers)
        write_npz(val_path, folder.merge("val", counts["val"]))
        write_json(train_path.with_suffix(".json"), settings)
        write_npz(train_path, folder.merge("train", counts["train"]))  # Last: it marks the dataset as whole.
        folder.remove()
    return train_path


def usable_cores() -> int:
    """Returns the number of cores this process may use, which a batch system can make fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _settings(spec: specs.DatasetSpec, max_steps: int, seed: int) -> dict:
    """Everything an episode depends on, as JSON values."""
    settings = dataclasses.asdict(spec) | {"max_steps": max_steps, "seed": seed, "p_stack": list(spec.p_stack)}
    del settings["episodes"]  # An episode does not depend on how many there are.
    versions = {package: importlib.metadata.version(package) for package in ("mujoco", "numpy", "ogbench")}
    if spec.rendered:
        versions["renderer"] = os.environ["MUJOCO_GL"]  # They draw a little differently.
    return settings | {"versions": versions}


def _is_there(train_path: Path, val_path: Path, settings: dict) -> bool:
    """True if both files are there; a file made with other settings is never overwritten.

    Raises:
        UserError: the training file was made with other settings, or its validation file is missing.
    """
    if not train_path.exists():
        return False
    record = read_json(train_path.with_suffix(".json"))
    ours, theirs = ({k: v for k, v in d.items() if k != "versions"} for d in (settings, record or settings))
    if ours != theirs:
        raise UserError(f"{train_path} was collected with other settings; move it away or choose another directory")
    if not val_path.exists():
        raise UserError(f"{train_path} is there but {val_path.name} is not; move the first away to collect both")
    return True


def _make_missing(
    folder: EpisodeCache,
    spec: specs.DatasetSpec,
    max_steps: int,
    seed: int,
    counts: dict[str, int],
    workers: int,
) -> None:
    """Collects the episodes that the folder lacks."""
    wanted = [(split, index) for split, count in counts.items() for index in range(count)]
    done = folder.done().intersection(wanted)
    missing = [episode for episode in wanted if episode not in done]
    if not missing:
        return
    workers = min(workers, len(missing))
    bar = tqdm(
        desc=f"{folder.path.stem} ({len(wanted)} episodes, {workers} workers)",
        total=len(wanted) * max_steps,
        initial=len(done) * max_steps,
        unit="step",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    pool = futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (spec, max_steps))
    with bar, pool:
        try:
            with bare_main(), sigint_ignored():
                jobs = [pool.submit(_collect_part, seed, *episode, folder.file(*episode)) for episode in missing]
            for job in futures.as_completed(jobs):
                job.result()
                bar.update(max_steps)
        except BrokenProcessPool:
            raise UserError(
                f"a worker died (out of memory?); {len(folder.done())} of {len(wanted)} episodes are kept in "
                f"{folder.path}: run the same command again, with fewer --workers if memory is short"
            ) from None
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # Waits for the episodes under way: a second or two.
            raise KeyboardInterrupt(
                f"stopped; {len(folder.done())} of {len(wanted)} episodes are kept in {folder.path}: "
                "run the same command to go on"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def bare_main() -> Iterator[None]:
    """Keeps spawned workers from importing the caller's main module, which may import JAX and need no guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def sigint_ignored() -> Iterator[None]:
    """Workers started in this block leave Ctrl-C to the parent from their first instruction on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


_collector = None  # One per worker process.


def _start_worker(spec: specs.DatasetSpec, max_steps: int) -> None:
    """Builds the worker's environment, and ends the worker should the parent be killed."""
    global _collector
    from envs.ogbench.oracles import Collector

    parent = multiprocessing.parent_process()
    assert parent is not None  # This is a worker.

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _collector = Collector(spec, max_steps)


def _collect_part(seed: int, split: str, index: int, path: Path) -> None:
    """Collects one episode into its part file."""
    assert _collector is not None  # Made when the worker began.
    write_npz(path, _collector.episode(seed, split, index))


def _define_flags() -> flags.FlagValues:
    """Returns the flags, in a set of their own: importing this module must not add flags to another program's."""
    values = flags.FlagValues()
    flags.DEFINE_string("env_name", None, "Dataset, such as 'scene-play-v0'.", flag_values=values)
    flags.DEFINE_integer("episodes", None, "Training episodes; default: as released.", flag_values=values)
    flags.DEFINE_string("dataset_dir", specs.DEFAULT_DATASET_DIR, "Where the files go.", flag_values=values)
    flags.DEFINE_integer("workers", None, "Processes; default: the cores there are.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Seed of the dataset.", flag_values=values)
    return values


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code (0 done, 2 user's mistake, 130 interrupted)."""
    values = _define_flags()
    if {"--help", "-h", "-help", "--helpfull"} & set(argv[1:]):
        print(__doc__, values.get_help(), sep="\n")
        return 0
    try:
        rest = values(argv)[1:]
        if rest:
            raise UserError(f"unknown argument '{rest[0]}'; flags look like --episodes=200")
        if not values.env_name:
            raise UserError("--env_name is missing; for example --env_name=scene-play-v0")
        path = collect(
            values.env_name,
            episodes=values.episodes,
            dataset_dir=values.dataset_dir,
            workers=values.workers,
            seed=values.seed,
        )
    except (UserError, flags.Error) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\n{str(interrupt) or 'stopped'}", file=sys.stderr)
        return 130
    print(f"The dataset is in {path}")
    return 0


if __name__ == "__main__":
    # Workers look their functions up in the importable module, not in __main__.
    from envs.collect import main as importable_main

    sys.exit(importable_main(sys.argv))
