"""Devices of one machine: which of them a command uses, and how its runs, or the batch of one, are spread over them.

Runs do not depend on each other, so spread runs exchange nothing: each device trains its own (`over_runs`). A spread
batch is one program over all devices, between which XLA sums gradients and whatever else joins the rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from utils.errors import UserError
from utils.trees import tree_slice

ALL = "all"
RUNS, BATCH = "runs", "batch"  # what is spread: the name of the mesh's axis


def parse_devices(text: str) -> int | tuple[int, ...] | None:
    """Returns what --devices asks for: a count, numbers of devices, or None for all.

    Raises:
        UserError: the text is none of these.
    """
    if text == ALL:
        return None
    *numbers, last = (part.strip() for part in text.split(","))
    if last:
        numbers.append(last)
    indices = tuple(int(number) for number in numbers if number.isdecimal())
    if len(indices) < len(numbers) or not indices or len(set(indices)) < len(indices) or text.strip() == "0":
        raise UserError(f"--devices={text}: give all, a count such as 2, or different numbers from 0 such as 0,2")
    return indices if "," in text else indices[0]


def pick_devices(text: str) -> tuple[jax.Device, ...]:
    """Returns the devices that --devices asks for.

    Raises:
        UserError: it is no such text, or the machine has fewer devices.
    """
    asked, present = parse_devices(text), tuple(jax.local_devices())
    if asked is None:
        return present
    most = asked if isinstance(asked, int) else max(asked) + 1
    if most > len(present):
        numbers = "only number 0" if len(present) == 1 else f"numbers 0 to {len(present) - 1}"
        kind = present[0].device_kind.upper() if present[0].platform == "cpu" else present[0].device_kind
        raise UserError(f"--devices={text}: JAX finds {len(present)} × {kind} here, {numbers}")
    return present[:asked] if isinstance(asked, int) else tuple(present[index] for index in asked)


@dataclass(frozen=True)
class Layout:
    """Places of a command's arrays.

    Attributes:
        num_runs: runs to train. devices: that take part; empty for JAX's default device alone.
        axis: RUNS or BATCH, what is spread over the devices.
    """

    num_runs: int
    devices: tuple[jax.Device, ...] = ()
    axis: str = RUNS

    @classmethod
    def spread(cls, num_runs: int, devices: Sequence[jax.Device], axis: str = RUNS) -> "Layout":
        """Returns the layout over as many of the devices as make training faster."""
        devices = tuple(devices)
        if axis == RUNS:
            each = math.ceil(num_runs / len(devices))
            devices = devices[: math.ceil(num_runs / each)]
        if devices == (jax.local_devices()[0],):
            return cls(num_runs)
        return cls(num_runs, devices, axis)

    @property
    def slots(self) -> int:
        """Length of the run axis: the runs, and copies of the last one up to a multiple of the devices."""
        if self.axis == BATCH or not self.devices:
            return self.num_runs
        return math.ceil(self.num_runs / len(self.devices)) * len(self.devices)

    @property
    def own_runs(self) -> int:
        """Runs, or copies of one, on each device."""
        return self.slots if self.axis == BATCH else self.slots // (len(self.devices) or 1)

    @property
    def first(self) -> jax.Device:
        """First device."""
        return self.devices[0] if self.devices else jax.local_devices()[0]

    @property
    def parts(self) -> int:
        """Number of parts of a run's batch, each on one device."""
        return len(self.devices) if self.axis == BATCH else 1

    @property
    def mesh(self) -> Mesh:
        """Mesh of the devices."""
        return Mesh(np.array(self.devices), (self.axis,))

    def sharding(self, *names: str | None) -> NamedSharding | None:
        """Returns the sharding of arrays whose axes have these names; None if the default device has all."""
        if not self.devices:
            return None
        return NamedSharding(self.mesh, PartitionSpec(*(name if name == self.axis else None for name in names)))

    def stacked(self, tree: Any) -> Any:
        """Places a tree with a leading run axis, whose length becomes `slots`."""
        if not self.devices:
            return tree
        rows = np.minimum(np.arange(self.slots), self.num_runs - 1)
        if self.slots > self.num_runs:
            tree = jax.tree.map(lambda leaf: leaf if len(leaf) == self.slots else leaf[rows], tree)
        return jax.device_put(tree, self.sharding(RUNS))

    def shared(self, tree: Any) -> Any:
        """Places a tree that every device reads as a whole."""
        return jax.device_put(tree, self.sharding())

    def rows(self, tree: Any) -> Any:
        """Places the rows of batches, [updates, runs, m, ...]."""
        return jax.device_put(tree, self.sharding(None, RUNS, BATCH)) if self.devices else tree

    def split(self, batch: Any) -> Any:
        """Spreads the rows of one batch, [m, ...], inside a program."""
        return self._constrained(batch, BATCH)

    def over_runs(self, function: Callable[..., Any], shared: Any, *stacked: Any) -> Any:
        """Returns function(shared, *stacked) inside a program; each device has its own part of the run axis."""
        if self.axis == BATCH:
            return self._constrained(function(shared, *stacked))
        if len(self.devices) < 2:
            return function(shared, *stacked)
        own, whole = PartitionSpec(RUNS), PartitionSpec()
        return _shard_map(function, self.mesh, (whole, *[own] * len(stacked)), own)(shared, *stacked)

    def own_index(self, run: Any, count: int) -> tuple[Any, Any]:
        """Returns, inside `over_runs`, a run's index among the `count` runs of this device, and whether it is there."""
        if self.axis == BATCH or len(self.devices) < 2:
            return run, True
        index = run - jax.lax.axis_index(RUNS) * count
        inside = (index >= 0) & (index < count)
        return jnp.where(inside, index, 0), inside

    def _constrained(self, tree: Any, *names: str) -> Any:
        if self.axis != BATCH or not self.devices:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.sharding(*names))

    def describe(self, found: int) -> str:
        """Returns one line on the runs or batches of each device; '' if there is only one.

        Args:
            found: number of devices that the command may use.
        """
        if found < 2:
            return ""
        used = f"{len(self.devices) or 1} of {found} devices"
        if self.axis == BATCH:
            return f"each batch is spread over {used}"
        runs = "1 run" if self.num_runs == 1 else f"{self.num_runs} runs"
        each = self.own_runs
        idle = "; --shard_batch spreads its batches" if self.num_runs == 1 else ""
        return f"{runs} on {used}, {'at most ' if self.slots > self.num_runs else ''}{each} on each{idle}"


def _shard_map(function: Callable[..., Any], mesh: Mesh, inputs: Any, outputs: Any) -> Callable[..., Any]:
    """Maps `function` over the devices of a mesh; older versions of JAX have it under other names."""
    if hasattr(jax, "shard_map"):
        return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
    from jax.experimental.shard_map import shard_map

    old: Any = shard_map
    return old(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_rep=False)


def part_with(tree: Any, index: int) -> tuple[Any, int]:
    """Returns the part of a stacked tree that is on the device with run `index`, and the run's index in that part.

    So one run is read, or acts, on its own device, and nothing is copied between devices.
    """
    leaf = jax.tree.leaves(tree)[0]
    if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
        return tree, index
    spans = [shard.index[0].indices(len(leaf)) for shard in leaf.addressable_shards]
    number = next(number for number, (start, stop, _) in enumerate(spans) if start <= index < stop)
    return jax.tree.map(lambda leaf: leaf.addressable_shards[number].data, tree), index - spans[number][0]


def run_of(tree: Any, index: int) -> Any:
    """Returns one run's part of a stacked tree, on the run's own device."""
    return tree_slice(*part_with(tree, index))
