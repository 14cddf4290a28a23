"""Kernels that one training update launches on a GPU, counted without one; see `experiments.bench`.

JAX's CUDA compiler compiles for a described GPU that is absent, here an H100. With the paper's networks an update is so
short that its time is mostly that of its launches, about 2 to 4 µs each, so their number is what to keep low.

Every measurement is a process of its own: run as a program, this file compiles one agent's programs.
"""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.bench.updates import ACTION_DIM, OBSERVATION_DIM, OWN, resolve, run_json
from utils.devices import Layout
from utils.errors import UserError
from utils.output.tables import markdown_table
from utils.rollout.policy import act
from utils.run.update_loop import UPDATE, _train_on_device
from utils.trees import tree_stack

OURS = [sys.executable, "-m", "experiments.bench.kernels"]
COMPILERS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
ROWS = 1000  # Of the described dataset; the programs are the same for any.
# An H100 with 80 GB, as XLA describes it.
DEVICE = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Operations of a compiled program that are kernels; all others are bookkeeping on the host.
KERNELS = ("fusion", "custom-call", "copy", "copy-start", "sort", "reduce", "dot", "scatter", "gather", "transpose")


def compiler_installed() -> bool:
    """True if JAX has a CUDA compiler, whether or not there is a GPU."""
    return any(find_spec("jax_plugins") and find_spec(name) for name in COMPILERS)


def compare(agents: list[str], seeds: list[int], overrides: dict[str, str]) -> tuple[str, bool]:
    """Counts the kernels of one update of each agent and number of seeds in parallel, with the paper's settings.

    Args:
        agents: names of files in agents/.
        seeds: numbers of seeds in parallel.
        overrides: settings that replace the preset's, field → text.

    Returns:
        a report in Markdown, and whether all programs compiled.

    Raises:
        UserError: JAX's CUDA compiler is not installed.
    """
    if not compiler_installed():
        raise UserError("kernels are counted by JAX's CUDA compiler; install it with: pip install 'jax[cuda13]'")
    rows, failures, found = [], [], {}
    for name, count in tqdm([(name, count) for name in agents for count in seeds], desc="programs"):
        spec = {"agent": name, "settings": OWN.get(name, {}) | overrides, "num_seeds": count}
        try:
            found = run_json([*OURS, json.dumps(spec)], os.environ | {"JAX_PLATFORMS": "cpu"})
        except RuntimeError as error:
            failures.append(f"{name}, {count} seeds, failed: {error}")
            continue
        entries = ("kernels", "products", "update_seconds", "act_seconds")
        rows.append([name, str(count), *(f"{found[entry]:.0f}" for entry in entries)])
    header = ["agent", "seeds", "kernels", "of them products", "update, s", "acting, s"]
    lines = ["## Kernels of an update, compiled for an H100", "", markdown_table(header, rows), ""]
    lines += [
        "A loop of unknown length counts as one iteration; rare loops, which usually run not at all, count apart."
    ]
    lines += [f"Seconds: of compilation on this machine, jax {found['jax']}." if found else ""]
    return "\n".join(lines + [f"- {failure}" for failure in failures]), not failures


@dataclass
class Computation:
    """A computation of a compiled program.

    Attributes:
        kernels: kind of each kernel, without those of loops.
        loops: name of the body, and number of iterations or None.
        branches: names of the computations of which a conditional runs one.
    """

    kernels: list[str] = field(default_factory=list)
    loops: list[tuple[str, int | None]] = field(default_factory=list)
    branches: list[list[str]] = field(default_factory=list)


class Program:
    """A compiled program.

    Args:
        text: as XLA prints it after optimisation.
    """

    def __init__(self, text: str):
        self.computations = dict(_computations(text))
        (self.entry,) = re.findall(r"^ENTRY %?([\w.\-]+)", text, re.M)

    def total(self, name: str) -> int:
        """Returns the kernels of a computation and its loops, and of conditionals those of the longest branch."""
        own = self.computations[name]
        loops = sum((times or 1) * self.total(body) for body, times in own.loops)
        return len(own.kernels) + loops + sum(max(map(self.total, names)) for names in own.branches)

    def products(self, name: str) -> int:
        """Returns the number of kernels with a matrix product."""
        own = self.computations[name]
        return own.kernels.count("product") + sum((times or 1) * self.products(body) for body, times in own.loops)

    def update(self) -> str:
        """Returns the name of the body of the loop over updates."""
        return max((body for body, _ in self.computations[self.entry].loops), key=self.total)


