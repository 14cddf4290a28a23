"""Files that are written in full or not at all, disk errors as one line, and the folders that modules lie in."""

import errno
import json
import os
import sys
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
        raise UserError(f"{reason}: cannot write {path}; {advice}, then rerun the same command") from error


def temporary_name(path: Path) -> Path:
    """Returns the name under which `atomic_open` writes `path`; the next write of `path` overwrites a leftover."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """Opens `path` for binary writing so that, after a kill at any moment, it holds either the old or the new content.

    The content is written next to `path`, fsync'd, and renamed on leaving the block; on an exception `path` stays
    untouched and the temporary file is removed. Missing folders are created. One writer at a time per path.

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
    """Writes bytes to a file, atomically and durably; see `atomic_open`."""
    with atomic_open(path) as file:
        file.write(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes text to a file in UTF-8, atomically and durably; see `atomic_open`."""
    atomic_write_bytes(path, text.encode(errors="surrogateescape"))


def _sync_directory(directory: Path) -> None:
    """Makes the entries of `directory` (a rename) durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync for folders: their renames are durable, or nothing can be done.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file, atomically and durably; see `atomic_open`. Sequences that JSON lacks become lists."""
    atomic_write_text(path, json.dumps(content, indent=2, sort_keys=True, default=list) + "\n")


def read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    """Reads a JSON file of this project.

    Args:
        path: the file.
        missing_ok: return {} if there is no such file.

    Raises:
        UserError: it is damaged.
        OSError: it cannot be read.
    """
    advice = "restore it, or move its directory elsewhere and rerun the same command"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if missing_ok:
            return {}
        raise
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {advice}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (no JSON object); {advice}")
    return content


def find_modules_in(directory: str | Path) -> None:
    """Lets this process, and those that it starts, import modules that lie in a directory.

    The directory is searched last: no file there takes the place of one of the project or of a library.
    """
    path = os.path.realpath(directory)
    if path not in sys.path:
        sys.path.append(path)
