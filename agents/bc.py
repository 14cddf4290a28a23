"""BC flow: conditional flow matching with the independent coupling. The base policy of the other agents."""

from typing import Any

import ml_collections
from jaxtyping import PRNGKeyArray

from agents import base, presets
from utils.arrays import Scalar
from utils.networks import VectorField


class Agent(base.Agent):
    """A flow that imitates the data; it has no critic."""

    TARGETS = {"flow": "flow_tau"}

    @classmethod
    def networks(cls, config: Any, action_dim: int) -> dict[str, Any]:
        """Name → module of every network."""
        return {"flow": VectorField(tuple(config.actor_hidden_dims), action_dim)}

    def loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """Flow matching on the batch's actions and fresh noise."""
        return self.bc_loss(params, batch, key)


def get_config() -> ml_collections.ConfigDict:
    """Defaults of this agent."""
    return base.get_config()


PRESETS = presets.presets({})
CPU = presets.CPU
