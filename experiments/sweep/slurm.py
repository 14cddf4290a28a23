"""Jobs of a sweep on Slurm, submitted as one array by submitit."""

import contextlib
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.sweep.jobs import Job
from utils.errors import UserError


class SlurmJob:
    """A job as a callable for submitit, which calls `checkpoint` at a timeout or a preemption."""

    def __init__(self, job: Job):
        self.job = job
        self.process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Runs the command to its end and returns its exit code.

        Raises:
            RuntimeError: the command failed; Slurm then marks the job as failed too.
        """
        process = self.process = self.job.start()
        while process.poll() is None:  # Short waits: the signal handler needs the lock that `wait` would hold.
            time.sleep(0.2)
        self.job.record(process.returncode)
        if process.returncode:
            raise RuntimeError(f"{self.job.name} ended with exit code {process.returncode}; see {self.job.log}")
        return 0

    def checkpoint(self) -> Any:
        """Lets the command save and exit, and requeues the job."""
        import submitit

        if self.process:
            self.process.terminate()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.process.pid, 0)
        return submitit.helpers.DelayedSubmission(SlurmJob(self.job))


def submit(jobs: Sequence[Job], folder: Path, parameters: dict[str, Any]) -> list[str]:
    """Submits the jobs as one array and returns their Slurm ids in the same order.

    Args:
        folder: directory of submitit's files.
        parameters: keyword arguments of submitit's `SlurmExecutor.update_parameters`.

    Raises:
        UserError: submitit or Slurm is not installed, or Slurm rejects the jobs.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("--backend=slurm needs submitit: pip install submitit") from error
    try:
        # Timeouts are not limited: each requeued job has made progress.
        executor = submitit.SlurmExecutor(folder=folder / "slurm", max_num_timeout=10_000)
        executor.update_parameters(**parameters)
        with executor.batch():
            submitted = [executor.submit(SlurmJob(job)) for job in jobs]
        return [job.job_id for job in submitted]
    except Exception as error:  # submitit has no exception class for failures of sbatch.
        raise UserError(f"Slurm rejects the jobs: {' '.join(str(error).split())}") from error


def live_ids() -> set[str]:
    """Returns the Slurm ids of this user's pending and running jobs ('123_4' in an array), empty without Slurm.

    Raises:
        UserError: Slurm does not answer.
    """
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    try:
        return set(subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.split())
    except FileNotFoundError:
        return set()
    except (OSError, subprocess.CalledProcessError) as error:
        # An empty set would submit every queued job a second time.
        message = " ".join(str(getattr(error, "stderr", "") or error).split())
        raise UserError(f"squeue failed: {message}; try again") from error
