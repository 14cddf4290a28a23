"""SIGTERM and SIGINT: handlers that end a run at a step boundary, and what child processes get of them."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from utils.errors import UserError


class Interrupted(Exception):
    """SIGTERM or SIGINT was received; `signum` is its number."""

    def __init__(self, signum: int):
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class PreemptionGuard:
    """Records the first SIGTERM or SIGINT, so that a run can stop at a safe point; a second one acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before = {signum: signal.signal(signum, self._note) for signum in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, signum: int, _: Any) -> None:
        self.received = signum
        signal.signal(signum, signal.SIG_DFL)
        print(f"\n{signal.Signals(signum).name}: saving at the next step boundary", file=sys.stderr, flush=True)

    def check(self) -> None:
        """Raises `Interrupted` if a signal was received."""
        if self.received:
            raise Interrupted(self.received)

    def release(self) -> None:
        """Restores the signal handlers from before."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def __enter__(self) -> "PreemptionGuard":
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()


@contextmanager
def sigint_ignored() -> Iterator[None]:
    """Lets processes started in the block ignore Ctrl-C from their first instruction on."""
    if threading.current_thread() is not threading.main_thread():  # Others cannot set handlers.
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def run_program(command: Sequence[str], name: str, end: int = signal.SIGTERM) -> None:
    """Runs another program to its end; sends it the signal `end` on SIGTERM.

    Args:
        command: the program and its arguments.
        name: of the program, for messages.
        end: signal that ends it.

    Raises:
        UserError: it does not exist, or failed. Interrupted: it was ended by a signal.
        SystemExit: with code 2 if it ended so: it has printed a one-line error.
    """
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {error.strerror}") from error
    with child:
        before = signal.signal(signal.SIGTERM, lambda *_: child.send_signal(end))
        try:
            code = child.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
    if code < 0 or code > 128:
        raise Interrupted(-code if code < 0 else code - 128)
    if code == 2:
        sys.exit(2)
    if code:
        raise UserError(f"{name} ended with exit code {code}; rerun the same command to resume")
