"""FEdit: a BC flow whose samples a Gaussian policy edits, after EXPO (arXiv 2507.07986).

With b the edit scale, v the flow, v̄ its Polyak copy (v itself where flow_tau is 1), π the edit policy, a tanh-Gaussian,
α the temperature and sg the stop-gradient, the policy is

    edit(s, a) = clip(a + b e),  e ~ π(·|s, a),  on samples a = Euler_v̄(s, z),  z ~ N(0, I)

and one update on a batch of m windows is a step on the sum of

    critic          ‖Q_k(s, a) − y‖²,  a' = edit(s', Euler_v̄(s', z'))
    flow            flow matching on (s, a)
    edit            sg(α) log π(e|s, â) − mean_k Q_k(s, edit(s, â)),  â = Euler_v̄(s, z)
    temperature     α (−sg log π(e|s, â) − H̄),  H̄ = −target_entropy · d

This is the baseline of QAM's public code (arXiv 2601.14234), which departs from EXPO:

- EXPO acts and bootstraps with the best, by its target critics, of N samples with and N without an edit; here it is one
  edited sample (`best_of_n` ranks edited samples only).
- EXPO's code trains the edit policy on the data's actions; here it is trained on the flow's.
- EXPO's log π is the density of b e; here it is that of e.

Unlike in either code, `valid` weights every loss.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, PRNGKeyArray

from agents import base, presets
from agents.losses import soft_loss
from utils.arrays import Observations, Scalar
from utils.networks import TanhGaussian, Temperature, sample_tanh_gaussian


class EditMixin(base.Agent):
    """The edit policy π, the network 'edit_actor', its temperature, the network 'temperature', and their losses."""

    def edit_loss(
        self, params: dict[str, Any], batch: base.Batch, actions: Float[Array, "m d"], key: PRNGKeyArray
    ) -> tuple[Scalar, base.Info]:
        """Returns the losses of edit policy and temperature on a frozen sampler's actions, and scalars to log."""
        edited, log_probs = self.edit(batch["observations"], actions, key, params["edit_actor"])
        q = self.apply("critic", batch["observations"], edited).mean(axis=0)
        temperature = self.apply("temperature", params=params["temperature"])
        target_entropy = -self.hyper["target_entropy"] * self.config.action_dim
        return soft_loss(temperature, log_probs, q, target_entropy, batch["valid"])

    def edit(
        self, observations: Observations, actions: Float[Array, "*b d"], key: PRNGKeyArray, params: Any = None
    ) -> tuple[Float[Array, "*b d"], Float[Array, "*b"]]:
        """Returns clip(a + b e), e ~ π(·|s, a), and log π(e|s, a)."""
        edits, log_probs = sample_tanh_gaussian(key, *self.apply("edit_actor", observations, actions, params=params))
        return jnp.clip(actions + self.hyper["edit_scale"] * edits, -1.0, 1.0), log_probs


class Agent(EditMixin):
    """FEdit."""

    @classmethod
    def networks(cls, config: Any, action_dim: int) -> dict[str, Any]:
        """Returns name → module of every network."""
        return super().networks(config, action_dim) | {
            "edit_actor": TanhGaussian(tuple(config.actor_hidden_dims), action_dim, conditioned=True),
            "temperature": Temperature(),
        }

    def loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """Returns the TD loss, flow matching and the edit policy's losses on the flow's samples; what to log."""
        critic_key, flow_key, sample_key, edit_key = jax.random.split(key, 4)
        critic_loss, _, critic_info = self.critic_loss(params, batch, critic_key)
        flow_loss, flow_info = self.bc_loss(params, batch, flow_key)
        actions = super().propose(batch["observations"], sample_key)
        edit_loss, edit_info = self.edit_loss(params, batch, actions, edit_key)
        return critic_loss + flow_loss + edit_loss, critic_info | flow_info | edit_info

    @property
    def nfe(self) -> int:
        """Returns the number of network evaluations for one candidate action: those of the flow and the edit."""
        return self.config.flow_steps + 1

    def propose(self, observations: Observations, key: PRNGKeyArray) -> Float[Array, "*b d"]:
        """Returns an edited sample of the flow for each observation, in [−1, 1]."""
        sample_key, edit_key = jax.random.split(key)
        return self.edit(observations, super().propose(observations, sample_key), edit_key)[0]


# Setting → default, meaning.
SETTINGS = {
    "edit_scale": (0.2, "b, bound on an edit"),
    "target_entropy": (0.5, "H̄ = −target_entropy · d"),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults of this agent."""
    return base.get_config(SETTINGS)


# Settings of QAM's experiments (arXiv 2601.14234).
PRESETS = presets.presets(
    {
        "puzzle-3x3": {"edit_scale": 0.2},
        "puzzle-4x4": {"edit_scale": 0.8},
        "scene": {"edit_scale": 0.2},
        "cube-double": {"edit_scale": 0.2},
        "cube-triple": {"edit_scale": 0.3},
        "cube-quadruple": {"edit_scale": 0.4},
        "antmaze-large": {"edit_scale": 0.2},
        "antmaze-giant": {"edit_scale": 0.3},
        "humanoidmaze-medium": {"edit_scale": 0.5},
        "humanoidmaze-large": {"edit_scale": 0.1},
    }
)
CPU = presets.CPU
