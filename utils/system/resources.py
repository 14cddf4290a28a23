"""How much memory is free, so that what does not fit is refused in a line: the system would end the process."""

from pathlib import Path


def free_memory() -> float:
    """Bytes that processes on this machine may still take; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")
