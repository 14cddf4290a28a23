"""Memory and cores that this process may use."""

import contextlib
import hashlib
import os
import platform
from pathlib import Path


def free_memory() -> float:
    """Returns the bytes that processes on this machine may still allocate; infinity if the system does not tell.

    What does not fit can so be rejected with a one-line error: the system would kill the process.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


def usable_cores() -> int:
    """Returns the number of cores that this process may use; a batch system can assign fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_digest() -> str:
    """Returns a name for this kind of CPU, equal where compiled code can be shared."""
    cpu = [platform.machine()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        cpu += [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return hashlib.sha256("".join(sorted(set(cpu))).encode()).hexdigest()[:12]
