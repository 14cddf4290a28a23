"""An agent that keeps its batches."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import ml_collections

HORIZON, BATCH = 2, 32


class Recorder(flax.struct.PyTreeNode):
    """Stands in for an agent: keeps every batch it is given."""

    batches: Any
    step: jax.Array
    hyper: dict[str, jax.Array]
    config: ml_collections.FrozenConfigDict = flax.struct.field(pytree_node=False)

    @classmethod
    def create(cls, discount: float, updates: int) -> "Recorder":
        """Room for `updates` batches."""
        widths = {"observations": 3, "actions": 4, "next_observations": 3, "action_mask": 4}
        batches = {k: jnp.zeros((updates, BATCH, n)) for k, n in widths.items()}
        batches |= {k: jnp.zeros((updates, BATCH)) for k in ("rewards", "masks", "valid")}
        config = {"batch_size": BATCH, "horizon_length": HORIZON, "window_rule": "pad"}
        hyper = {"discount": jnp.float32(discount)}
        return cls(batches, jnp.int32(0), hyper, ml_collections.FrozenConfigDict(config))

    def update(self, batch):
        """Stores the batch."""
        batches = jax.tree.map(lambda kept, new: kept.at[self.step].set(new), self.batches, batch)
        return self.replace(batches=batches, step=self.step + 1), {"step": self.step, "sum": batch["rewards"].sum()}
