"""Episodes made in parallel: spawned workers write one file per episode into a folder, which resumes a stopped run."""

import contextlib
import multiprocessing
import os
import shutil
import sys
import threading
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from envs.npz import BROKEN_NPZ, Arrays, write_npz
from utils.errors import UserError
from utils.system.files import read_json, write_json
from utils.system.signals import sigint_ignored

Episode = tuple[str, int]  # split, index


class EpisodeCache:
    """A folder '<stem>.parts' with one file per episode, and the settings that the episodes were made with.

    Args:
        path: the folder; created if missing.
        settings: everything that determines the content of the episodes.

    Raises:
        UserError: the folder holds episodes of other settings, or cannot be written.
    """

    def __init__(self, path: Path, settings: dict) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {path}: {error.strerror or error}; choose another --dataset_dir") from error
        found = read_json(path / "settings.json", missing_ok=True)
        if not found and not self.done():
            write_json(path / "settings.json", settings)
        elif found != settings:
            changed = sorted(k for k in found.keys() | settings.keys() if found.get(k) != settings.get(k))
            raise UserError(
                f"{path} holds episodes made with other settings ({', '.join(changed)}); "
                "choose another --dataset_dir (what is in that folder is temporary)"
            )

    def file(self, split: str, index: int) -> Path:
        """Returns the path of one episode's file."""
        return self.path / f"{split}-{index:05d}.npz"

    def done(self) -> set[Episode]:
        """Returns the episodes with a complete file; one that a crash cut short does not count."""
        episodes = set()
        for path in self.path.glob("*-*.npz"):
            split, _, index = path.stem.partition("-")
            if index.isdigit() and zipfile.is_zipfile(path):
                episodes.add((split, int(index)))
        return episodes

    def merge(self, split: str, count: int) -> Arrays:
        """Returns the rows of the first `count` episodes of a split, in order.

        Raises:
            UserError: a file is damaged. It is deleted, so that the next run makes the episode again.
        """
        columns: dict[str, np.ndarray] = {}
        lengths = [len(self._load(split, index, "actions")["actions"]) for index in range(count)]
        end = 0
        for index, length in enumerate(lengths):
            for key, rows in self._load(split, index).items():
                # Filled in place: images would not fit in memory twice.
                if key not in columns:
                    columns[key] = np.empty((sum(lengths), *rows.shape[1:]), rows.dtype)
                columns[key][end : end + length] = rows
            end += length
        return columns

    def _load(self, split: str, index: int, *keys: str) -> Arrays:
        """Returns the arrays of an episode: those named, or all."""
        path = self.file(split, index)
        try:
            with np.load(path) as rows:
                return {key: rows[key] for key in keys or rows.files}
        except (OSError, *BROKEN_NPZ) as error:
            path.unlink(missing_ok=True)
            raise UserError(f"{path} is damaged; rerun the same command to make it anew") from error

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.path, ignore_errors=True)


def make_missing(
    cache: EpisodeCache, counts: Mapping[str, int], make: Callable[[str, int], Arrays], workers: int
) -> None:
    """Makes the episodes that a cache lacks, in spawned processes that ignore Ctrl-C and end with this one.

    Args:
        cache: gets the files.
        counts: split → number of its episodes.
        make: returns the rows of an episode, given split and index; can be pickled.
        workers: number of processes.

    Raises:
        UserError: a worker died; or raised by `make` or by the writing of a file.
        KeyboardInterrupt: after Ctrl-C, with a message that says what is kept.
    """
    wanted = [(split, index) for split, count in counts.items() for index in range(count)]
    done = cache.done()
    missing = [episode for episode in wanted if episode not in done]
    if not missing:
        return

    def kept() -> str:
        return f"{len(cache.done().intersection(wanted))} of {len(wanted)} episodes are kept in {cache.path}"

    workers = min(workers, len(missing))
    bar = tqdm(
        desc=f"{cache.path.stem} ({workers} workers)",
        total=len(wanted),
        initial=len(wanted) - len(missing),
        unit="episode",
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    pool = futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent)
    with bar, pool:
        try:
            with _bare_main(), sigint_ignored():
                jobs = [pool.submit(_make_file, make, *episode, cache.file(*episode)) for episode in missing]
            for job in futures.as_completed(jobs):
                job.result()
                bar.update()
        except BrokenProcessPool:
            raise UserError(
                f"a worker died (out of memory?); {kept()}: "
                "rerun the same command, with fewer --workers if memory is short"
            ) from None
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # Waits for the episodes in progress.
            raise KeyboardInterrupt(f"stopped; {kept()}: rerun the same command to resume") from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _bare_main() -> Iterator[None]:
    """Keeps spawned workers from importing the caller's main module, which may import JAX or lack a guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _end_with_parent() -> None:
    """Lets this worker end if the parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # This is a worker.

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _make_file(make: Callable[[str, int], Arrays], split: str, index: int, path: Path) -> None:
    write_npz(path, make(split, index))
