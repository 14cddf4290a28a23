"""The jobs of a sweep: one command each, run here or by Slurm, with a log and an outcome that say what became of it."""

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

from utils.errors import UserError
from utils.run import checkpoints
from utils.run.directory import beyond, checkpoint_dir, read_summary, settings_conflict
from utils.system.files import atomic_write_text, disk_errors, read_json
from utils.system.locks import is_held
from utils.system.signals import PreemptionGuard

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = (*(128 + number for number in SIGNALS), *(-number for number in SIGNALS), -signal.SIGKILL)


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: unique in the sweep. command: without the interpreter. folder: of log and outcome.
        directories: of the runs that it makes. total: step at which they end. settings: what tells each run from
            another one in its directory, as in its flags.json.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    directories: tuple[Path, ...]
    total: int
    settings: tuple[dict[str, Any], ...] = field(compare=False)

    @property
    def log(self) -> Path:
        """The file of the job's output."""
        return self.folder / f"{self.name}.log"

    @property
    def outcome(self) -> Path:
        """The file of its exit code and last line."""
        return self.folder / f"{self.name}.json"

    def progress(self) -> float:
        """The share of its steps that are saved, 1 if it is finished."""
        saved = [_saved(directory, self.total) for directory in self.directories]
        return sum(saved) / (self.total * len(saved))

    def other(self) -> str:
        """Says that a directory has a run of other settings, and of which; '' if none has."""
        for directory, settings in zip(self.directories, self.settings, strict=True):
            if difference := settings_conflict(directory, settings) or beyond(directory, self.total):
                return f"{directory} {difference}"
        return ""

    def state(self, queued: bool = False) -> tuple[str, str]:
        """Returns 'other', 'done', 'diverged', 'running', 'queued', 'failed', 'stopped' or 'waiting', and a note."""
        if other := self.other():
            return "other", other
        if all(_finished(directory, self.total) for directory in self.directories):
            return "done", ""
        diverged = [line for directory in self.directories if (line := _divergence(directory))]
        if diverged and len(diverged) + sum(_finished(d, self.total) for d in self.directories) == len(
            self.directories
        ):
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
        """Starts the command, with its output in the log."""
        with disk_errors(self.log):
            self.folder.mkdir(parents=True, exist_ok=True)
            log = self.log.open("ab")
        with log, _inherited(cores):
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
def _inherited(cores: Iterable[int]) -> Iterator[None]:
    """Gives processes that are started in the block these cores, and a deaf ear for SIGUSR2.

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
    """The newest checkpoint's step, `total` at most."""
    return min(max(checkpoints.saved_steps(checkpoint_dir(directory)), default=0), total)


# Here

MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def run_here(jobs: Sequence[Job], slots: int, gpus: Sequence[str]) -> Iterator[Job]:
    """Runs jobs on this machine, `slots` at a time; yields each one as it ends.

    Args:
        gpus: what the slots get in turn as CUDA_VISIBLE_DEVICES, with an equal share of its memory where several
            have the same; none: the cores are dealt out instead.

    Raises:
        Interrupted: a signal came; the running jobs were told and have saved.
    """
    waiting, free = list(jobs), list(range(slots))
    running: dict[int, tuple[Job, subprocess.Popen]] = {}
    cores = sorted(os.sched_getaffinity(0))
    share = {}
    if slots > len(gpus) > 0 and MEMORY not in os.environ:
        # By default JAX takes three quarters of a GPU's memory, whoever else is there.
        share = {MEMORY: f"{0.9 / math.ceil(slots / len(gpus)):.2f}"}
    signals = PreemptionGuard()
    try:
        while waiting or running:
            while waiting and free:
                slot, job = free.pop(0), waiting.pop(0)
                environment = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} | share if gpus else {}
                # As many slots as cores or more: a core each.
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


# Slurm


class SlurmJob:
    """What Slurm runs for a job: submitit calls it, and at a timeout or a preemption its `checkpoint`."""

    def __init__(self, job: Job):
        self.job = job
        self.process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Runs the command to its end; returns its exit code.

        Raises:
            RuntimeError: it failed, so that Slurm knows it too.
        """
        process = self.process = self.job.start()
        while process.poll() is None:  # The handler of signals must find no lock held for long.
            time.sleep(0.2)
        self.job.record(process.returncode)
        if process.returncode:
            raise RuntimeError(f"{self.job.name} ended with exit code {process.returncode}; see {self.job.log}")
        return 0

    def checkpoint(self) -> Any:
        """Lets the command save and end; Slurm then starts it again."""
        import submitit

        if self.process:
            self.process.terminate()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.process.pid, 0)
        return submitit.helpers.DelayedSubmission(SlurmJob(self.job))


def submit(jobs: Sequence[Job], folder: Path, parameters: dict[str, Any]) -> list[str]:
    """Submits the jobs as one array; returns Slurm's ids in the same order.

    Args:
        parameters: submitit's for its SlurmExecutor.

    Raises:
        UserError: submitit or Slurm is not there, or refuses.
    """
    submitit = _submitit()
    try:
        # No limit on how often a job that meets its time limit is put back: each time it has come further.
        executor = submitit.SlurmExecutor(folder=folder / "slurm", max_num_timeout=10_000)
        executor.update_parameters(**parameters)
        with executor.batch():
            submitted = [executor.submit(SlurmJob(job)) for job in jobs]
        return [job.job_id for job in submitted]
    except Exception as error:  # submitit has no class of its own for what sbatch says.
        raise UserError(f"Slurm takes no jobs: {' '.join(str(error).split())}") from error


def live_ids() -> set[str]:
    """Slurm's ids of this user's jobs that wait or run, '123_4' for one of an array; empty where there is no Slurm.

    Raises:
        UserError: Slurm does not answer.
    """
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    try:
        return set(subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.split())
    except FileNotFoundError:
        return set()
    except (OSError, subprocess.CalledProcessError) as error:
        # Taken for an empty queue, everything in it would be submitted again.
        said = " ".join(str(getattr(error, "stderr", "") or error).split())
        raise UserError(f"squeue does not say what is queued: {said}; try again") from error


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise UserError("--backend=slurm needs submitit: pip install submitit") from error
    return submitit
