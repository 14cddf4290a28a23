"""Replay buffer on the device."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from utils.data.batches import Arrays
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

    def __init__(self, num_runs: int, max_steps: int, horizon: int, observation: Any, action_dim: int):
        """Allocates `max_steps` environment steps per run.

        Args:
            num_runs: size of the run axis.
            max_steps: environment steps of each run.
            horizon: H.
            observation: an example, of one step.
            action_dim: width of an action.

        Raises:
            UserError: the buffer does not fit in memory.
        """
        # An episode has one row more than steps. Windows and blocks may reach past the last row.
        rows = 2 * max_steps + 2 * (horizon + 1)
        self.horizon, self.counts = horizon, np.zeros(num_runs, np.int32)
        parts = {name: np.asarray(part) for name, part in columns(observation).items()}
        _check_memory(num_runs * rows * sum(part.nbytes for part in parts.values()))
        self.arrays = {
            **{name: jnp.zeros((num_runs, rows, *part.shape), part.dtype) for name, part in parts.items()},
            "actions": jnp.zeros((num_runs, rows, action_dim)),
            "rewards": jnp.zeros((num_runs, rows)),
            "masks": jnp.ones((num_runs, rows)),
            "terminals": jnp.ones((num_runs, rows)),
            "terminated": jnp.zeros((num_runs, rows)),
            "starts": jnp.zeros((num_runs, rows), jnp.int32),
        }

    def write(self, run: int, row: int, values: Arrays, start: int, starts: Int[np.ndarray, " k"]) -> None:
        """Writes `values` [n, ...] from `row` on and row numbers `starts` from `start` on; n, k ≤ horizon + 1."""
        for names, position in ((tuple(values), row), (("starts",), start)):
            block = values if names != ("starts",) else {"starts": starts}
            # Padded to one size, so that one program serves all. The next write replaces the padding.
            padded = {k: _pad(np.asarray(v), self.horizon + 1, float(k == "terminals")) for k, v in block.items()}
            written = _write({k: self.arrays[k] for k in names}, padded, run, position)
            self.arrays |= written

    def rows_of(self, run: int, rows: int) -> dict[str, np.ndarray]:
        """Returns the first `rows` rows of a run, for a checkpoint."""
        return {k: np.asarray(v[run, :rows]) for k, v in self.arrays.items()}

    def restore(self, run: int, rows: dict[str, np.ndarray], count: int) -> None:
        """Restores the rows that `rows_of` returned."""
        for name, values in rows.items():
            self.arrays[name] = self.arrays[name].at[run, : len(values)].set(values)
        self.counts[run] = count


def _check_memory(needed: int) -> None:
    """Raises a UserError if a buffer of `needed` bytes does not fit."""
    stats = jax.local_devices()[0].memory_stats()  # None on a CPU.
    free = stats["bytes_limit"] - stats["bytes_in_use"] if stats else free_memory()
    if needed > free:
        sizes = f"{needed / 2**30:.1f} GiB for observations, {free / 2**30:.1f} are free"
        raise UserError(f"the replay buffer needs {sizes}; use fewer --online_steps, or fewer seeds at once")


def _pad(values: Shaped[np.ndarray, " n *s"], size: int, fill: float) -> Shaped[np.ndarray, " {size} *s"]:
    padding = np.full((size - len(values), *values.shape[1:]), fill, values.dtype)
    return np.concatenate([values, padding])


@partial(jax.jit, donate_argnums=0)
def _write(arrays: Arrays, block: Arrays, run: Int[Array, ""], position: Int[Array, ""]) -> Arrays:
    def put(array: Shaped[Array, "L r *s"], values: Shaped[Array, " n *s"]) -> Shaped[Array, "L r *s"]:
        start: tuple[int | Array, ...] = (run, position, *[0] * (array.ndim - 2))
        return jax.lax.dynamic_update_slice(array, values[None].astype(array.dtype), start)

    return jax.tree.map(put, arrays, block)
