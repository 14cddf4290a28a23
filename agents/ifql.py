"""Implicit flow Q-learning (IFQL): a value learned in the data's support, a cloned flow, and best-of-N at acting.

One update, on a batch {(s, a, R, s')} of m windows:

    value    V step on |κ − 1(u < 0)| u²,  u = Q̄(s, a) − V(s),  Q̄ = mean − ρ std of the target critics
    critic   TD step on (Q_k(s, a) − y)²,  y = R + γ^H mask V(s')
    flow     v step on ‖v(s, t a + (1−t) z, t) − (a − z)‖²

V(s) is the κ-expectile of Q̄ over the data's actions: their mean at κ = 0.5, towards the best of them as κ → 1. Training
samples no action; acting draws N = 32 of v̄, the Polyak copy of v (v itself where flow_tau is 1), and keeps the one
whose smallest Q_k is the largest.

IDQL (arXiv 2304.10573) with a flow for its diffusion policy, as in the public FQL and QAM code. What follows QAM's
`agents/ifql.py` and not IDQL: Q̄ is mean − ρ std, not the minimum of two, and the ONLINE critics rank, not the targets
(IDQL can also draw by the expectile's weights; the best is its mode for evaluation).
The bootstrap V(s') is the online V, without gradient and without ρ. QAM's value loss also counts windows that are no
sample; here they have no weight in it.
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
        """Name → module of every network."""
        return super().networks(config, action_dim) | {"value": StateValue(tuple(config.value_hidden_dims))}

    def loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """TD loss of the critics, expectile loss of V and flow matching on the data."""
        critic_key, flow_key = jax.random.split(key)
        critic_loss, _, info = self.critic_loss(params, batch, critic_key)
        value_loss, value_info = self.value_loss(params, batch)
        flow_loss, flow_info = self.bc_loss(params, batch, flow_key)
        return critic_loss + value_loss + flow_loss, info | value_info | flow_info

    def value_loss(self, params: dict[str, Any], batch: base.Batch) -> tuple[Scalar, base.Info]:
        """Expectile loss of V at the data's actions: mean over the batch of valid · |κ − 1(u < 0)| u².

        Returns:
            the loss, and what to log.
        """
        values = self.apply("value", batch["observations"], params=params["value"])
        gap = self.pessimistic_q(batch["observations"], batch["actions"]) - values
        weights = jnp.where(gap >= 0, self.cfg.kappa, 1 - self.cfg.kappa)
        loss = jnp.mean(batch["valid"] * weights * jnp.square(gap))
        return loss, {"value/loss": loss, "value/v": values.mean()}

    def next_value(self, observations: Observations, key: PRNGKeyArray) -> Float[Array, "*b"]:
        """What the TD target bootstraps from: the online V(s')."""
        return self.apply("value", observations)

    def rank(self, qs: Float[Array, " K *b"]) -> Float[Array, "*b"]:
        """What best-of-N maximises: the ensemble's minimum."""
        return qs.min(axis=0)


def get_config() -> ml_collections.ConfigDict:
    """Defaults of this agent."""
    config = base.get_config()
    config.update(
        {
            "kappa": 0.9,  # κ, expectile that V is
            "best_of_n": 32,  # N, at acting only
        }
    )
    return config


# The settings of the QAM paper's experiments (arXiv 2601.14234).
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
