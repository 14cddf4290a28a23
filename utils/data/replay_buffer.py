"""Replay buffer on the device, and the episodes of one lane that fill it."""

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
    """The rows that each run has experienced, laid out as in utils/data/batches.py, one array [runs, rows, ...] each.

    The last row of an episode under way is its current state; it becomes a transition when the next action is known.
    `counts` [lanes] is how many of `starts` a window may begin at: whole windows, and all of a finished episode.
    """

    def __init__(self, lanes: int, max_steps: int, horizon: int, observation: Any, action_dim: int):
        """Makes room for `max_steps` environment steps of each lane, with observations of the kind of `observation`."""
        # An episode has a row more than it has steps. Windows and blocks may reach past the last row.
        rows = 2 * max_steps + 2 * (horizon + 1)
        self.horizon, self.counts = horizon, np.zeros(lanes, np.int32)
        parts = {name: np.asarray(part) for name, part in columns(observation).items()}
        _check_memory(lanes * rows * sum(part.nbytes for part in parts.values()))
        self.arrays = {
            **{name: jnp.zeros((lanes, rows, *part.shape), part.dtype) for name, part in parts.items()},
            "actions": jnp.zeros((lanes, rows, action_dim)),
            "rewards": jnp.zeros((lanes, rows)),
            "masks": jnp.ones((lanes, rows)),
            "terminals": jnp.ones((lanes, rows)),
            "terminated": jnp.zeros((lanes, rows)),
            "starts": jnp.zeros((lanes, rows), jnp.int32),
        }

    def write(self, lane: int, row: int, values: Arrays, start: int, starts: Int[np.ndarray, " k"]) -> None:
        """Writes `values` [n, ...] from `row` on and row numbers `starts` from `start` on; n, k ≤ horizon + 1."""
        for names, position in ((tuple(values), row), (("starts",), start)):
            block = values if names != ("starts",) else {"starts": starts}
            # Of one size, so that one program serves all; what is written too much is overwritten by what comes next.
            padded = {k: _pad(np.asarray(v), self.horizon + 1, float(k == "terminals")) for k, v in block.items()}
            written = _write({k: self.arrays[k] for k in names}, padded, lane, position)
            self.arrays |= written

    def rows_of(self, lane: int, rows: int) -> dict[str, np.ndarray]:
        """The first `rows` rows of a lane, for a checkpoint."""
        return {k: np.asarray(v[lane, :rows]) for k, v in self.arrays.items()}

    def restore(self, lane: int, rows: dict[str, np.ndarray], count: int) -> None:
        """Puts back what `rows_of` gave."""
        for name, values in rows.items():
            self.arrays[name] = self.arrays[name].at[lane, : len(values)].set(values)
        self.counts[lane] = count


def _check_memory(needed: int) -> None:
    """Refuses a buffer that does not fit."""
    stats = jax.local_devices()[0].memory_stats()  # None on a processor.
    free = stats["bytes_limit"] - stats["bytes_in_use"] if stats else free_memory()
    if needed > free:
        sizes = f"{needed / 2**30:.1f} GiB for observations, {free / 2**30:.1f} are free"
        raise UserError(f"the experience of all steps takes {sizes}; take fewer --online_steps, or fewer seeds at once")


def _pad(values: Shaped[np.ndarray, " n *s"], size: int, fill: float) -> Shaped[np.ndarray, " {size} *s"]:
    padding = np.full((size - len(values), *values.shape[1:]), fill, values.dtype)
    return np.concatenate([values, padding])


@partial(jax.jit, donate_argnums=0)
def _write(arrays: Arrays, block: Arrays, lane: Int[Array, ""], position: Int[Array, ""]) -> Arrays:
    def put(array: Shaped[Array, "L r *s"], values: Shaped[Array, " n *s"]) -> Shaped[Array, "L r *s"]:
        start: tuple[int | Array, ...] = (lane, position, *[0] * (array.ndim - 2))
        return jax.lax.dynamic_update_slice(array, values[None].astype(array.dtype), start)

    return jax.tree.map(put, arrays, block)
