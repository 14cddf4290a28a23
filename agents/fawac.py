"""Flow AWAC (FAWAC): advantage-weighted flow matching, FQL's flow form (arXiv 2502.02538) of AWAC (2006.09359).

One update, on a batch {(s, a, R, s')} of m windows, with v̄ the Polyak copy of v_θ (v_θ itself where flow_tau is 1):

    critic      a' ← an Euler sample of v̄ at s';  TD step on Q_φ
    value       step on (V_ψ(s) − mean_k Q̄_k(s, a))², at the data's action
    flow        z ~ N(0, I);  step on min(exp(τ_inv (Q_φ(s, a) − V_ψ(s))), 100) · ‖v_θ(s, t a + (1−t) z, t) − (a − z)‖²

This follows QAM's public code (arXiv 2601.14234): V_ψ learns the value of the data's policy from the target critics,
without pessimism; the clamp at 100 is that of implicit Q-learning; weights are not normalised. QAM's value loss is a
mean over the members k, with the same gradient. In the AWAC paper V is the mean of Q over the policy's actions and no
weight is clamped; its authors' code takes Q at one action and, by default, weights by a softmax over the batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import PRNGKeyArray

from agents import base, presets
from utils.arrays import Scalar
from utils.networks import StateValue

W_MAX = 100.0


class Agent(base.Agent):
    """FAWAC."""

    @classmethod
    def networks(cls, config: Any, action_dim: int) -> dict[str, Any]:
        """Returns name → module of every network."""
        return super().networks(config, action_dim) | {"value": StateValue(tuple(config.value_hidden_dims))}

    def loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """Returns the TD loss, the regression of V and weighted flow matching, and scalars to log."""
        critic_key, flow_key = jax.random.split(key)
        observations, actions, valid = (batch[k] for k in ("observations", "actions", "valid"))
        critic_loss, qs, info = self.critic_loss(params, batch, critic_key)

        target_q = self.apply("critic", observations, actions, params=self.targets["critic"]).mean(axis=0)
        values = self.apply("value", observations, params=params["value"])
        value_loss = jnp.mean(valid * jnp.square(values - target_q))

        advantages = jax.lax.stop_gradient(qs.mean(axis=0) - values)
        # Clamped inside exp, which cannot overflow then.
        weights = jnp.exp(jnp.minimum(self.hyper["inv_temp"] * advantages, jnp.log(W_MAX)))
        flow_loss, flow_info = self.bc_loss(params, batch, flow_key, row_weights=weights)
        info |= flow_info | {"value/loss": value_loss, "value/v": values.mean()}
        info |= {"advantage/mean": advantages.mean(), "advantage/std": advantages.std()}
        return critic_loss + value_loss + flow_loss, info


# Setting → default, meaning.
SETTINGS = {
    **base.FLOW_SETTINGS,
    "inv_temp": (0.8, "τ_inv, inverse temperature of the weights"),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults of this agent."""
    return base.get_config(SETTINGS)


WEAK, STRONG = {"inv_temp": 0.8}, {"inv_temp": 6.4}
# Settings of QAM's experiments (arXiv 2601.14234).
PRESETS = presets.presets(
    {
        "antmaze-large": STRONG,
        "antmaze-giant": WEAK,
        "humanoidmaze-medium": STRONG,
        "humanoidmaze-large": WEAK,
        "cube-double": WEAK,
        "cube-triple": WEAK,
        "cube-quadruple": WEAK,
        "scene": STRONG,
        "puzzle-3x3": WEAK,
        "puzzle-4x4": WEAK,
    }
)
CPU = presets.CPU
