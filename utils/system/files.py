"""Files that are there in full or not at all, and disk errors as one line."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]  # of the project


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an `OSError` met while writing `path` (full or read-only disk …) into a one-line `UserError`."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space" if full else "make its directory writable, or choose another one"
        reason = error.strerror or str(error)
        raise UserError(f"{reason}: cannot write {path}; {advice}, then start the same command again") from error


def temporary_name(path: Path) -> Path:
    """The name under which `atomic_open` writes `path`; a leftover is overwritten by the next write of `path`."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """Opens `path` for binary writing so that, killed at any moment, it holds either the old or the new content.

    Written next to `path`, fsync'd and renamed on leaving the block; on an exception `path` is untouched and the
    temporary file removed. Missing folders are made. One writer at a time per path.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    temporary = temporary_name(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_directory(path.parent)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """`path.write_bytes(data)`, atomic and durable; see `atomic_open`."""
    with atomic_open(path) as file:
        file.write(data)


def atomic_write_text(path: Path, text: str) -> None:
    """`path.write_text(text)` in UTF-8, atomic and durable; see `atomic_open`."""
    atomic_write_bytes(path, text.encode(errors="surrogateescape"))


def _sync_directory(directory: Path) -> None:
    """Makes the entries of `directory` (a rename) durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync for folders; their renames are durable or nothing can be done.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of this project.

    Raises:
        UserError: it is damaged.
    """
    advice = "restore it, or move its directory elsewhere and start again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {advice}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (no JSON object); {advice}")
    return content
