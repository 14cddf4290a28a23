"""Measurements in a process of their own, one JSON object a line in a file: rates, and a trace of the kernels.

    python -m experiments.gpu_check.measure FILE SPECIFICATIONS

A specification with 'trace' is a number of updates to trace (`trace_kernels`); any other one is a rate of
`experiments.bench.updates`. Each result is in the file before the next measurement starts, so that a process that is
ended loses only what it was measuring.
"""

import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.bench.updates import fused, make_states, measure, new_agents
from utils.trees import tree_stack

LONGEST = 10  # kernels that a summary names


def trace_kernels(spec: dict[str, Any]) -> dict[str, Any]:
    """Traces `spec['trace']` updates of one seed, in one call of the compiled program.

    Returns:
        'kernels': name, launches and microseconds an update of the LONGEST that took most time; 'launches' and
        'microseconds' an update of all kernels; 'wall': microseconds an update on the clock.
    """
    updates = int(spec["trace"])
    agents, data = new_agents(spec)
    run = fused(tree_stack(agents), data)
    run(updates)  # Compiles.
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            clock = time.perf_counter()
            run(updates)
            seconds = time.perf_counter() - clock
        (file,) = Path(directory).rglob("*.xplane.pb")
        launches: Counter[str] = Counter()
        nanoseconds = defaultdict[str, float](float)
        for name, duration in kernel_events(jax.profiler.ProfileData.from_file(str(file))):
            launches[name] += 1
            nanoseconds[name] += duration
    longest = sorted(nanoseconds, key=lambda name: -nanoseconds[name])[:LONGEST]
    return {
        "kernels": [
            {"name": name, "launches": launches[name] / updates, "microseconds": nanoseconds[name] / 1000 / updates}
            for name in longest
        ],
        "launches": launches.total() / updates,
        "microseconds": sum(nanoseconds.values()) / 1000 / updates,
        "wall": 1e6 * seconds / updates,
    }


def kernel_events(profile: Any) -> Iterator[tuple[str, float]]:
    """Yields name and nanoseconds of every kernel of a `jax.profiler.ProfileData`; on a CPU, of every operation.

    Of a GPU's plane only the lines of its streams count, since others repeat their events by operation or module. On a
    CPU, loops and calls contain the operations inside them, and are left out.
    """
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for line in (line for plane in devices for line in plane.lines if line.name.startswith("Stream")):
        yield from ((event.name, event.duration_ns) for event in line.events)
    if devices:
        return
    hosts = [plane for plane in planes if plane.name.startswith("/host:CPU")]
    for line in (line for plane in hosts for line in plane.lines if line.name.startswith("tf_XLA")):
        for event in line.events:
            operation = event.name.partition(".")[0]
            if operation not in ("while", "call", "conditional") and "hlo_op" in dict(event.stats):
                yield event.name, event.duration_ns


def main(path: str, specs: list[dict[str, Any]]) -> None:
    """Measures all specifications, and appends each result to the file `path`."""
    with tempfile.TemporaryDirectory() as directory, open(path, "a", encoding="utf-8") as file:
        data = Path(directory) / "states.npz"
        np.savez(data, **make_states())
        for spec in specs:
            spec = spec | {"data": str(data)}
            result = trace_kernels(spec) if "trace" in spec else measure(spec)
            print(json.dumps(spec | result), file=file, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
