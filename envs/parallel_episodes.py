"""The unfinished part of a collection: a folder with one small file an episode."""

import shutil
import zipfile
from pathlib import Path

import numpy as np

from envs.npz import BROKEN_NPZ, Arrays, read_json, write_json
from utils.errors import UserError

Episode = tuple[str, int]  # split, index


class EpisodeCache:
    """The folder '<stem>.parts' with one file an episode and the settings they were made with.

    Args:
        path: the folder; made if missing.
        settings: what decides the episodes' content.

    Raises:
        UserError: the folder holds parts of other settings, or cannot be written.
    """

    def __init__(self, path: Path, settings: dict) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {path}: {error.strerror or error}; choose another --dataset_dir") from error
        found = read_json(path / "settings.json")
        if found is None and not self.done():
            write_json(path / "settings.json", settings)
        elif found != settings:
            found = found or {}
            changed = sorted(k for k in found.keys() | settings.keys() if found.get(k) != settings.get(k))
            raise UserError(
                f"{path} holds episodes made with other settings ({', '.join(changed)}); "
                "choose another --dataset_dir (what is in that folder is temporary)"
            )

    def file(self, split: str, index: int) -> Path:
        """Returns the path of one episode's file."""
        return self.path / f"{split}-{index:05d}.npz"

    def done(self) -> set[Episode]:
        """Returns the episodes that are there and whole; what a crash cut short is not counted."""
        episodes = set()
        for path in self.path.glob("*-*.npz"):
            split, _, index = path.stem.partition("-")
            if index.isdigit() and zipfile.is_zipfile(path):
                episodes.add((split, int(index)))
        return episodes

    def merge(self, split: str, count: int) -> Arrays:
        """Returns the rows of the first `count` episodes of a split, in order.

        Raises:
            UserError: a part is damaged. It is deleted, so that the next run makes it again.
        """
        columns: dict[str, np.ndarray] = {}
        lengths = [len(self._load(split, index, "actions")["actions"]) for index in range(count)]
        end = 0
        for index, length in enumerate(lengths):
            for key, rows in self._load(split, index).items():
                # Filled in place: images are too many to have them twice.
                if key not in columns:
                    columns[key] = np.empty((sum(lengths), *rows.shape[1:]), rows.dtype)
                columns[key][end : end + length] = rows
            end += length
        return columns

    def _load(self, split: str, index: int, *keys: str) -> Arrays:
        """An episode's arrays, all or these."""
        path = self.file(split, index)
        try:
            with np.load(path) as rows:
                return {key: rows[key] for key in keys or rows.files}
        except (OSError, *BROKEN_NPZ) as error:
            path.unlink(missing_ok=True)
            raise UserError(f"{path} is damaged; run the same command again to make it anew") from error

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
