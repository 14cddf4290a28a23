"""Latent policy steering (LPS, arXiv 2603.05296): a deterministic actor in the latent space of a MeanFlow policy.

A MeanFlow policy (arXiv 2505.13447) has the mean velocity u = x − g_θ(s, x, t, h) over the last h before time t, with
noise at t = 1 and data at t = 0. Latents e lie on the sphere of radius √d, as does the actor's output ζ_ψ(s):

    π(s) = clip g_θ(s, ζ_ψ(s), 1, 1)

One update, on a batch {(s, a, R, s')} of m windows, with λ = 1 / mean |Q_φ(s, π(s))| and sg the stop-gradient:

    critic      TD step on Q_φ with a' ← π(s')
    times       t ≥ r: two draws of sigmoid(N(−0.4, 1)), sorted;  r = t in three quarters of the rows
    MeanFlow    x ← (1 − t) a + t e,  v ← e − a,  ġ ← d/dt g_θ(s, x, t, t − r) along (v, 1)
                δ ← mean over d of (x − g_θ − sg(v − (t − r)(v − ġ)))²;  step on sg((δ + 10⁻³)^−½) δ
    latent      step on −α λ Q_φ(s, π(s)), which reaches ζ_ψ alone

Acting costs two evaluations, of ζ and g, and draws nothing. It follows the authors' public code, with these departures:

- Their TD target is the minimum of two critics; here it is that of all agents. Their critics are narrower (4×256).
- Their target critics average the parameters before the step, here those after it.
- Their windows repeat the last step at the end of an episode and count; here what is padded has no weight.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, PRNGKeyArray

from agents import base, presets
from agents.losses import inverse_scale
from utils.arrays import Observations, Scalar
from utils.networks import CriticEnsemble, LatentActor, VectorField

INSTANT_SHARE = 0.75  # of the rows, with r = t
TIME_MEAN = -0.4  # of the logits of t and r
SMOOTHING = 1e-3  # of the adaptive weight


class Agent(base.Agent):
    """LPS."""

    FLOWS = ()  # A flow's parameters do not fit a MeanFlow policy.
    UNUSED = {
        "flow_steps": "a MeanFlow policy takes one step",
        "flow_tau": "the trained MeanFlow policy itself acts",
        **dict.fromkeys(("noise_scale", "best_of_n"), "the policy is deterministic"),
    }

    @classmethod
    def networks(cls, config: Any, action_dim: int) -> dict[str, Any]:
        """Returns name → module of every network."""
        return {
            "critic": CriticEnsemble(tuple(config.value_hidden_dims), config.num_qs),
            "meanflow": VectorField(tuple(config.actor_hidden_dims), action_dim, step_input=True),
            "latent_actor": LatentActor(tuple(config.latent_hidden_dims), action_dim),
        }

    def loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """Returns the TD loss, the MeanFlow loss and the latent actor's loss, and scalars to log."""
        critic_key, flow_key = jax.random.split(key)
        critic_loss, _, info = self.critic_loss(params, batch, critic_key)
        meanflow_loss = self.meanflow_loss(params, batch, flow_key)

        valid = batch["valid"]
        actions = self.steered(batch["observations"], params["latent_actor"])
        q = self.apply("critic", batch["observations"], actions).mean(axis=0)
        latent_loss = -self.hyper["alpha"] * inverse_scale(q, valid) * jnp.mean(valid * q)
        info |= {"meanflow/loss": meanflow_loss, "latent_actor/loss": latent_loss, "latent_actor/q": q.mean()}
        return critic_loss + meanflow_loss + latent_loss, info

    def meanflow_loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> Scalar:
        """Returns the mean over the batch of valid · sg((δ + 10⁻³)^−½) δ."""
        actions, size = batch["actions"], len(batch["actions"])
        noise_key, time_key = jax.random.split(key)
        noise = on_sphere(jax.random.normal(noise_key, actions.shape))
        times = jax.nn.sigmoid(TIME_MEAN + jax.random.normal(time_key, (2, size, 1)))
        t = times.max(axis=0)
        r = jnp.where(jnp.arange(size)[:, None] < int(INSTANT_SHARE * size), t, times.min(axis=0))
        x, velocity = (1 - t) * actions + t * noise, noise - actions
        observations = self.encode("meanflow", batch["observations"], params["meanflow"])

        def policy(x: Float[Array, "m d"], t: Float[Array, "m 1"]) -> Float[Array, "m d"]:
            return self.apply("meanflow", observations, x, t, t - r, params=params["meanflow"])

        g, slope = jax.jvp(policy, (x, t), (velocity, jnp.ones_like(t)))
        target = jax.lax.stop_gradient(velocity - (t - r) * (velocity - slope))
        errors = jnp.mean(batch["action_mask"] * jnp.square(x - g - target), axis=1)
        weights = jax.lax.stop_gradient(1 / jnp.sqrt(errors + SMOOTHING))
        return jnp.mean(batch["valid"] * weights * errors)

    def steered(self, observations: Observations, params: Any = None) -> Float[Array, "*b d"]:
        """Returns clip g(s, ζ(s), 1, 1), with ζ at `params`, by default the agent's own."""
        latents = self.apply("latent_actor", observations, params=params)
        one = jnp.ones((*latents.shape[:-1], 1))
        return jnp.clip(self.apply("meanflow", observations, latents, one, one), -1.0, 1.0)

    @property
    def nfe(self) -> int:
        """Returns the number of network evaluations for one candidate action: those of latent actor and policy."""
        return 2

    def propose(self, observations: Observations, key: PRNGKeyArray) -> Float[Array, "*b d"]:
        """Returns π(s) for each observation, in [−1, 1]; nothing is random."""
        return self.steered(observations)


def on_sphere(points: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Returns points scaled to the sphere of radius √d."""
    return points * jnp.sqrt(points.shape[-1]) / jnp.linalg.norm(points, axis=-1, keepdims=True)


# Setting → default, meaning.
SETTINGS = {
    "alpha": (1.0, "α, weight of the normalised Q in the latent actor's loss"),
    "latent_hidden_dims": ((256, 256), "widths of the hidden layers of the latent actor"),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults of this agent."""
    return base.get_config(SETTINGS)


# α is 1 on all tasks of the paper.
PRESETS = presets.presets({})
CPU = presets.CPU | {"latent_hidden_dims": (128, 128)}