def _computations(text: str) -> Iterator[tuple[str, Computation]]:
    """Yields name and content of each computation of a program's text."""
    found: Computation | None = None
    for line in text.splitlines():
        if (head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)) and not line.startswith(" "):
            found = Computation()
            yield head[1], found
        elif line.startswith("}"):
            found = None
        elif found is not None and (operation := re.search(r"= .*? ([a-z][a-z\-]*)\(", line)):
            _add(found, operation[1], line)


def _add(computation: Computation, kind: str, line: str) -> None:
    """Enters one operation in its computation."""
    if kind == "while":
        body, times = re.search(r"body=%?([\w.\-]+)", line), re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        assert body
        computation.loops.append((body[1], int(times[1]) if times else None))
    elif kind == "conditional":
        listed = re.search(r"branch_computations=\{([^}]*)\}", line)
        names = (
            re.findall(r"[\w.\-]+", listed[1])
            if listed
            else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
        )
        computation.branches.append(names)
    elif kind in KERNELS:
        product = re.match(r"(?:ROOT )?%?\S*(?:gemm|matmul)", line.lstrip()) or re.search(
            r'target="\S*(?:gemm|matmul)', line
        )
        computation.kernels.append("product" if product else kind)


def described_device() -> Any:
    """Returns the H100 that programs are compiled for."""
    import jax._src.xla_bridge as xla_bridge
    from jax.experimental import topologies

    with contextlib.suppress(Exception):  # Of any type: the compiler is there, its device is not.
        xla_bridge.discover_pjrt_plugins()
    return topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=DEVICE).devices


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Compiles the update and the acting program of an agent, and counts the update's kernels.

    Args:
        spec: `agent`, `settings` and `num_seeds`.
    """
    update, act_program = lowered(spec["agent"], spec["settings"], spec["num_seeds"])
    started = time.perf_counter()
    program = Program(update.compile().as_text())
    updated = time.perf_counter()
    act_program.compile()
    body = program.update()
    return {
        "kernels": program.total(body),
        "products": program.products(body),
        "update_seconds": updated - started,
        "act_seconds": time.perf_counter() - updated,
        "jax": jax.__version__,
    }


def lowered(agent: str, settings: dict[str, Any], num_seeds: int) -> tuple[Any, Any]:
    """Returns the update and the acting program for the described device, not compiled."""
    mesh = jax.sharding.Mesh(described_device(), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    module, config = resolve({"agent": agent, "settings": settings})
    width = config.horizon_length * ACTION_DIM
    example = {
        "observations": np.zeros((8, OBSERVATION_DIM), np.float32),
        "actions": np.zeros((8, width), np.float32),
    }
    data = {
        "observations": np.zeros((ROWS, OBSERVATION_DIM), np.float32),
        "actions": np.zeros((ROWS, ACTION_DIM), np.float32),
        **{name: np.zeros(ROWS, np.float32) for name in ("rewards", "masks", "terminals", "terminated")},
        "starts": np.zeros(ROWS, np.int32),
    }

    def create() -> Any:
        return tree_stack([module.Agent.create(jax.random.PRNGKey(0), example, config)] * num_seeds)

    def described(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    agents, arrays = jax.tree.map(lambda x: described(*x.shape, dtype=x.dtype), (jax.eval_shape(create), data))
    keys, number = described(num_seeds, 2, dtype=jnp.uint32), described(dtype=jnp.int32)
    jax.default_backend = lambda: "gpu"  # The code chooses its program by it.
    update = _train_on_device.lower(agents, arrays, keys, number, Layout(num_seeds), UPDATE)
    rows = described(50, OBSERVATION_DIM, dtype=jnp.float32), described(2, dtype=jnp.uint32)
    numbers = described(50, dtype=jnp.int32)
    return update, act.lower(agents.replace(opt_state=()), number, *rows, numbers, numbers)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
