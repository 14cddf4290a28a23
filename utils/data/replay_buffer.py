"""Replay buffer on the device."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from utils.data.batches import Arrays
from utils.devices import RUNS, Layout, part_with
from utils.errors import UserError
from utils.observations import columns
from utils.system.resources import free_memory


class ReplayBuffer:
    """Experience of several runs, laid out as a dataset (utils/data/batches.py) with a leading run axis.

    The last row of an unfinished episode is its current state; it becomes a transition when the next action is known.

    Attributes:
        arrays: the arrays of a prepared dataset, each [num_runs, rows, ...].
        counts: [num_runs], how many of `starts` can begin a window: whole windows, and all of a finished episode.
    """

    def __init__(
        self,
        num_runs: int,
        max_steps: int,
        horizon: int,
        observation: Any,
        action_dim: int,
        layout: Layout | None = None,
    ):
        """Allocates `max_steps` environment steps per run.

        Args:
            num_runs: size of the run axis.
            max_steps: environment steps of each run.
            horizon: H.
            observation: an example, of one step.
            action_dim: width of an action.
            layout: of the runs; by default all on JAX's default device.

        Raises:
            UserError: the buffer does not fit in memory.
        """
        self.layout = layout or Layout(num_runs)
        self.horizon, self.counts = horizon, np.zeros(num_runs, np.int32)
        shapes = _shapes(max_steps, horizon, observation, action_dim)
        needed = self.layout.own_runs * replay_bytes(max_steps, horizon, observation, action_dim)
        _check_memory(needed, self.layout.first)
        fill = {"masks": 1, "terminals": 1}
        self.arrays = {
            name: jnp.full(
                (self.layout.slots, *leaf.shape), fill.get(name, 0), leaf.dtype, device=self.layout.sharding(RUNS)
            )
            for name, leaf in shapes.items()
        }

    def write(self, run: int, row: int, values: Arrays, start: int, starts: Int[np.ndarray, " k"]) -> None:
        """Writes `values` [n, ...] from `row` on and row numbers `starts` from `start` on; n, k ≤ horizon + 1."""
        for names, position in ((tuple(values), row), (("starts",), start)):
            block = values if names != ("starts",) else {"starts": starts}
            # Padded to one size, so that one program serves all. The next write replaces the padding.
            padded = {k: _pad(np.asarray(v), self.horizon + 1, float(k == "terminals")) for k, v in block.items()}
            self.arrays |= _write({k: self.arrays[k] for k in names}, padded, run, position, self.layout)

    def rows_of(self, run: int, rows: int) -> dict[str, np.ndarray]:
        """Returns the first `rows` rows of a run, for a checkpoint."""
        arrays, index = part_with(self.arrays, run)
        return {k: np.asarray(v[index, :rows]) for k, v in arrays.items()}

    def restore(self, run: int, rows: dict[str, np.ndarray], count: int) -> None:
        """Restores the rows that `rows_of` returned."""
        for name, values in rows.items():
            self.arrays |= _write({name: self.arrays[name]}, {name: values}, run, 0, self.layout)
        self.counts[run] = count


def replay_bytes(max_steps: int, horizon: int, observation: Any, action_dim: int) -> int:
    """Returns the bytes of one run's arrays; the arguments are those of `ReplayBuffer`."""
    shapes = _shapes(max_steps, horizon, observation, action_dim)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in shapes.values())


def _shapes(max_steps: int, horizon: int, observation: Any, action_dim: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of one run's arrays; the arguments are those of `ReplayBuffer`."""
    # An episode has one row more than steps. Windows and blocks may reach past the last row.
    rows = 2 * max_steps + 2 * (horizon + 1)
    parts = {name: np.asarray(part) for name, part in columns(observation).items()}
    shapes = {name: jax.ShapeDtypeStruct((rows, *part.shape), part.dtype) for name, part in parts.items()}
    shapes["actions"] = jax.ShapeDtypeStruct((rows, action_dim), jnp.float32)
    names = ("rewards", "masks", "terminals", "terminated")
    shapes |= dict.fromkeys(names, jax.ShapeDtypeStruct((rows,), jnp.float32))
    return shapes | {"starts": jax.ShapeDtypeStruct((rows,), jnp.int32)}


def _check_memory(needed: int, device: jax.Device) -> None:
    """Raises a UserError if a buffer of `needed` bytes does not fit on a device."""
    stats = device.memory_stats()  # None on a CPU.
    free = stats["bytes_limit"] - stats["bytes_in_use"] if stats else free_memory()
    if needed > free:
        sizes = f"{needed / 2**30:.1f} GiB for observations, {free / 2**30:.1f} are free"
        raise UserError(f"the replay buffer needs {sizes}; use fewer --online_steps, or fewer seeds at once")


def _pad(values: Shaped[np.ndarray, " n *s"], size: int, fill: float) -> Shaped[np.ndarray, " {size} *s"]:
    padding = np.full((size - len(values), *values.shape[1:]), fill, values.dtype)
    return np.concatenate([values, padding])


@partial(jax.jit, donate_argnums=0, static_argnums=4)
def _write(arrays: Arrays, block: Arrays, run: Int[Array, ""], position: Int[Array, ""], layout: Layout) -> Arrays:
    def own(shared: Any, arrays: Arrays) -> Arrays:
        """Writes the block on the device that has the run; others write what they have."""
        block, run, position = shared

        def put(array: Shaped[Array, "L r *s"], values: Shaped[Array, " n *s"]) -> Shaped[Array, "L r *s"]:
            index, inside = layout.own_index(run, len(array))
            start: tuple[int | Array, ...] = (index, position, *[0] * (array.ndim - 2))
            block = values[None].astype(array.dtype)
            block = jnp.where(inside, block, jax.lax.dynamic_slice(array, start, block.shape))
            return jax.lax.dynamic_update_slice(array, block, start)

        return jax.tree.map(put, arrays, block)

    return layout.over_runs(own, (block, run, position), arrays)
