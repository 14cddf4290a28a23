"""A recording as lerobot-record writes it, with the content that a test wants."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

VIDEO = "observation.images.front"


def write_recording(
    root: Path,
    lengths: tuple[int, ...] = (4, 6),
    *,
    fps: int = 30,
    joints: tuple[str, ...] = ("a.pos", "b.pos", "c.pos"),
    columns: dict[str, Any] | None = None,
    keep: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Writes a LeRobotDataset v3 with random states and actions; returns its columns.

    Args:
        root: the folder.
        lengths: frames of each episode.
        fps: frames a second.
        joints: names of state and action.
        columns: further columns, or others in place of its own.
        keep: which frames to write, if not all.
        seed: of the numbers.
    """
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    random, total = np.random.default_rng(seed), sum(lengths)
    frame = np.concatenate([np.arange(length) for length in lengths])
    data = {
        "observation.state": random.normal(3, 2, (total, len(joints))).astype(np.float32),
        "action": random.uniform(-40, 20, (total, len(joints))).astype(np.float32),
        "episode_index": np.repeat(np.arange(len(lengths)), lengths),
        "frame_index": frame,
        "timestamp": (frame / fps).astype(np.float32),
    } | (columns or {})
    if keep is not None:
        data = {name: values[keep] for name, values in data.items()}
    vector = {"dtype": "float32", "shape": [len(joints)], "names": list(joints)}
    features = {"observation.state": vector, "action": vector, VIDEO: {"dtype": "video", "shape": [3, 4, 4]}}
    for name in data.keys() - features.keys() - {"episode_index", "frame_index", "timestamp"}:
        shape = [data[name].shape[1] if data[name].ndim == 2 else 1]
        features[name] = {"dtype": "float32", "shape": shape, "names": None}
    info = {"codebase_version": "v3.0", "fps": fps, "features": features, "total_frames": len(data["timestamp"])}
    info["total_episodes"] = len(lengths)
    for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
        (root / folder).mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    ends = np.cumsum(lengths) / fps
    episodes = {"episode_index": list(range(len(lengths))), "length": list(lengths)}
    episodes |= {f"videos/{VIDEO}/{what}": [0] * len(lengths) for what in ("chunk_index", "file_index")}
    episodes[f"videos/{VIDEO}/from_timestamp"] = [0.0, *ends[:-1].tolist()]
    episodes[f"videos/{VIDEO}/to_timestamp"] = ends.tolist()
    parquet.write_table(pyarrow.table(episodes), root / "meta/episodes/chunk-000/file-000.parquet")
    half = len(data["timestamp"]) // 2
    for number, part in enumerate((slice(None, half), slice(half, None))):
        table = pyarrow.table({name: _column(values[part]) for name, values in data.items()})
        parquet.write_table(table, root / f"data/chunk-000/file-{number:03d}.parquet")
    return data


def _column(values: Any) -> Any:
    """Vectors as lists, numbers as numbers."""
    return list(values) if isinstance(values, list) or values.ndim == 2 else values
