r"""Checkpoints that survive a kill, a full disk and a damaged file.

A file `step_0000012345.ckpt` is

    header   b"OTQL-CHECKPOINT 0001 <sha256 of the payload, 64 hex digits>\n"
    payload  uint64 (little endian) length of the tree | tree (msgpack) | raw bytes of the arrays, one after another

The tree is the state with each array replaced by the list [dtype, shape, offset into the raw bytes]; the state itself
has no lists, so this is unambiguous. Arrays are written from and read into their own memory: saving takes no memory
beyond the state, loading none beyond the result. Exceptions: a NumPy array that is not contiguous is copied while it is
written, and JAX keeps a host copy of an array on an accelerator for that array's lifetime.
"""

import errno
import hashlib
import io
import itertools
import re
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.serialization import msgpack_restore, msgpack_serialize

from utils.errors import UserError
from utils.system.files import atomic_open, temporary_name

FORMAT_VERSION = 1
_HEADER = "OTQL-CHECKPOINT {:04d} {}\n"
_HEADER_PATTERN = re.compile(rb"OTQL-CHECKPOINT (\d{4}) ([0-9a-f]{64})\n")
_HEADER_SIZE = len(_HEADER.format(0, "0" * 64))
_FILE_PATTERN = re.compile(r"step_(\d{10,})\.ckpt")


class CorruptCheckpoint(UserError):
    """Error of a checkpoint that is missing, truncated, damaged, or of another format version."""


