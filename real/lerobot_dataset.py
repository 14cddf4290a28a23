"""Datasets written by lerobot-record (LeRobotDataset v3), read with pyarrow alone: no torch, no LeRobot, no JAX.

A dataset is a folder: `meta/info.json` (fps and features), `data/*/*.parquet` (one row per frame: features without
videos, `episode_index`, `frame_index`, `timestamp`), `meta/episodes/*/*.parquet` (one row per episode, with the place
of its videos), `videos/`. A frame holds a state and the action taken in it; the state after the last action is not
recorded.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.system.files import read_json

_INDICES = ("episode_index", "frame_index", "timestamp")
WITHOUT = "make a copy without that episode: lerobot-edit-dataset --new_repo_id=…"
_OUTCOMES = ("next.success", "next.reward")


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode of T frames.

    Attributes:
        states: [T, o] float32, the concatenated features.
        actions: [T, a] float32.
        outcomes: 'next.success' [T] and 'next.reward' [T], if recorded.
    """

    states: np.ndarray
    actions: np.ndarray
    outcomes: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Recording:
    """One dataset.

    Attributes:
        root: its folder.
        fps: frames per second.
        widths: feature → its number of state dimensions, in their order.
        cameras: feature of images → 'video' or 'image', their storage; see real/lerobot_images.py.
        state_names: [o] names of the state dimensions.
        action_names: [a] names of the action dimensions.
        episodes: by index.
    """

    root: Path
    fps: float
    widths: dict[str, int]
    cameras: dict[str, str]
    state_names: list[str]
    action_names: list[str]
    episodes: list[Episode]


def read_recording(root: Path, features: list[str], action: str) -> Recording:
    """Reads a dataset.

    Args:
        root: its folder.
        features: features of the state in this order, such as 'observation.state', and cameras.
        action: feature of the action, such as 'action'.

    Raises:
        UserError: the dataset does not exist, or a feature or frame is missing or not a finite number.
    """
    info = read_json(root / "meta" / "info.json", missing_ok=True)
    if not {"features", "fps", "total_frames", "codebase_version"} <= info.keys():
        raise UserError(f"there is no LeRobotDataset in {root} (meta/info.json); give what lerobot-record wrote")
    if not str(info["codebase_version"]).startswith("v3."):
        raise UserError(
            f"{root} is a LeRobotDataset {info['codebase_version']}, not v3; "
            "convert it: python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 --repo-id=<name>"
        )
    dtypes = {feature: info["features"].get(feature, {}).get("dtype") for feature in features}
    cameras = {feature: dtype for feature, dtype in dtypes.items() if dtype in ("video", "image")}
    features = [feature for feature in features if feature not in cameras]
    names = {feature: _names(root, info["features"], feature) for feature in [*features, action]}
    found = [name for name in _OUTCOMES if name in info["features"]]
    columns = _read_columns(root, [*names, *_INDICES, *found])
    rows = len(columns["timestamp"])
    if rows != info["total_frames"]:
        raise UserError(
            f"{root} holds {rows} frames, its info.json says {info['total_frames']}: a file of data/ is missing, "
            "or the recording was interrupted; end lerobot-record properly, or record again"
        )
    parts = [_matrix(root, name, columns[name], len(names[name])) for name in features]
    states = np.concatenate([np.zeros((rows, 0), np.float32), *parts], axis=1)
    actions = _matrix(root, action, columns[action], len(names[action]))
    outcomes = {name: np.asarray(columns[name], np.float32).reshape(rows) for name in found}
    episodes = [
        Episode(states[part], actions[part], {name: values[part] for name, values in outcomes.items()})
        for part in _parts(root, columns, float(info["fps"]))
    ]
    widths = {feature: len(names[feature]) for feature in features}
    state_names = [name for feature in features for name in names[feature]]
    return Recording(root, float(info["fps"]), widths, cameras, state_names, names[action], episodes)


def _names(root: Path, features: dict[str, dict], feature: str) -> list[str]:
    """Returns the names of a feature's dimensions; checks that it exists and is a vector."""
    if feature not in features:
        offered = ", ".join(name for name in features if name.startswith(("observation", "action")))
        raise UserError(f"{root} has no feature '{feature}'; it has {offered}")
    about = features[feature]
    if about["dtype"] not in ("float32", "float64") or len(about["shape"]) != 1:
        raise UserError(f"'{feature}' in {root} is of kind {about['dtype']}, not a vector of numbers; leave it out")
    given = about.get("names")
    if isinstance(given, dict):  # Some robots write {"axes": [...]}.
        given = next(iter(given.values()))
    return list(given) if given else [f"{feature}.{i}" for i in range(about["shape"][0])]


