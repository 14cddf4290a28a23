"""Child processes that end in time, and what they print."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.system.files import ROOT

GRACE = 30.0  # seconds that a child has to save after SIGTERM
MEASURE = "experiments.gpu_check.measure"


class Budget:
    """Time that the whole command has left, on a monotonic clock."""

    def __init__(self, seconds: float):
        self._start, self._seconds = time.monotonic(), seconds

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self._seconds - self.spent)


@contextmanager
def child(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    """Starts a process with its output in the file `log`; ends it, and all that it has started, on leaving."""
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        try:
            yield process
        finally:
            end(process)


def end(process: subprocess.Popen) -> None:
    """Ends a process that still runs: SIGTERM, and after GRACE a kill of all that it has started."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait(process: subprocess.Popen, seconds: float, poll: Callable[[], None] = lambda: None) -> bool:
    """Waits for a process, calling `poll` meanwhile; returns False if it still runs after `seconds`."""
    until = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() >= until:
            return False
        poll()
        time.sleep(0.1)
    poll()
    return True


def measurements(
    specs: list[dict[str, Any]], environment: dict[str, str], seconds: float, log: Path
) -> tuple[list[dict[str, Any]], str]:
    """Runs specifications one after the other in one child process (`measure.py`).

    Args:
        specs: of the measurements.
        environment: of the child. seconds: that it may take. log: gets its output.

    Returns:
        the results up to the end of the time, or to the first failure; and why there are fewer than specifications.
    """
    file = log.with_name(f"{log.stem}.jsonl")
    file.unlink(missing_ok=True)
    with child([sys.executable, "-m", MEASURE, str(file), json.dumps(specs)], environment, log) as process:
        in_time = wait(process, seconds)
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    results = [json.loads(line) for line in lines]
    if len(results) == len(specs):
        return results, ""
    if not in_time:
        return results, f"the time was over after {len(results)} of {len(specs)} measurements"
    return results, f"exit code {process.returncode}: {last_line(log)}"


def last_line(log: Path) -> str:
    """Returns the last line of a log that is not empty."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"
