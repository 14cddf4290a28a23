"""Flow Q-learning (FQL, arXiv 2502.02538), on action chunks also known as QC-FQL (2507.07969).

One update, on a batch {(s, a, R, s')} of m windows, with a BC flow v_θ, its Polyak copy v̄ (v_θ itself where flow_tau
is 1) and a one-step policy μ_ω(s, z):

    critic      a' ← clip μ_ω(s', z');  TD step on Q_φ
    flow        z ~ N(0, I);  step on ‖v_θ(s, t a + (1−t) z, t) − (a − z)‖²
    one step    z ~ N(0, I), b ← clip Euler(v̄, s, z);   step on α · mean (μ_ω(s, z) − b)² − Q_φ(s, clip μ_ω(s, z))

Only μ_ω acts, at one network evaluation. Departures of the public code from the paper, and of this file from both:

- The paper writes the distillation as a squared norm, a sum over dimensions. The code takes the mean over batch and
  dimensions, and α is given on that scale; this file follows the code.
- Their TD target is the mean of two critics, or the minimum on antmaze, without ρ; here it is that of all agents.
- Their option to divide the Q term by mean |Q| is off by default and absent from QAM's code (arXiv 2601.14234), where
  the values of α come from; it is left out.
- Public code includes invalid windows in both terms of μ_ω; here their weight is zero.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, PRNGKeyArray

from agents import base, presets
from utils.arrays import Observations, Scalar
from utils.networks import OneStepPolicy


class OneStepMixin(base.Agent):
    """The one-step policy μ_ω, the network 'one_step', and its losses."""

    def one_step_loss(
        self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray, alpha: Scalar
    ) -> tuple[Scalar, base.Info]:
        """Returns α · mean (μ_ω(s, z) − b)² − mean Q_φ(s, clip μ_ω(s, z)), and scalars to log."""
        distill_loss, actions, _ = self.distillation(params, batch, key)
        # At the critic's own parameters, not `params`: the gradient reaches the one-step policy alone.
        q = self.apply("critic", batch["observations"], jnp.clip(actions, -1.0, 1.0)).mean(axis=0)
        info = {"one_step/distill_loss": distill_loss, "one_step/q": q.mean()}
        return alpha * distill_loss - jnp.mean(batch["valid"] * q), info

    def distillation(
        self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray
    ) -> tuple[Scalar, Float[Array, "m d"], Float[Array, "m d"]]:
        """Returns the mean of (μ_ω(s, z) − b)², z ~ N(0, I), μ_ω(s, z), and b = clip Euler(v̄, s, z)."""
        noise = jax.random.normal(key, batch["actions"].shape)
        actions = self.apply("one_step", batch["observations"], noise, params=params["one_step"])
        samples = self.flow_actions(batch["observations"], noise)
        return jnp.mean(batch["valid"][:, None] * jnp.square(actions - samples)), actions, samples

    def distill_loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """Returns the distance of the one-step policy to its flow, and scalars to log."""
        loss, *_ = self.distillation(params, batch, key)
        return loss, {"one_step/distill_loss": loss}

    def one_step_actions(self, observations: Observations, key: PRNGKeyArray) -> Float[Array, "*b d"]:
        """Returns clip μ_ω(s, z), z ~ N(0, I), times `noise_scale`."""
        return jnp.clip(self.apply("one_step", observations, self.start_noise(observations, key)), -1.0, 1.0)


class Agent(OneStepMixin):
    """FQL."""

    @classmethod
    def networks(cls, config: Any, action_dim: int) -> dict[str, Any]:
        """Returns name → module of every network."""
        return super().networks(config, action_dim) | {
            "one_step": OneStepPolicy(tuple(config.actor_hidden_dims), action_dim)
        }

    @property
    def nfe(self) -> int:
        """Returns the number of network evaluations for one candidate action."""
        return 1

    def propose(self, observations: Observations, key: PRNGKeyArray) -> Float[Array, "*b d"]:
        """Returns an action of the one-step policy for each observation, in [−1, 1]."""
        return self.one_step_actions(observations, key)

    def loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """Returns the TD loss, flow matching on the data and the loss of the one-step policy, and scalars to log."""
        critic_key, flow_key, noise_key = jax.random.split(key, 3)
        critic_loss, _, info = self.critic_loss(params, batch, critic_key)
        flow_loss, flow_info = self.bc_loss(params, batch, flow_key)
        one_step_loss, one_step_info = self.one_step_loss(params, batch, noise_key, self.hyper["alpha"])
        return critic_loss + flow_loss + one_step_loss, info | flow_info | one_step_info

    @property
    def distilled(self) -> tuple[str, ...]:
        """Returns the name of the one-step policy."""
        return ("one_step",)


# Setting → default, meaning.
SETTINGS = {
    "alpha": (100.0, "α, weight of the one-step policy's distillation (its BC term) against Q"),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults of this agent."""
    return base.get_config(SETTINGS)


# Settings of QAM's experiments (arXiv 2601.14234); for the online tasks, Table 6 of the OTQL paper.
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
