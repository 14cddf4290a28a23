"""Recordings made through LeRobot's API, with the content that a test wants."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lerobot.datasets import LeRobotDataset

STATE, ACTION = "observation.state", "action"


def write_recording(
    root: Path,
    lengths: tuple[int, ...] = (4, 6),
    *,
    fps: int = 30,
    joints: tuple[str, ...] = ("a.pos", "b.pos", "c.pos"),
    columns: dict[str, np.ndarray] | None = None,
    success: tuple[bool, ...] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Writes a dataset with random states and actions; returns its columns.

    Args:
        root: the folder.
        lengths: frames of each episode.
        fps: frames a second.
        joints: names of state and action.
        columns: further columns, or others in place of its own.
        success: of each episode, as otql-rollout records it; None: not recorded.
        seed: of the numbers.
    """
    random, total = np.random.default_rng(seed), sum(lengths)
    data = {
        STATE: random.normal(3, 2, (total, len(joints))).astype(np.float32),
        ACTION: random.uniform(-40, 20, (total, len(joints))).astype(np.float32),
    } | (columns or {})
    if success is not None:
        ends = np.concatenate(
            [(np.arange(length) == length - 1) & good for length, good in zip(lengths, success, strict=True)]
        )
        data |= {"next.success": ends, "next.reward": ends.astype(np.float32) - 1}
    features: dict[str, Any] = {}
    for name, values in data.items():
        width = values.shape[1] if values.ndim == 2 else 1
        names = list(joints) if name in (STATE, ACTION) else None
        features[name] = {"dtype": str(values.dtype), "shape": (width,), "names": names}
    dataset, row = LeRobotDataset.create("local/it", fps, features, root=root, robot_type="arm"), 0
    for length in lengths:
        for _ in range(length):
            dataset.add_frame({name: np.reshape(values[row], -1) for name, values in data.items()} | {"task": "try"})
            row += 1
        dataset.save_episode()
    dataset.finalize()
    return data


def edit(root: Path, change: Any) -> None:
    """Changes the frames of a recording, a pandas table, on disk."""
    (path,) = (root / "data").glob("*/*.parquet")
    table = pd.read_parquet(path)
    result = change(table)
    (table if result is None else result).to_parquet(path, index=False)
