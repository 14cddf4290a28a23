"""MeanFlowQL (arXiv 2511.13035): a one-step policy by the MeanFlow identity, improved by Q and best-of-N.

The actor g_θ(s, x, t) is x − u, with u the mean velocity from time t to 0, noise at t = 1 and data at t = 0; the policy
is g_θ(s, ε, 1). One update, on a batch {(s, a, R, s')} of m windows, with sg the stop-gradient:

    critic      a' ← best of N samples g_θ(s', ε', 1);  TD step on Q_φ
    MeanFlow    t ~ U{1/T, …, 1}, ε ~ N(0, I), x ← (1 − t) a + t ε, v ← ε − a, ġ ← d/dt g_θ(s, x, t) along (v, 1)
                δ ← mean over d of (g_θ(s, x, t) − sg clip(x + (t − 1) v − t ġ, −5, 5))²
                step on α · sg((δ + 10⁻⁴)^−0.2) δ
    actor       b ← g_θ(s, ε, 1), fresh ε;  step on −Q_φ(s, clip b) + mean relu(|b| − 1)

Acting is one evaluation a candidate. It follows the authors' public code, with these departures:

- The actor is an MLP whose last layer starts at zero, as the published one does, so that actions start within bounds.
  With actor=transformer it is the published transformer on one token, less its queries and keys, which have no effect.
- α is constant, as is the learning rate. Their code adapts or anneals α, anneals the actor's rate and clips gradients.
- TD target and ranking are those of all agents here; theirs take the target critics' mean for both.
- Observations are standardised for the actor alone; theirs are for the critics too.
- Means leave out invalid windows and padding.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, PRNGKeyArray

from agents import base, presets
from utils.arrays import Observations, Scalar
from utils.networks import CriticEnsemble, TokenTransformer, VectorField
from utils.observations import Observation, state_of

BOUND = 5.0  # on the components of the target
ADAPTIVE_POWER, SMOOTHING = 0.2, 1e-4


class Agent(base.Agent):
    """MeanFlowQL."""

    FLOWS = ()  # A flow's parameters do not fit a MeanFlow policy.
    UNUSED = {
        "flow_steps": "a MeanFlow policy takes one step",
        "flow_tau": "the trained MeanFlow policy itself acts",
    }

    @classmethod
    def networks(cls, config: Any, action_dim: int) -> dict[str, Any]:
        """Returns name → module of every network."""
        return {
            "critic": CriticEnsemble(tuple(config.value_hidden_dims), config.num_qs),
            "actor": cls.actor_network(config, action_dim),
        }

    @staticmethod
    def actor_network(config: Any, action_dim: int) -> nn.Module:
        """Returns the module of g."""
        if config.actor == "transformer":
            return TokenTransformer(config.transformer_width, config.transformer_blocks, action_dim)
        return VectorField(tuple(config.actor_hidden_dims), action_dim, output_init=nn.initializers.zeros)

    def loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """Returns the TD loss, the MeanFlow loss and the actor's loss, and scalars to log."""
        critic_key, flow_key, actor_key = jax.random.split(key, 3)
        critic_loss, _, info = self.critic_loss(params, batch, critic_key)
        meanflow_loss = self.meanflow_loss(params, batch, flow_key)

        valid = batch["valid"]
        noise = jax.random.normal(actor_key, batch["actions"].shape)
        actions = self.actor(batch["observations"], noise, jnp.ones((len(noise), 1)), params["actor"])
        # At the critic's own parameters, not `params`: the gradient reaches the actor alone.
        q = self.apply("critic", batch["observations"], jnp.clip(actions, -1.0, 1.0)).mean(axis=0)
        bound_loss = jnp.mean(valid[:, None] * jax.nn.relu(jnp.abs(actions) - 1))
        actor_loss = bound_loss - jnp.mean(valid * q)
        info |= {"meanflow/loss": meanflow_loss, "actor/q": q.mean(), "actor/bound_loss": bound_loss}
        return critic_loss + self.hyper["alpha"] * meanflow_loss + actor_loss, info

    def meanflow_loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> Scalar:
        """Returns the mean over the batch of valid · sg((δ + 10⁻⁴)^−0.2) δ."""
        actions, steps = batch["actions"], self.config.time_steps
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, actions.shape)
        t = jax.random.randint(time_key, (len(actions), 1), 1, steps + 1) / steps
        x, velocity = (1 - t) * actions + t * noise, noise - actions

        def policy(x: Float[Array, "m d"], t: Float[Array, "m 1"]) -> Float[Array, "m d"]:
            return self.actor(batch["observations"], x, t, params["actor"])

        g, slope = jax.jvp(policy, (x, t), (velocity, jnp.ones_like(t)))
        target = jax.lax.stop_gradient(jnp.clip(x + (t - 1) * velocity - t * slope, -BOUND, BOUND))
        errors = jnp.mean(batch["action_mask"] * jnp.square(g - target), axis=1)
        weights = jax.lax.stop_gradient((errors + SMOOTHING) ** -ADAPTIVE_POWER)
        return jnp.mean(batch["valid"] * weights * errors)

    def actor(
        self, observations: Observations, x: Float[Array, "*b d"], t: Float[Array, "*b 1"], params: Any = None
    ) -> Float[Array, "*b d"]:
        """Returns g(s, x, t) at standardised states, by default at the agent's own parameters."""
        mean, deviation = self.condition_stats
        states = (state_of(observations) - mean) / deviation
        seen = observations._replace(state=states) if isinstance(observations, Observation) else states
        return self.apply("actor", seen, x, t, params=params)

    @property
    def nfe(self) -> int:
        """Returns the number of network evaluations for one candidate action."""
        return 1

    def propose(self, observations: Observations, key: PRNGKeyArray) -> Float[Array, "*b d"]:
        """Returns clip g(s, ε, 1) for each observation, ε ~ N(0, I) times `noise_scale`."""
        noise = self.start_noise(observations, key)
        return jnp.clip(self.actor(observations, noise, jnp.ones((*noise.shape[:-1], 1))), -1.0, 1.0)


# Setting → default, meaning.
SETTINGS = {
    "alpha": (300.0, "α, weight of the MeanFlow loss (its BC term) against Q, which is not normalised"),
    "actor": ("mlp", "network of the actor: 'mlp', or 'transformer', as published"),
    "transformer_width": (256, "width of the transformer"),
    "transformer_blocks": (3, "blocks of the transformer"),
    "time_steps": (50, "T, number of times that training draws from"),
    "best_of_n": (5, "N, candidates at acting and in the TD target"),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults of this agent."""
    return base.get_config(SETTINGS)


# The two commands of the authors' README. Elsewhere the defaults hold, untuned: the right α follows the scale of Q.
PRESETS = presets.presets(
    {
        "humanoidmaze-medium": {"alpha": 2000.0, "time_steps": 100},
        "humanoidmaze-large": {"alpha": 6000.0, "time_steps": 50},
    }
)
CPU = presets.CPU
