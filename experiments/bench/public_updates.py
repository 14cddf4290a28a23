"""Updates per second of one agent of the public QAM code, driven as by its main.py: one jitted update per Python step.

`experiments.bench` runs this program with a Python that has that code's dependencies, and with PYTHONPATH set to a
checkout of github.com/ColinQiyangLi/qam; it imports nothing of this project. Its argument is a specification as JSON;
it prints the measurement as JSON, or without an argument the known agents and versions.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

WARM_UP = 3  # Updates before the measurement; public agents with a temperature compile in each of these.


def timed(run: Callable[[int], Any], seconds: float) -> dict[str, Any]:
    """Measures the speed of `run(n)`, which does n updates, waits for them and returns their losses.

    Returns:
        updates per second over about `seconds`, the number of updates, and the losses after 2 · WARM_UP updates.
    """
    run(WARM_UP)
    start = time.perf_counter()
    losses = run(WARM_UP)
    count = max(2 * WARM_UP, round(seconds * WARM_UP / (time.perf_counter() - start)))
    start = time.perf_counter()
    run(count)
    return {"rate": count / (time.perf_counter() - start), "updates": count, "losses": losses}


def versions() -> dict[str, str]:
    """Returns the versions and the device that the measurement depends on."""
    import flax
    import jax
    import jaxlib

    device, cores = jax.devices()[0], len(os.sched_getaffinity(0))
    libraries = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__}
    # The device kind of a CPU is just 'cpu'.
    name = f"{cores} CPU cores" if device.platform == "cpu" else device.device_kind
    return {"python": sys.version.split()[0], **libraries, "device": name}


def transitions(states: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts rows of states (see utils/data/batches.py) to the transitions that the public code gets from OGBench."""
    acted = np.flatnonzero(states["terminals"] == 0)
    rows = {key: states[key][acted] for key in ("observations", "actions", "rewards", "masks")}
    return {**rows, "next_observations": states["observations"][acted + 1], "terminals": states["terminals"][acted + 1]}


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Creates the agent, trains it on the data and returns the result of `timed`."""
    import jax

    # Modules of the public code, not of this project.
    agents, data = (importlib.import_module(name) for name in ("agents", "utils.datasets"))
    config = importlib.import_module(f"agents.{spec['agent']}").get_config()
    for key, value in spec["settings"].items():
        if key in config:
            config[key] = tuple(value) if isinstance(value, list) else value
    with np.load(spec["data"]) as file:
        dataset = data.Dataset.create(**transitions(dict(file)))
    np.random.seed(0)
    example = dataset.sample(())
    agent = agents.agents[config["agent_name"]].create(0, example["observations"], example["actions"], config)

    def run(count: int) -> dict[str, float]:
        nonlocal agent
        for _ in range(count):
            batch = dataset.sample_sequence(
                config["batch_size"], sequence_length=config["horizon_length"], discount=config["discount"]
            )
            agent, info = agent.update(batch)
        jax.block_until_ready(agent)
        return {key: float(value) for key, value in info.items() if "loss" in key}

    return timed(run, spec["seconds"])


if __name__ == "__main__":
    known = importlib.import_module("agents").agents
    measurement = measure(json.loads(sys.argv[1])) if sys.argv[1:] else {"agents": sorted(known)}
    print(json.dumps(measurement | {"versions": versions()}))
