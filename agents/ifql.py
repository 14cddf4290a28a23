"""Implicit flow Q-learning (IFQL): in-sample expectile values, a BC flow, and best-of-N at acting.

One update, on a batch {(s, a, R, s')} of m windows:

    value    V step on |κ − 1(u < 0)| u²,  u = Q̄(s, a) − V(s),  Q̄ = mean − ρ std of the target critics
    critic   TD step on (Q_k(s, a) − y)²,  y = R + γ^H mask V(s')
    flow     v step on ‖v(s, t a + (1−t) z, t) − (a − z)‖²

V(s) is the κ-expectile of Q̄ over the data's actions: the mean at κ = 0.5, tending to the maximum as κ → 1. Training
samples no action. Acting draws N = 32 samples of v̄, the Polyak copy of v (v itself where flow_tau is 1), and keeps the
one with the largest min_k Q_k.

This is IDQL (arXiv 2304.10573) with a flow as its policy, as in the public code of FQL and QAM, and follows QAM's
`agents/ifql.py` where that departs from IDQL: Q̄ is mean − ρ std, not the minimum of two, and the online critics rank,
not their targets. (IDQL can also sample by the expectile's weights; for evaluation it takes the best.) The bootstrap
V(s') is the online V, without gradient and without ρ. Unlike in QAM's code, invalid windows have zero weight in the
value loss too.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, PRNGKeyArray

from agents import base, presets
from utils.arrays import Observations, Scalar
from utils.networks import StateValue


class Agent(base.Agent):
    """IFQL."""

    @classmethod
    def networks(cls, config: Any, action_dim: int) -> dict[str, Any]:
        """Returns name → module of every network."""
        return super().networks(config, action_dim) | {"value": StateValue(tuple(config.value_hidden_dims))}

    def loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """Returns the TD loss, the expectile loss of V and flow matching on the data, and scalars to log."""
        critic_key, flow_key = jax.random.split(key)
        critic_loss, _, info = self.critic_loss(params, batch, critic_key)
        value_loss, value_info = self.value_loss(params, batch)
        flow_loss, flow_info = self.bc_loss(params, batch, flow_key)
        return critic_loss + value_loss + flow_loss, info | value_info | flow_info

    def value_loss(self, params: dict[str, Any], batch: base.Batch) -> tuple[Scalar, base.Info]:
        """Returns the mean over the batch of valid · |κ − 1(u < 0)| u², and scalars to log."""
        values = self.apply("value", batch["observations"], params=params["value"])
        gap = self.pessimistic_q(batch["observations"], batch["actions"]) - values
        weights = jnp.where(gap >= 0, self.cfg.kappa, 1 - self.cfg.kappa)
        loss = jnp.mean(batch["valid"] * weights * jnp.square(gap))
        return loss, {"value/loss": loss, "value/v": values.mean()}

    def next_value(self, observations: Observations, key: PRNGKeyArray) -> Float[Array, "*b"]:
        """Returns the value that the TD target bootstraps from: the online V(s')."""
        return self.apply("value", observations)

    def rank(self, qs: Float[Array, " K *b"]) -> Float[Array, "*b"]:
        """Returns the score that best-of-N maximises: the ensemble's minimum."""
        return qs.min(axis=0)


# Setting → default, meaning.
SETTINGS = {
    "kappa": (0.9, "κ, the expectile"),
    "best_of_n": (32, "N, candidates at acting only"),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults of this agent."""
    return base.get_config(SETTINGS)


# Settings of QAM's experiments (arXiv 2601.14234).
PRESETS = presets.presets(
    {
        "antmaze-large": {"kappa": 0.9},
        "antmaze-giant": {"kappa": 0.8},
        "humanoidmaze-medium": {"kappa": 0.7},
        "humanoidmaze-large": {"kappa": 0.8},
        "cube-double": {"kappa": 0.9},
        "cube-triple": {"kappa": 0.95},
        "cube-quadruple": {"kappa": 0.95},
        "scene": {"kappa": 0.9},
        "puzzle-3x3": {"kappa": 0.95},
        "puzzle-4x4": {"kappa": 0.9},
    }
)
CPU = presets.CPU
