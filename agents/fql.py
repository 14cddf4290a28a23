"""Flow Q-learning (FQL, arXiv 2502.02538), on action chunks also known as QC-FQL (2507.07969).

One update, on a batch {(s, a, R, s')} of m windows, with a BC flow v_θ, its Polyak copy v̄ (v_θ itself where flow_tau
is 1) and a one-step policy μ_ω(s, z):

    critic      a' ← clip μ_ω(s', z');  TD step on Q_φ
    flow        z ~ N(0, I);  step on ‖v_θ(s, t a + (1−t) z, t) − (a − z)‖²
    one step    z ~ N(0, I), b ← clip Euler(v̄, s, z);   step on α · mean (μ_ω(s, z) − b)² − Q_φ(s, clip μ_ω(s, z))

Only μ_ω acts: one network evaluation. The paper writes the distillation as a squared norm, a sum over dimensions; its
code takes the mean over batch and dimensions, on whose scale α is given, and so does this. Its TD target is the mean of
two critics, or their least on antmaze, without ρ; here it is that of all agents. Its option to divide the
Q term by mean |Q| is off there by default and absent from QAM's code, whose α these are; it is left out. Public code
takes both terms of μ_ω on invalid windows too; here these weigh nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, PRNGKeyArray

from agents import base, presets
from utils.arrays import Observations, Scalar
from utils.networks import OneStepPolicy


class OneStep(base.Agent):
    """Distillation of the flow into the network 'one_step'."""

    def one_step_loss(
        self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray, alpha: Scalar
    ) -> tuple[Scalar, base.Info]:
        """α · mean (μ_ω(s, z) − b)² − mean Q_φ(s, clip μ_ω(s, z)), and what to log."""
        distill_loss, actions = self.distillation(params, batch, key)
        # The critic is not given `params`: the gradient reaches the one-step policy alone.
        q = self.apply("critic", batch["observations"], jnp.clip(actions, -1.0, 1.0)).mean(axis=0)
        info = {"one_step/distill_loss": distill_loss, "one_step/q": q.mean()}
        return alpha * distill_loss - jnp.mean(batch["valid"] * q), info

    def distillation(
        self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray
    ) -> tuple[Scalar, Float[Array, "m d"]]:
        """Returns the mean of (μ_ω(s, z) − clip Euler(v̄, s, z))², z ~ N(0, I), and μ_ω(s, z)."""
        noise = jax.random.normal(key, batch["actions"].shape)
        actions = self.apply("one_step", batch["observations"], noise, params=params["one_step"])
        errors = jnp.square(actions - self.flow_actions(batch["observations"], noise))
        return jnp.mean(batch["valid"][:, None] * errors), actions

    def distill_loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """The one-step policy's distance to its flow."""
        loss, _ = self.distillation(params, batch, key)
        return loss, {"one_step/distill_loss": loss}


class Agent(OneStep):
    """FQL."""

    @classmethod
    def networks(cls, config: Any, action_dim: int) -> dict[str, Any]:
        """Name → module of every network."""
        return super().networks(config, action_dim) | {
            "one_step": OneStepPolicy(tuple(config.actor_hidden_dims), action_dim)
        }

    @property
    def nfe(self) -> int:
        """Network evaluations that a candidate action costs at acting."""
        return 1

    def propose(self, observations: Observations, key: PRNGKeyArray) -> Float[Array, "*b d"]:
        """Returns clip μ_ω(s, z), z ~ N(0, I)."""
        noise = jax.random.normal(key, (*observations.shape[:-1], self.config.action_dim))
        return jnp.clip(self.apply("one_step", observations, noise), -1.0, 1.0)

    def loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """TD loss of the critics, flow matching on the data, and the one-step policy's distillation and Q terms."""
        critic_key, flow_key, noise_key = jax.random.split(key, 3)
        critic_loss, _, info = self.critic_loss(params, batch, critic_key)
        flow_loss, flow_info = self.bc_loss(params, batch, flow_key)

        one_step_loss, one_step_info = self.one_step_loss(params, batch, noise_key, self.hyper["alpha"])
        return critic_loss + flow_loss + one_step_loss, info | flow_info | one_step_info

    @property
    def distilled(self) -> tuple[str, ...]:
        """The one-step policy."""
        return ("one_step",)


def get_config() -> ml_collections.ConfigDict:
    """Defaults of this agent."""
    config = base.get_config()
    config.alpha = 100.0  # α, weight of the distillation against Q
    return config


# QAM's settings (arXiv 2601.14234) and, for the online tasks, the paper's Table 6.
PRESETS = presets.presets(
    {
        "antmaze-large": {"alpha": 3.0},
        "antmaze-giant": {"alpha": 3.0},
        "humanoidmaze-medium": {"alpha": 30.0},
        "humanoidmaze-large": {"alpha": 30.0},
        "cube-double": {"alpha": 300.0},
        "cube-triple": {"alpha": 30.0},
        "cube-quadruple": {"alpha": 100.0},
        "scene": {"alpha": 300.0},
        "puzzle-3x3": {"alpha": 300.0},
        "puzzle-4x4": {"alpha": 1.0},
        "ArrangeBoxes": {"alpha": 300.0},
        "OpenMicrowave": {"alpha": 300.0},
    }
)
CPU = presets.CPU | {"alpha": 100.0}