def _read_columns(root: Path, names: list[str]) -> dict[str, Any]:
    """Reads columns of all data files, in order."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("recordings are parquet files, which need pyarrow: pip install pyarrow") from error
    paths = sorted((root / "data").glob("*/*.parquet"))
    if not paths:
        raise UserError(f"{root} holds no data (data/*/*.parquet); nothing was recorded")
    tables = []
    for path in paths:
        with reading(path):
            tables.append(parquet.read_table(path, columns=names, partitioning=None))
        if missing := set(names) - set(tables[-1].column_names):
            raise UserError(f"{path} lacks the column '{min(missing)}'; record again")
    table = pyarrow.concat_tables(tables)
    return {name: table[name].to_numpy() for name in names}


def _matrix(root: Path, name: str, column: np.ndarray, width: int) -> np.ndarray:
    """Returns a column of vectors as [N, width] float32; checks width and values."""
    widths = {np.size(row) for row in column}
    if widths != {width}:
        found = ", ".join(map(str, sorted(widths)))
        raise UserError(f"'{name}' in {root} has {found} numbers per frame, its info.json says {width}; record again")
    matrix = np.stack([np.asarray(row, np.float32).reshape(width) for row in column])
    if not np.isfinite(matrix).all():
        row = int(np.argwhere(~np.isfinite(matrix))[0][0])
        raise UserError(f"'{name}' in {root} is NaN or infinite (first in frame {row}); {WITHOUT}")
    return matrix


def _parts(root: Path, columns: dict[str, Any], fps: float) -> list[slice]:
    """Returns the rows of each episode; checks that no frame is missing."""
    index, frame, time = (np.asarray(columns[name]) for name in _INDICES)
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    if not np.array_equal(index[starts], np.arange(len(starts))):
        raise UserError(f"the episodes of {root} are not numbered 0, 1, 2 …; edit it by LeRobot's tools only")
    parts = [slice(start, end) for start, end in zip(starts, [*starts[1:], len(index)], strict=True)]
    for episode, part in enumerate(parts):
        steps = np.diff(frame[part], prepend=-1)
        gaps = np.abs(np.diff(time[part], prepend=time[part][0] - 1 / fps) - 1 / fps) > 0.5 / fps
        if (broken := np.flatnonzero((steps != 1) | gaps)).size:
            raise UserError(
                f"episode {episode} of {root} lacks frames (after {broken[0]} of {len(steps)}, at {fps:g} fps); "
                f"{WITHOUT}"
            )
    return parts


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns errors in reading a parquet file into a one-line `UserError`."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"{path} cannot be read ({reason}): is the recording still running, or was it killed?"
        ) from error


def read_episodes(root: Path) -> dict[int, dict[str, Any]]:
    """Returns index of an episode → row of meta/episodes with the place of its videos ('videos/<camera>/…'), if any."""
    from pyarrow import parquet

    rows = []
    for path in sorted((root / "meta" / "episodes").glob("*/*.parquet")):
        with reading(path):
            names = [name for name in parquet.read_schema(path).names if name.startswith(("episode_index", "videos/"))]
            rows += parquet.read_table(path, columns=names, partitioning=None).to_pylist()
    return {row["episode_index"]: row for row in rows}


def video_path(root: Path, camera: str, row: dict[str, Any]) -> Path:
    """Returns the video file of a camera and an episode, given the episode's row of `read_episodes`."""
    chunk, file = (row[f"videos/{camera}/{what}"] for what in ("chunk_index", "file_index"))
    return root / "videos" / camera / f"chunk-{chunk:03d}" / f"file-{file:03d}.mp4"


def videos_of(root: Path, episode: int) -> list[str]:
    """Returns the place of each camera's video of an episode, as 'FILE from 12.0 s to 18.3 s'."""
    row = read_episodes(root).get(episode, {})
    cameras = [key.split("/")[1] for key in row if key.endswith("/from_timestamp")]
    times = [(row[f"videos/{camera}/{end}_timestamp"] for end in ("from", "to")) for camera in cameras]
    return [
        f"{video_path(root, camera, row)} from {start:.1f} s to {end:.1f} s"
        for camera, (start, end) in zip(cameras, times, strict=True)
    ]
