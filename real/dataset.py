"""Recordings read through LeRobotDataset: states, actions, success and images, with every fault said in one line.

A frame holds a state and the action taken in it; the state after the last action is not recorded.
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
_OUTCOMES = ("next.success", "next.reward")
_WITHOUT = "make a copy without that episode: lerobot-edit-dataset --operation.type=delete_episodes"


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
        cameras: features of images, in their order.
        state_names: [o] names of the state dimensions.
        action_names: [a] names of the action dimensions.
        episodes: by index.
        robot_type: LeRobot's name of the robot, in whose units states and actions are.
        frames: the LeRobotDataset.
    """

    root: Path
    fps: float
    widths: dict[str, int]
    cameras: list[str]
    state_names: list[str]
    action_names: list[str]
    episodes: list[Episode]
    robot_type: str | None = None
    frames: Any = None


def read_recording(root: Path, features: list[str], action: str = "action") -> Recording:
    """Reads a dataset.

    Args:
        root: its folder.
        features: features of the state in this order, such as 'observation.state', and cameras.
        action: feature of the action.

    Raises:
        UserError: the dataset does not exist, or a feature or frame is missing or not a finite number.
    """
    frames = open_dataset(root)
    about, fps = frames.meta.features, float(frames.meta.fps)
    cameras = [name for name in features if about.get(name, {}).get("dtype") in ("video", "image")]
    states = [name for name in features if name not in cameras]
    names = {name: _names(root, about, name) for name in [*states, action]}
    found = [name for name in _OUTCOMES if name in about]
    columns = frames.hf_dataset.with_format("numpy", columns=[*names, *_INDICES, *found])[:]
    rows = len(columns["timestamp"])
    if rows != frames.meta.total_frames:
        raise UserError(f"{root} holds {rows} frames, its info.json says {frames.meta.total_frames}; record again")
    vectors = {name: _matrix(root, name, columns[name], len(names[name])) for name in names}
    joined = np.concatenate([np.zeros((rows, 0), np.float32), *(vectors[name] for name in states)], axis=1)
    outcomes = {name: np.asarray(columns[name], np.float32).reshape(rows) for name in found}
    return Recording(
        root=root,
        fps=fps,
        widths={name: len(names[name]) for name in states},
        cameras=cameras,
        state_names=[one for name in states for one in names[name]],
        action_names=names[action],
        episodes=[
            Episode(joined[part], vectors[action][part], {name: values[part] for name, values in outcomes.items()})
            for part in _parts(root, columns, fps)
        ],
        robot_type=frames.meta.robot_type,
        frames=frames,
    )


def open_dataset(root: Path) -> Any:
    """Returns the LeRobotDataset in a folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    info = read_json(root / "meta" / "info.json", missing_ok=True)
    if not {"features", "fps", "codebase_version"} <= info.keys():
        raise UserError(f"there is no LeRobotDataset in {root} (meta/info.json); give what LeRobot recorded")
    if not info.get("total_episodes"):
        raise UserError(f"{root} has no episode; nothing was recorded")
    try:
        import huggingface_hub.constants as hub
        from lerobot.datasets import LeRobotDataset
    except ImportError as error:
        raise UserError(f"recordings are read by LeRobot, which cannot be imported here ({error})") from error
    online, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True  # LeRobot would look for missing files on the hub.
    try:
        with _reading(str(root)):
            return LeRobotDataset(f"local/{root.name}", root=root, video_backend="pyav", return_uint8=True)
    finally:
        hub.HF_HUB_OFFLINE = online


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turns LeRobot's errors in reading, which are of many types, into a one-line `UserError`."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
        raise UserError(f"{what} cannot be read ({reason}): does it still record, or was it killed?") from error


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


def _matrix(root: Path, name: str, column: np.ndarray, width: int) -> np.ndarray:
    """Returns a column of vectors as [N, width] float32; checks the values."""
    matrix = np.asarray(column, np.float32).reshape(len(column), width)
    if not np.isfinite(matrix).all():
        row = int(np.argwhere(~np.isfinite(matrix))[0][0])
        raise UserError(f"'{name}' in {root} is NaN or infinite (first in frame {row}); {_WITHOUT}")
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
                f"{_WITHOUT}"
            )
    return parts


def images(recording: Recording, lengths: list[int], size: int) -> Iterator[np.ndarray]:
    """Yields the images of frames, resized to squares.

    Pillow's bilinear filter averages over the area of a pixel; the policy resizes the robot's images in the same way
    (`as_pixels` in real/lerobot_policy_otql). Nothing is cropped: images that are not square are distorted.

    Args:
        recording: from `read_recording`.
        lengths: number of frames of each episode, from its first.
        size: side of the squares, in pixels.

    Yields:
        uint8 [C, size, size, 3], C cameras, in the order of episodes and frames.

    Raises:
        UserError: a file or a frame is missing or damaged.
    """
    from PIL import Image

    begin = 0
    for number, (episode, length) in enumerate(zip(recording.episodes, lengths, strict=True)):
        for frame in range(length):
            with _reading(f"an image of frame {frame} of episode {number} of {recording.root}"):
                row = recording.frames[begin + frame]
                views = [row[camera] for camera in recording.cameras]
            pixels = [view if view.dtype.itemsize == 1 else (view * 255).round().byte() for view in views]
            arrays = [one.permute(1, 2, 0).numpy() for one in pixels]
            yield np.stack(
                [
                    one
                    if one.shape[:2] == (size, size)
                    else np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BILINEAR))
                    for one in arrays
                ]
            )
        begin += len(episode.actions)
