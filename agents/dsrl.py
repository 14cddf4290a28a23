"""DSRL (arXiv 2506.15799), noise-aliased: reinforcement learning over the noise that a BC flow starts from.

With b the noise scale, v̄ the Polyak copy of the flow v, α the temperature, sg the stop-gradient and Q_k, Q^z_k the
members of two ensembles, one update on a batch of m windows is a step on the sum of

    critic          ‖Q_k(s, a) − y‖²,  a' = Euler_v̄(s', b z'),  z' ~ π(·|s')
    flow            flow matching on (s, a)
    latent critic   ‖Q^z_k(s, z) − sg Q_k(s, Euler_v̄(s, z))‖²,  z ~ N(0, I), for each k
    latent actor    sg(α) log π(z|s) − mean_k Q^z_k(s, b z),  z ~ π(·|s), a tanh-Gaussian
    temperature     α (−sg log π(z|s) − H̄),  H̄ = −target_entropy · d

This is the baseline of QAM's public code (arXiv 2601.14234). DSRL's own code steers a frozen flow, adds the entropy to
the TD target, takes the minimum of its critics, not their mean, has the target entropy as a setting (0 by default), and
sets the number of latent critic steps separately. Unlike in either code, `valid` weights every loss.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, PRNGKeyArray

from agents import base, presets
from agents.losses import soft_loss
from utils.arrays import Observations, Scalar
from utils.networks import CriticEnsemble, TanhGaussian, Temperature, sample_tanh_gaussian


class Agent(base.Agent):
    """DSRL."""

    @classmethod
    def networks(cls, config: Any, action_dim: int) -> dict[str, Any]:
        """Returns name → module of every network."""
        return super().networks(config, action_dim) | {
            "latent_critic": CriticEnsemble(tuple(config.value_hidden_dims), config.num_qs),
            "latent_actor": TanhGaussian(tuple(config.actor_hidden_dims), action_dim),
            "temperature": Temperature(),
        }

    def loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """Returns the sum of the five losses, and scalars to log."""
        critic_key, flow_key, latent_key, actor_key = jax.random.split(key, 4)
        critic_loss, _, critic_info = self.critic_loss(params, batch, critic_key)
        flow_loss, flow_info = self.bc_loss(params, batch, flow_key)
        latent_loss = self.distillation_loss(params, batch, latent_key)
        actor_loss, actor_info = self.actor_loss(params, batch, actor_key)
        info = critic_info | flow_info | {"latent_critic/loss": latent_loss} | actor_info
        return critic_loss + flow_loss + latent_loss + actor_loss, info

    def distillation_loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> Scalar:
        """Returns the mean over ensemble and batch of valid · (Q^z_k(s, z) − Q_k(s, Euler_v̄(s, z)))², online Q_k."""
        observations = batch["observations"]
        latents = jax.random.normal(key, batch["actions"].shape)
        qs = self.apply("critic", observations, self.flow_actions(observations, latents))
        latent_qs = self.apply("latent_critic", observations, latents, params=params["latent_critic"])
        return jnp.mean(batch["valid"] * jnp.square(latent_qs - qs))

    def actor_loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """Returns the losses of latent actor (log π before scaling by b) and temperature, and scalars to log."""
        observations = batch["observations"]
        latents, log_probs = self.latents(observations, key, params["latent_actor"])
        q = self.apply("latent_critic", observations, latents).mean(axis=0)
        temperature = self.apply("temperature", params=params["temperature"])
        target_entropy = -self.hyper["target_entropy"] * self.config.action_dim
        return soft_loss(temperature, log_probs, q, target_entropy, batch["valid"])

    def latents(
        self, observations: Observations, key: PRNGKeyArray, params: Any = None
    ) -> tuple[Float[Array, "*b d"], Float[Array, "*b"]]:
        """Returns b z, z ~ π(·|s), in [−b, b], and log π(z|s)."""
        latents, log_probs = sample_tanh_gaussian(key, *self.apply("latent_actor", observations, params=params))
        return self.hyper["noise_scale"] * latents, log_probs

    @property
    def nfe(self) -> int:
        """Returns the number of network evaluations for one candidate action: those of latent actor and flow."""
        return self.config.flow_steps + 1

    def propose(self, observations: Observations, key: PRNGKeyArray) -> Float[Array, "*b d"]:
        """Returns Euler_v̄(s, b z), z ~ π(·|s), in [−1, 1]."""
        return self.flow_actions(observations, self.latents(observations, key)[0])


# Setting → default, meaning.
SETTINGS = {
    "flow_tau": (0.005, "Polyak rate of the flow that is steered"),
    "noise_scale": (1.0, "b, bound on the actor's latents"),
    "target_entropy": (0.5, "H̄ = −target_entropy · d"),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults of this agent."""
    return base.get_config(SETTINGS)


# Settings of QAM's experiments (arXiv 2601.14234).
PRESETS = presets.presets(
    {
        "puzzle-3x3": {"noise_scale": 1.0},
        "puzzle-4x4": {"noise_scale": 1.0},
        "scene": {"noise_scale": 0.4},
        "cube-double": {"noise_scale": 1.0},
        "cube-triple": {"noise_scale": 1.4},
        "cube-quadruple": {"noise_scale": 1.4},
        "antmaze-large": {"noise_scale": 0.8},
        "antmaze-giant": {"noise_scale": 1.2},
        "humanoidmaze-medium": {"noise_scale": 0.6},
        "humanoidmaze-large": {"noise_scale": 0.8},
    }
)
CPU = presets.CPU | {"noise_scale": 1.0}
