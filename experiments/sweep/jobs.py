"""Jobs of a sweep: one command each, with a log and a recorded outcome, run on this machine."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.run import checkpoints
from utils.run.directory import beyond, checkpoint_dir, read_summary, settings_conflict
from utils.system.files import atomic_write_text, disk_errors, read_json
from utils.system.locks import is_held
from utils.system.signals import PreemptionGuard

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = (*(128 + number for number in SIGNALS), *(-number for number in SIGNALS), -signal.SIGKILL)
GPU_MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: unique in the sweep.
        command: arguments after the Python interpreter.
        folder: directory of the log and the outcome.
        directories: of the runs that the command trains.
        total: last step of each run.
        settings: of each run, as its flags.json has them; they tell it from another run in the same directory.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    directories: tuple[Path, ...]
    total: int
    settings: tuple[dict[str, Any], ...] = field(compare=False)

    @property
    def log(self) -> Path:
        """The file of the command's output."""
        return self.folder / f"{self.name}.log"

    @property
    def outcome(self) -> Path:
        """The file of the command's exit code and last line."""
        return self.folder / f"{self.name}.json"

    def progress(self) -> float:
        """Returns the share of the job's steps that is saved in checkpoints."""
        saved = [_saved(directory, self.total) for directory in self.directories]
        return sum(saved) / (self.total * len(saved))

    def conflict(self) -> str:
        """Returns which directory holds a run of other settings, and how they differ; '' if none does."""
        for directory, settings in zip(self.directories, self.settings, strict=True):
            if difference := settings_conflict(directory, settings) or beyond(directory, self.total):
                return f"{directory} {difference}"
        return ""

    def state(self, queued: bool = False) -> tuple[str, str]:
        """Returns 'other', 'done', 'diverged', 'running', 'queued', 'failed', 'stopped' or 'waiting', and a note."""
        if conflict := self.conflict():
            return "other", conflict
        finished = sum(_finished(directory, self.total) for directory in self.directories)
        if finished == len(self.directories):
            return "done", ""
        diverged = [line for directory in self.directories if (line := _divergence(directory))]
        if diverged and len(diverged) + finished == len(self.directories):
            return "diverged", "; ".join(diverged)
        progress = self.progress()
        note = f"{progress:.0%}" if progress else ""
        if any(is_held(directory / ".lock") for directory in self.directories):
            return "running", note
        if queued:
            return "queued", note
        if self.outcome.exists():
            outcome = read_json(self.outcome)
            if outcome["code"] not in (0, *INTERRUPTED):
                return "failed", outcome["line"]
        return ("stopped" if progress else "waiting"), note

    def start(self, environment: dict[str, str] | None = None, cores: Iterable[int] = ()) -> subprocess.Popen:
        """Starts the command on `cores` (default: all) and appends its output to the log."""
        with disk_errors(self.log):
            self.folder.mkdir(parents=True, exist_ok=True)
            log = self.log.open("ab")
        with log, _pinned(cores):
            return subprocess.Popen(
                [sys.executable, *self.command],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=os.environ | (environment or {}),
            )

    def record(self, code: int) -> None:
        """Writes the outcome: the exit code, and the last line of the log."""
        text = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
        lines = [line for line in text.splitlines() if line.strip()]
        outcome = {"code": code, "line": lines[-1].strip() if lines else "no output"}
        atomic_write_text(self.outcome, json.dumps(outcome) + "\n")


@contextlib.contextmanager
def _pinned(cores: Iterable[int]) -> Iterator[None]:
    """Pins processes started in the block to `cores` and blocks SIGUSR2 in them.

    Slurm sends the signal that asks for a checkpoint to every process of a job; the job's own passes on SIGTERM.
    """
    before = os.sched_getaffinity(0)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    os.sched_setaffinity(0, set(cores) or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])


def _finished(directory: Path, total: int) -> bool:
    summary = read_summary(directory) or {}
    return "diverged" not in summary and summary.get("step", -1) >= total


def _divergence(directory: Path) -> str:
    """Returns where and how the run diverged, or ''."""
    summary = read_summary(directory) or {}
    return f"{directory}: {summary['diverged']} at step {summary['step']}" if "diverged" in summary else ""


def _saved(directory: Path, total: int) -> int:
    """Returns the step of the newest checkpoint, at most `total`."""
    return min(max(checkpoints.saved_steps(checkpoint_dir(directory)), default=0), total)


def run_here(jobs: Sequence[Job], slots: int, gpus: Sequence[str]) -> Iterator[Job]:
    """Runs jobs on this machine, `slots` at a time, and yields each one when it ends.

    Args:
        gpus: assigned to the slots round-robin as CUDA_VISIBLE_DEVICES; slots that share a GPU get equal parts of its
            memory. Without GPUs, the slots share the cores.

    Raises:
        Interrupted: a signal arrived; the running jobs were terminated and have saved.
    """
    waiting, free = list(jobs), list(range(slots))
    running: dict[int, tuple[Job, subprocess.Popen]] = {}
    cores = sorted(os.sched_getaffinity(0))
    share = {}
    if slots > len(gpus) > 0 and GPU_MEMORY not in os.environ:
        # By default, each JAX process takes three quarters of a GPU's memory.
        share = {GPU_MEMORY: f"{0.9 / math.ceil(slots / len(gpus)):.2f}"}
    signals = PreemptionGuard()
    try:
        while waiting or running:
            while waiting and free:
                slot, job = free.pop(0), waiting.pop(0)
                environment = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} | share if gpus else {}
                # With as many slots as cores or more, one core each.
                own = () if gpus or slots == 1 else cores[slot % len(cores) :: min(slots, len(cores))]
                running[slot] = job, job.start(environment, own)
            time.sleep(0.2)
            signals.check()
            for slot, (job, process) in list(running.items()):
                if process.poll() is not None:
                    job.record(process.returncode)
                    del running[slot]
                    free.append(slot)
                    yield job
    finally:
        for _, process in running.values():
            process.terminate()
        for job, process in running.values():
            job.record(process.wait())
        signals.release()
