"""Locks between processes: freed when their holder ends; a process that must wait learns who holds them."""

import errno
import functools
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from utils.system.files import disk_errors

# Errors of flock if the file system or its server has no locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
GRACE = 0.5  # Seconds; `is_held` takes a lock for a moment.


class Held(Exception):
    """Raised if another process has the lock; the text names it: ' (process 12 on host)', or '' if unknown."""


def take(path: Path, patience: float = GRACE) -> BaseFileLock:
    """Acquires the lock of the file `path`: by flock, or with '<path>.soft' if the file system has no locks.

    It is freed by `release`, with the object, or when the process ends. A soft lock of a killed process is taken over
    on the same host. The files of held locks contain the process id and host.

    Args:
        path: created if missing, with its directory; stays.
        patience: seconds to wait for another process.

    Raises:
        Held: another process has it.
        UserError: the file cannot be written or locked.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path, patience)
        if isinstance(lock, SoftFileLock):
            _say_soft()
        else:
            path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", encoding="utf-8")
    return lock


def is_held(path: Path) -> bool:
    """True if another process has the lock of `path`; creates no files."""
    if not (path.exists() or _soft(path).exists()):
        return False
    try:
        _acquire(path, 0).release()
    except Held:
        return True
    except OSError:  # No permission.
        return False
    return False


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Lets one process at a time into the block; others print who holds the lock, and wait. Removes `path` at the end.

    Raises:
        UserError: the file cannot be written or locked.
    """
    said = None
    while True:
        try:
            lock = take(path, 0)
            break
        except Held as held:
            if said is None or str(held) != said:
                said = str(held)
                print(f"Waiting: another process holds {path}{said}.", file=sys.stderr, flush=True)
            time.sleep(0.2)
    try:
        yield
    finally:
        # Before the release: a process that opened the old file notices its removal and locks the new one.
        path.unlink(missing_ok=True)
        lock.release()


@functools.cache
def _say_soft() -> None:
    print("this file system has no locks; using files '….lock.soft' instead", file=sys.stderr)


def _soft(path: Path) -> Path:
    return path.with_name(f"{path.name}.soft")


def _acquire(path: Path, patience: float) -> BaseFileLock:
    """Acquires either lock; raises Held or OSError."""
    lock: BaseFileLock
    try:
        lock = FileLock(path, patience, thread_local=False, fallback_to_soft=False)
        lock.acquire()
        return lock
    except Timeout as error:
        raise Held(_holder(path)) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        lock = SoftFileLock(_soft(path), patience, thread_local=False)
        lock.acquire()
        return lock
    except Timeout as error:
        raise Held(_holder(_soft(path))) from error


def _holder(path: Path) -> str:
    """Returns the text of `Held`."""
    with suppress(OSError, ValueError):
        pid, host, *_ = path.read_text(encoding="utf-8").splitlines()
        # A process of another host cannot be checked from here.
        advice = (
            f"; if that has ended, remove {path}" if path.suffix == ".soft" and host != socket.gethostname() else ""
        )
        return f" (process {pid} on {host}{advice})"
    return ""
