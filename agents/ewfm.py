"""Energy-weighted flow matching (EWFM, arXiv 2503.04975) with advantages as energies, a baseline of the OTQL paper.

One update, on a batch {(s_j, a_j, R_j, s'_j)} of m windows, is that of OTQL without the coupling; v̄ is the Polyak copy
of v_θ (v_θ itself where flow_tau is 1):

    critic      a'_j ← an Euler sample of v̄ at s'_j;  TD step on Q_φ
    advantage   A_j ← Q_φ(s_j, a_j) − V̂(s_j),  V̂(s_j) = mean of Q_φ(s_j, â) over Euler samples â of v̄ at s_j
    weights     w_j = min(exp(λ A_j), w_max) · valid_j,  w̄ = their mean over the valid windows
    flow        z_j ~ N(0, I);  step on mean_j (w_j / w̄) ‖v_θ(s_j, t a_j + (1−t) z_j, t) − (a_j − z_j)‖²

This is the baseline of the OTQL paper (§D.2), which weights the data's actions by the clamped exponential of the
advantage. EWFM's own algorithm for RL, QIPO, differs: it weights actions that the model samples, renewed from time to
time, by exp(β Q(s, a)) over its mean at that state. The OTQL paper does not say whether weights are normalised. Here
they are, over the batch, like the p_j of OTQL's Eq. 5: λ = 0 is BC, λ does not change the step size, and both agents
train on the same tilted marginal.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import PRNGKeyArray

from agents import base, otql, presets
from utils.arrays import Scalar
from utils.coupling import tilted_marginal


class Agent(otql.Agent):
    """EWFM: V̂ of OTQL with another flow loss."""

    def loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """Returns the TD loss plus weighted flow matching from independent noise, and scalars to log."""
        cfg, valid = self.cfg, batch["valid"]
        critic_key, value_key, flow_key = jax.random.split(key, 3)
        next_value, value = self.values(batch, critic_key, value_key)
        critic_loss, qs, info = self.td_loss(params, batch, next_value)

        advantages = jax.lax.stop_gradient(qs.mean(axis=0)) - value
        probs = tilted_marginal(advantages, valid, cfg.lam, cfg.w_max)
        weights = valid.sum() * probs  # w_j / w̄, which cannot overflow
        flow_loss, flow_info = self.bc_loss(params, batch, flow_key, row_weights=weights)
        info |= flow_info | {"advantage/mean": advantages.mean(), "advantage/std": advantages.std()}
        info |= {"weights/effective_sample_size": probs.sum() / (valid.size * jnp.sum(probs**2) + 1e-12)}
        return critic_loss + flow_loss, info


# Setting → default, meaning.
SETTINGS = {
    **base.FLOW_SETTINGS,
    "lam": (1.0, "λ, temperature of the tilt"),
    "w_max": (20.0, "clamp on the weights exp(λ A)"),
    "value_samples": (2, "k, flow samples in V̂"),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults of this agent: those of the online tasks."""
    return base.get_config(SETTINGS)


PANDA = {"lam": 1.0, "w_max": 20.0}
# Table 6 of the OTQL paper for the online tasks. It has no offline EWFM: there λ and w_max are those of OTQL (Table 4),
# so that the two agents differ only in coupling, N and NFE.
PRESETS = presets.presets(
    {domain: {k: settings[k] for k in ("lam", "w_max")} for domain, settings in otql.PRESETS.items()}
    | {"ArrangeBoxes": PANDA, "OpenMicrowave": PANDA}
)
CPU = presets.CPU | {"lam": 1.0}
