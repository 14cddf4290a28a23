"""Critic-guided Q-learning (CGQL, a baseline of QAM, arXiv 2601.14234), mode 'simple': a BC flow guided as it acts.

v is a BC flow and v̄ its Polyak copy. Actions are Euler samples, in T = flow_steps steps and clipped at the end, of v̄ at
t = 0 and of the following velocity at t > 0:

    v̄(s, x, t) + ω (x + (1 − t) τ ∇_x Q(s, x)) / t

with ω the guidance coefficient and Q the ensemble mean of the online critic, evaluated at x as at a clean action. One
update, on a batch {(s, a, R, s')} of m windows:

    critic      a' ← a guided sample at s';  TD step on Q
    flow        z ~ N(0, I);  step on ‖v(s, t a + (1−t) z, t) − (a − z)‖²

No gradient passes through the guidance. On the path x_t = t a + (1 − t) z the velocity is
v = (x + (1 − t) ∇_x log p_t(x)) / t; with τ ∇Q in place of the score this is the guidance, added in proportion ω.

This follows QAM's public code, with two differences: its critics have one more input, which is always 1 in this mode,
and at τ = 0 it has no guidance at all, whereas here the term x / t remains. BC is ω = 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float

from agents import base, presets
from utils.arrays import Number, Observations, Scalar


class Agent(base.Agent):
    """CGQL."""

    def flow_actions(
        self, observations: Observations, noise: Float[Array, "*b d"], params: Any = None
    ) -> Float[Array, "*b d"]:
        """Returns guided Euler samples, clipped to [−1, 1]."""
        cfg, params = self.cfg, self.acting_flow if params is None else params
        states, valued = self.encode("flow", observations, params), self.encode("critic", observations)

        def flow(x: Float[Array, "*b d"], t: Number) -> Float[Array, "*b d"]:
            return self.apply("flow", states, x, jnp.full((*x.shape[:-1], 1), t), params=params)

        def value(x: Float[Array, "*b d"]) -> Scalar:
            return self.apply("critic", valued, x).mean(axis=0).sum()

        def step(x: Float[Array, "*b d"], t: Scalar) -> tuple[Float[Array, "*b d"], None]:
            guidance = (x + (1 - t) * cfg.inv_temp * jax.grad(value)(x)) / t
            return x + (flow(x, t) + cfg.guidance_coef * guidance) / cfg.flow_steps, None

        x = noise + flow(noise, 0.0) / cfg.flow_steps
        return jnp.clip(jax.lax.scan(step, x, jnp.arange(1, cfg.flow_steps) / cfg.flow_steps)[0], -1.0, 1.0)


# Setting → default, meaning.
SETTINGS = {
    "flow_tau": (0.005, "Polyak rate of the flow that acts"),
    "inv_temp": (10.0, "τ, inverse temperature of the critic's gradient"),
    "guidance_coef": (0.1, "ω, weight of the guidance"),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults of this agent."""
    return base.get_config(SETTINGS)


STRONG, WEAK = {"inv_temp": 10.0, "guidance_coef": 0.1}, {"inv_temp": 10.0, "guidance_coef": 0.01}
# Settings of QAM's experiments (arXiv 2601.14234).
PRESETS = presets.presets(
    {
        "puzzle-3x3": STRONG,
        "puzzle-4x4": STRONG,
        "scene": STRONG,
        "cube-double": WEAK,
        "cube-triple": STRONG,
        "cube-quadruple": STRONG,
        "antmaze-large": STRONG,
        "antmaze-giant": STRONG,
        "humanoidmaze-medium": WEAK,
        "humanoidmaze-large": WEAK,
    }
)
CPU = presets.CPU
