"""Behaviour cloning (BC): conditional flow matching with the independent coupling, the base policy of other agents.

One update, on a batch {(s, a)} of m windows, is paper Eq. 1 with q(z, a) = q(z) q(a):

    flow        z ~ N(0, I), t ~ U[0, 1];  step on ‖v_θ(s, t a + (1−t) z, t) − (a − z)‖²
"""

from typing import Any

import ml_collections
from jaxtyping import PRNGKeyArray

from agents import base, presets
from utils.arrays import Scalar


class Agent(base.Agent):
    """A flow that imitates the data; there is no critic."""

    UNUSED = dict.fromkeys(("best_of_n", "rho", "num_qs", "tau", "discount", "value_hidden_dims"), "BC has no critic")

    @classmethod
    def networks(cls, config: Any, action_dim: int) -> dict[str, Any]:
        """Returns name → module of every network."""
        return cls.flow_networks(config, action_dim)

    def loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """Returns the flow's loss on the batch's actions, and scalars to log."""
        return self.bc_loss(params, batch, key)


SETTINGS = base.FLOW_SETTINGS


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults of this agent."""
    return base.get_config(SETTINGS)


PRESETS = presets.presets({})
CPU = presets.CPU
