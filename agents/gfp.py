"""Guided flow policy (GFP, arXiv 2512.03973): FQL whose flow imitates what is better than the one-step policy.

One update, on a batch {(s, a, R, s')} of m windows, with a flow v_θ, its Polyak copy v̄ (v_θ itself where flow_tau is
1), a one-step policy μ_ω(s, z), and Q^ρ = mean − ρ std over an ensemble:

    critic      a' ← clip μ_ω(s', z');  TD step on Q_φ to R + γ^H mask · Q̄^ρ(s', a')
                (target_actions=both: the mean of that and of Q̄^ρ(s', b'), b' an Euler sample of v̄ at s')
    scale       λ ← 1 / mean |Q^ρ(s, clip μ_ω(s, z))|
    guidance    g ← σ((λ/η) (Q̄^ρ(s, a) − Q_ref)),  Q_ref = Q̄^ρ(s, clip μ_ω(s, z))
                (reference=min: the lesser of that and of Q̄^ρ(s, b));  η = 0: g = 1
    flow        step on g · ‖v_θ(s, t a + (1−t) x, t) − (a − x)‖²,  x ~ N(0, I)
    one step    z ~ N(0, I), b ← clip Euler(v̄, s, z);   step on α · mean (μ_ω(s, z) − b)² − λ · Q^ρ(s, clip μ_ω(s, z))

Only μ_ω acts, at one network evaluation. It follows the authors' public code, with these departures:

- Their aggregate of two critics, mean or minimum by task, is Q^ρ of the ensemble that all agents here share.
- Their code evaluates b' at s, not s', where the paper has s'; this file follows the paper.
- Their target critics average the parameters before the step, here those after it.
- Time enters the flow as a raw scalar, not by sinusoidal features, as in all flows here.
- Means leave out invalid windows, the scale λ's too.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, PRNGKeyArray

from agents import base, fql, presets
from agents.losses import inverse_scale
from utils.arrays import Observations, Scalar


class Agent(fql.Agent):
    """GFP: networks, sampler and distillation of FQL."""

    def loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """Returns the TD loss, guided flow matching and the loss of the one-step policy, and scalars to log."""
        cfg, observations, valid = self.cfg, batch["observations"], batch["valid"]
        critic_key, flow_key, noise_key = jax.random.split(key, 3)
        critic_loss, _, info = self.critic_loss(params, batch, critic_key)

        distill_loss, actions, samples = self.distillation(params, batch, noise_key)
        actions = jnp.clip(actions, -1.0, 1.0)
        # At the critic's own parameters, not `params`: the gradient reaches the one-step policy alone.
        q = self.pessimistic(self.apply("critic", observations, actions))
        scale = inverse_scale(q, valid)
        one_step_loss = cfg.alpha * distill_loss - scale * jnp.mean(valid * q)

        guidance = self.guidance(scale * self.advantage(batch, actions, samples))
        flow_loss, flow_info = self.bc_loss(params, batch, flow_key, row_weights=guidance)
        info |= flow_info | {"one_step/distill_loss": distill_loss, "one_step/q": q.mean()}
        info |= {"guidance/mean": guidance.mean(), "guidance/std": guidance.std()}
        return critic_loss + flow_loss + one_step_loss, info

    def guidance(self, advantage: Float[Array, " m"]) -> Float[Array, " m"]:
        """Returns g = σ(advantage / η), or 1 if η is 0, without gradient."""
        eta = self.hyper["eta"]
        guidance = jnp.where(eta > 0, jax.nn.sigmoid(advantage / jnp.maximum(eta, 1e-12)), 1.0)
        return jax.lax.stop_gradient(guidance)

    def advantage(
        self, batch: base.Batch, actions: Float[Array, "m d"], samples: Float[Array, "m d"]
    ) -> Float[Array, " m"]:
        """Returns Q̄^ρ of the batch's actions over Q_ref: that of the policy's or, if asked for, also the flow's."""
        observations = batch["observations"]
        reference = self.pessimistic_q(observations, actions)
        if self.config.reference == "min":
            reference = jnp.minimum(reference, self.pessimistic_q(observations, samples))
        return self.pessimistic_q(observations, batch["actions"]) - reference

    def next_value(self, observations: Observations, key: PRNGKeyArray) -> Float[Array, "*b"]:
        """Returns the value that the TD target bootstraps from: of the policy's action, or its mean with the flow's."""
        if self.config.target_actions == "policy":
            return super().next_value(observations, key)
        key, flow_key = jax.random.split(key)
        samples = self.flow_actions(observations, self.start_noise(observations, flow_key))
        return (super().next_value(observations, key) + self.pessimistic_q(observations, samples)) / 2


# Setting → default, meaning.
SETTINGS = {
    "alpha": (1.0, "α, weight of the one-step policy's distillation (its BC term) against the normalised Q"),
    "eta": (1e-3, "η, temperature of the guidance, on the scale of the normalised Q; 0: none"),
    "target_actions": ("policy", "of the TD target: 'policy', or 'both', the mean with the flow's"),
    "reference": ("policy", "Q_ref of the guidance: 'policy', or 'min', the lesser of it and the flow's"),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults of this agent."""
    return base.get_config(SETTINGS)


def tuned(alpha: float, eta: float, target_actions: str = "policy", reference: str = "policy") -> dict[str, Any]:
    """Returns the settings of one domain."""
    return {"alpha": alpha, "eta": eta, "target_actions": target_actions, "reference": reference}


# α, η and choices of the authors' code (hyperparams/gfp_params.csv), found with single actions and OGBench's dense
# rewards. Discounts, batch sizes and chunks are those of all agents here.
PRESETS = presets.presets(
    {
        "antmaze-large": tuned(0.3, 1e-4, reference="min"),
        "antmaze-giant": tuned(0.1, 0.1, reference="min"),
        "humanoidmaze-medium": tuned(0.3, 1e-3, "both", "min"),
        "humanoidmaze-large": tuned(0.3, 1e-4, reference="min"),
        "cube-double": tuned(1.0, 1e-2, "both"),
        "cube-triple": tuned(1.0, 1e-5, "both"),
        "scene": tuned(10.0, 1e-3),
        "puzzle-3x3": tuned(3.0, 1e-3),
        "puzzle-4x4": tuned(3.0, 1e-5),
    }
)
CPU = presets.CPU