def save(directory: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Writes `state` as the checkpoint of `step`, then removes all but the `keep` newest up to `step`.

    Checkpoints of later steps are removed too: the run was resumed from an earlier one. Runs that resume together
    (`load_common`) need keep >= 2, since a kill can fall between the saves of two directories.

    Args:
        directory: that of one run's checkpoints; created if missing.
        step: number of updates done, >= 0.
        state: nested dict with str keys. Leaves: NumPy or JAX arrays and scalars of any dtype but object and
            structured, bool, int (64 bits), float, str, bytes, None.
        keep: number of checkpoints to keep.

    Returns:
        the file written.

    Raises:
        UserError: the disk is full or the directory read-only; earlier checkpoints are intact.
        TypeError: a leaf of another type; nothing is written.
    """
    arrays: list[np.ndarray | jax.Array] = []
    tree = msgpack_serialize(_detach(state, arrays))
    path = path_of(directory, step)
    # Files of killed saves take space on a disk that may be nearly full.
    _remove(directory.glob(temporary_name(directory / "step_*.ckpt").name))
    with atomic_open(path) as file:
        file.write(_HEADER.format(FORMAT_VERSION, "0" * 64).encode())
        digest = hashlib.sha256()
        parts: Iterable[bytes | memoryview] = itertools.chain([struct.pack("<Q", len(tree)), tree], map(_raw, arrays))
        for part in parts:
            digest.update(part)
            file.write(part)
        file.seek(0)
        file.write(_HEADER.format(FORMAT_VERSION, digest.hexdigest()).encode())
    kept = [s for s in saved_steps(directory) if s <= step][-max(keep, 1) :]
    _remove(path_of(directory, s) for s in saved_steps(directory) if s not in kept)
    return path


def load(path: Path) -> dict[str, Any]:
    """Reads the state that `save` wrote to `path`, with writable NumPy arrays of the same dtype, shape and bits.

    Raises:
        CorruptCheckpoint: missing, truncated, damaged or of another format version.
        UserError: the file cannot be read for another reason, such as its permissions.
    """
    with _open_verified(path) as file:
        (size,) = struct.unpack("<Q", file.read(8))
        tree = msgpack_restore(file.read(size))
        return _attach(tree, file, file.tell())


def saved_steps(directory: Path) -> list[int]:
    """Returns the steps with a checkpoint in `directory`, ascending, damaged ones included."""
    matches = map(_FILE_PATTERN.fullmatch, (path.name for path in directory.glob("step_*.ckpt")))
    return sorted(int(match[1]) for match in matches if match)


def valid_steps(directory: Path) -> list[int]:
    """Returns the steps with a valid checkpoint in `directory`, ascending; reads every file once."""
    valid = []
    for step in saved_steps(directory):
        with suppress(CorruptCheckpoint), _open_verified(path_of(directory, step)):
            valid.append(step)
    return valid


def load_latest(directory: Path) -> tuple[int, dict[str, Any]] | None:
    """Loads (step, state) of the newest valid checkpoint in `directory`; None if there is none."""
    found = load_common([directory])
    return found and (found[0], found[1][0])


def load_common(directories: Sequence[Path]) -> tuple[int, list[dict[str, Any]]] | None:
    """Loads the newest step that is valid in all `directories`; removes nothing, so the run may still be training.

    Each newer step that cannot be used gives one line on stderr: the file, the problem (damaged, or missing because the
    run was killed between two saves), and the step used instead.

    Returns:
        (step, one state per directory), or None if no step is valid in all of them.
    """
    problems: list[str] = []
    found = None
    for step in sorted({step for directory in directories for step in saved_steps(directory)}, reverse=True):
        try:
            found = step, [load(path_of(directory, step)) for directory in directories]
            break
        except CorruptCheckpoint as error:
            problems.append(str(error))
    outcome = f"step {found[0]} is used instead" if found else "no earlier one is valid, training starts over"
    for problem in problems:
        print(f"checkpoint {problem}; {outcome}", file=sys.stderr)
    return found


def path_of(directory: Path, step: int) -> Path:
    """Returns the file of a checkpoint."""
    return directory / f"step_{step:010d}.ckpt"


def _remove(paths: Iterable[Path]) -> None:
    """Deletes files, ignoring those that cannot be deleted."""
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _raw(array: np.ndarray | jax.Array) -> memoryview:
    """Returns the bytes of `array` in row-major order, [nbytes]; a view if it is contiguous."""
    return np.asarray(array).reshape(-1).view(np.uint8).data


def _detach(tree: Any, arrays: list) -> Any:
    """Copies `tree`, moving each array to `arrays` and leaving [dtype, shape, offset in bytes] in its place."""
    if isinstance(tree, dict):
        return {key: _detach(value, arrays) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        raise TypeError(f"a checkpoint holds dicts, arrays and scalars, not {type(tree).__name__}")
    if not isinstance(tree, np.ndarray | jax.Array):
        return tree
    # JAX's typed keys have a dtype that NumPy lacks: their key data can be saved instead.
    known = isinstance(tree.dtype, np.dtype) and not tree.dtype.hasobject
    # The str of an extension dtype such as bfloat16 is that of plain bytes; its name is unique.
    name = (tree.dtype.name if tree.dtype.kind == "V" else tree.dtype.str) if known else ""
    if not known or np.dtype(name) != tree.dtype:
        raise TypeError(f"a checkpoint cannot hold arrays of dtype {tree.dtype}")
    offset = sum(array.nbytes for array in arrays)
    arrays.append(tree)
    return [name, list(tree.shape), offset]


def _attach(tree: Any, file: io.BufferedReader, start: int) -> Any:
    """Inverts `_detach`, with the raw bytes of the arrays in `file` from `start` on."""
    if isinstance(tree, dict):
        return {key: _attach(value, file, start) for key, value in tree.items()}
    if not isinstance(tree, list):
        return tree
    name, shape, offset = tree
    array = np.empty(shape, np.dtype(name))
    file.seek(start + offset)
    file.readinto(_raw(array))
    return array


@contextmanager
def _open_verified(path: Path) -> Iterator[io.BufferedReader]:
    """Checks header and checksum of `path`, so that no bad byte is parsed, and opens it at its payload."""
    try:
        with open(path, "rb") as file:
            header = _HEADER_PATTERN.fullmatch(file.read(_HEADER_SIZE))
            if header is None:
                raise CorruptCheckpoint(f"{path}: not a checkpoint, or truncated")
            if int(header[1]) != FORMAT_VERSION:
                raise CorruptCheckpoint(f"{path}: format version {int(header[1])}, this code reads {FORMAT_VERSION}")
            if hashlib.file_digest(file, "sha256").hexdigest() != header[2].decode():
                raise CorruptCheckpoint(f"{path}: wrong checksum, truncated or damaged")
            file.seek(_HEADER_SIZE)
            yield file
    except OSError as error:
        # An older checkpoint can replace a missing or unreadable file; other errors are the user's to solve.
        kind = CorruptCheckpoint if error.errno in (errno.ENOENT, errno.EIO) else UserError
        raise kind(f"{path}: {error.strerror}") from error
