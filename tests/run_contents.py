"""What runs leave, read and compared by code of its own, which a change of the project's code does not touch."""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax.serialization import msgpack_restore


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint by the layout that utils/run/checkpoints.py states, with none of the code that is compared."""
    header, payload = path.read_bytes().split(b"\n", 1)
    if header.decode() != f"OTQL-CHECKPOINT 0001 {hashlib.sha256(payload).hexdigest()}":
        raise ValueError(f"{path.name}: another header or a wrong checksum")
    start = 8 + struct.unpack("<Q", payload[:8])[0]

    def attach(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: attach(value) for key, value in tree.items()}
        if isinstance(tree, list):
            dtype, shape, offset = tree
            return np.frombuffer(payload, np.dtype(dtype), int(np.prod(shape)), start + offset).reshape(shape)
        return tree

    return attach(msgpack_restore(payload[8:start]))


def flatten(tree: Any, name: str, names: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Yields path and value of every leaf of a nested dict, keys renamed."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{name}/{names.get(key, key)}", names)
    else:
        yield name, tree


def runs(save: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yields the directory of each run below `save` and its checkpoints, the newest last."""
    for path in sorted(save.rglob("flags.json")):
        yield path.parent, sorted(path.parent.glob("checkpoints/*.ckpt"))


def contents(save: Path, names: dict[str, str]) -> dict[str, Any]:
    """Returns all that is compared below `save`: cells of CSV files, arrays of datasets and agents, settings of agents.

    Args:
        names: renames columns, settings and keys of the agent.
    """
    found: dict[str, Any] = {}
    for path in sorted(path for path in save.rglob("*.csv") if path.name != "timing.csv"):
        name, (header, *lines, end) = path.relative_to(save), path.read_bytes().decode().split("\n")
        columns = [names.get(column, column) for column in header.split(",")]
        found |= {f"{name} columns": columns, f"{name} after the last line": end}
        for number, line in enumerate(lines, 1):
            cells = zip(columns, line.split(","), strict=True)
            found |= {f"{name} row {number} {column}": cell for column, cell in cells}
    for path in sorted(save.rglob("*.npz")):
        with np.load(path) as file:
            found |= {f"{path.relative_to(save)} {key}": file[key] for key in file.files}
    for directory, checkpoints in runs(save):
        name = str(directory.relative_to(save))
        settings = json.loads((directory / "flags.json").read_text())["config"]
        found |= flatten(settings, f"{name} config", names)
        found[f"{name} last checkpoint"] = checkpoints[-1].name
        found |= flatten(read_checkpoint(checkpoints[-1])["agent"], f"{name} agent", names)
    return found


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Says in what two such dicts first differ; '' if in nothing."""
    for name in old | new:
        if name not in old or name not in new:
            return f"{name}: {'no longer there' if name in old else 'not there before'}"
        a, b = old[name], new[name]
        kinds = [(str(x.dtype), x.shape) if isinstance(x, np.ndarray) else type(x) for x in (a, b)]
        if kinds[0] != kinds[1]:
            return f"{name}: {kinds[0]} → {kinds[1]}"
        if not isinstance(a, np.ndarray) and a != b:
            return f"{name}: {a} → {b}"
        if isinstance(a, np.ndarray) and a.tobytes() != b.tobytes():
            return f"{name}: {np.sum(a != b)} of {a.size} numbers differ, {a[a != b][:1]} → {b[a != b][:1]}"
    return ""


def timings(save: Path) -> dict[Path, bytes]:
    """Returns the rows of timing.csv up to each run's last checkpoint, which a run that starts over would lose.

    Raises:
        ValueError: there is no checkpoint, or no row before it.
    """
    found = {}
    for directory, checkpoints in runs(save):
        last, path = int(checkpoints[-1].stem.removeprefix("step_")), directory / "timing.csv"
        header, *rows = path.read_bytes().splitlines(keepends=True)
        found[path] = header + b"".join(row for row in rows if int(row.split(b",")[0]) <= last)
    if not found or any(rows.count(b"\n") < 2 for rows in found.values()):
        raise ValueError("there is no checkpoint with rows before it")
    return found


def files(directory: Path) -> dict[str, int]:
    """Returns a hash of each file below a directory but locks, which name the process that held them."""
    found = sorted(path for path in directory.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(directory)): hash(path.read_bytes()) for path in found}
