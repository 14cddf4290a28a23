"""Q-score matching (QSM): a diffusion policy fitted to the data's noise and to the critic's action gradient.

One update, on a batch {(s, a, R, s')} of m windows, with the variance-preserving ᾱ_t of T steps:

    critic     a' ← the sampler below at s';  TD step on Q
    noise      t ~ U{1, …, T}, ε ~ N(0, I);  x ← sqrt(ᾱ_t) a + sqrt(1 − ᾱ_t) ε
    denoiser   step on ‖ε_θ(s, x, t) + τ ∇_x Q̄(s, x)‖² + α ‖ε_θ(s, x, t) − ε‖²,  Q̄ the mean of the target critics

Sampling starts at x ~ N(0, I). For t = T, …, 1, with the clean estimate x̂ = (x − sqrt(1 − ᾱ_t) ε_θ) / sqrt(ᾱ_t),

    'estimate'   x ← clip(x̂ + 1(t > 1) sqrt(1 − α_t) ξ),  ξ ~ N(0, I), as in the public code
    'ddpm'       x ~ q(x_{t−1} | x_t, clip x̂), the posterior of Ho et al. (arXiv 2006.11239)

As T grows, only 'ddpm' tends to the denoiser's distribution. 'estimate' does not return to the noise level of step
t − 1: it is a mean shift of shrinking bandwidth and tends to points in the heaviest mode. At T = 10 the two are close.

This is QSM (Psenka et al., ICML 2024, arXiv 2312.11752) as in QAM's experiments (its `agents/dcgql.py`), which add the
second regression: without it nothing ties the policy to the data. The global norm of the gradient, over critics and
denoiser, is clipped at 1. QAM's code raises the squared error to the power of `valid`, where a product is meant; this
file multiplies.

The minimiser is not the noise prediction of p_data(a) exp(τ Q(a)), nor, at α = 0, that of exp(τ Q(a)):

- The noise prediction is −sqrt(1 − ᾱ_t) times the score of the noised density. The published target −τ ∇Q̄ lacks the
  factor and replaces that score by the gradient of the clean Q at noisy actions, where it was not trained.
- One network under two regressions is the average (α E[ε|x] − τ ∇Q̄) / (1 + α) of their targets, whereas a product of
  densities has the sum of the scores: τ/α trades value for data, and α / (1 + α) shrinks the data's own score.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from agents import base, presets
from utils.arrays import Observations, Scalar
from utils.networks import CriticEnsemble, Denoiser

BETA_MIN, BETA_MAX = 0.1, 10.0  # rates of the variance-preserving process


def signal_powers(num_steps: int) -> Float[np.ndarray, " {num_steps}+1"]:
    """Returns ᾱ_t = exp(−β_min u − (β_max − β_min) u² / 2) at u = t/T, t = 0 … T; α_t = ᾱ_t / ᾱ_{t−1}."""
    u = np.arange(num_steps + 1) / num_steps
    return np.exp(-BETA_MIN * u - 0.5 * (BETA_MAX - BETA_MIN) * u**2)


def reverse_weights(
    num_steps: int, sampler: str
) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, " T"], Float[np.ndarray, " T"]]:
    """Returns A_t, B_t, C_t of x_{t−1} = A_t x̂ + B_t x_t + C_t ξ, x̂ the clean estimate, ξ ~ N(0, I), t = 1 … T."""
    power, before = signal_powers(num_steps)[1:], signal_powers(num_steps)[:-1]
    alpha = power / before
    if sampler == "estimate":
        return np.ones(num_steps), np.zeros(num_steps), np.sqrt(1 - alpha) * (np.arange(num_steps) > 0)
    if sampler == "ddpm":
        kept = (1 - before) / (1 - power)
        return np.sqrt(before) * (1 - alpha) / (1 - power), np.sqrt(alpha) * kept, np.sqrt((1 - alpha) * kept)
    raise ValueError(f"sampler {sampler!r} is not 'estimate' or 'ddpm'")


def denoise(
    predict: Callable[[Float[Array, "*b d"], Float[Array, "1"]], Float[Array, "*b d"]],
    noise: Float[Array, "*b d"],
    key: PRNGKeyArray,
    num_steps: int,
    sampler: str,
) -> Float[Array, "*b d"]:
    """Runs the reverse process.

    Args:
        predict: ε(·, ·), maps x and the step t, from T to 1, to noise.
        noise: x_T.
        key: PRNG key of the steps' noise.
        num_steps: T.
        sampler: 'estimate' or 'ddpm' (see the module's docstring).

    Returns:
        x_0 in [−1, 1].
    """

    def step(x: Float[Array, "*b d"], inputs: tuple[Array, ...]) -> tuple[Float[Array, "*b d"], None]:
        t, power, of_clean, of_x, of_noise, key = inputs
        clean = (x - jnp.sqrt(1 - power) * predict(x, t[None])) / jnp.sqrt(power)
        if sampler == "ddpm":
            clean = jnp.clip(clean, -1.0, 1.0)
        x = of_clean * clean + of_x * x + of_noise * jax.random.normal(key, x.shape)
        return jnp.clip(x, -1.0, 1.0) if sampler == "estimate" else x, None

    tables = (np.arange(1, num_steps + 1), signal_powers(num_steps)[1:], *reverse_weights(num_steps, sampler))
    inputs = *(jnp.asarray(table, jnp.float32) for table in tables), jax.random.split(key, num_steps)
    return jnp.clip(jax.lax.scan(step, noise, inputs, reverse=True)[0], -1.0, 1.0)


class Agent(base.Agent):
    """QSM."""

    TARGETS = {"critic": "tau", "denoiser": "flow_tau"}
    FLOWS = ()  # A flow's parameters do not fit a diffusion policy.
    OPTIMISER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

    @classmethod
    def networks(cls, config: Any, action_dim: int) -> dict[str, Any]:
        """Returns name → module of every network."""
        return {
            "critic": CriticEnsemble(tuple(config.value_hidden_dims), config.num_qs),
            "denoiser": Denoiser(tuple(config.actor_hidden_dims), action_dim, config.time_dim),
        }

    def loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """Returns the TD loss plus the two regressions of the denoiser, and scalars to log."""
        critic_key, denoiser_key = jax.random.split(key)
        critic_loss, _, info = self.critic_loss(params, batch, critic_key)
        denoiser_loss, denoiser_info = self.denoiser_loss(params, batch, denoiser_key)
        return critic_loss + denoiser_loss, info | denoiser_info

    def denoiser_loss(self, params: dict[str, Any], batch: base.Batch, key: PRNGKeyArray) -> tuple[Scalar, base.Info]:
        """Computes the mean over all m · d components of weight · ((ε_θ + τ ∇Q̄)² + α (ε_θ − ε)²).

        ε_θ is evaluated once for both terms. Both have the weight valid · action_mask: on one alone it would change
        their ratio.

        Returns:
            the loss, and scalars to log.
        """
        cfg, observations, actions = self.cfg, batch["observations"], batch["actions"]
        time_key, noise_key = jax.random.split(key)
        t = jax.random.randint(time_key, (len(actions), 1), 1, cfg.flow_steps + 1)
        noise = jax.random.normal(noise_key, actions.shape)
        power = jnp.asarray(signal_powers(cfg.flow_steps), jnp.float32)[t]
        x = jnp.sqrt(power) * actions + jnp.sqrt(1 - power) * noise
        # At x itself, not clipped.
        slope = jax.grad(
            lambda x: self.apply("critic", observations, x, params=self.targets["critic"]).mean(axis=0).sum()
        )(x)
        predicted = self.apply("denoiser", observations, x, t.astype(jnp.float32), params=params["denoiser"])
        weights = batch["valid"][:, None] * batch["action_mask"]
        score_loss = jnp.mean(weights * jnp.square(predicted + cfg.inv_temp * slope))
        bc_loss = jnp.mean(weights * jnp.square(predicted - noise))
        return score_loss + cfg.alpha * bc_loss, {
            "denoiser/score_loss": score_loss,
            "denoiser/bc_loss": bc_loss,
            "denoiser/q_slope": jnp.sqrt(jnp.mean(jnp.square(slope))),
        }

    def propose(self, observations: Observations, key: PRNGKeyArray) -> Float[Array, "*b d"]:
        """Samples one action for each observation, in [−1, 1]."""
        noise_key, steps_key = jax.random.split(key)
        noise = self.start_noise(observations, noise_key)
        observations = self.encode("denoiser", observations, self.targets["denoiser"])
        return denoise(
            lambda x, t: self.apply("denoiser", observations, x, t, params=self.targets["denoiser"]),
            noise,
            steps_key,
            self.config.flow_steps,
            self.config.sampler,
        )


# Setting → default, meaning.
SETTINGS = {
    "flow_steps": (10, "T, steps of the diffusion"),
    "time_dim": (64, "number of Fourier features of t"),
    "inv_temp": (1.0, "τ, inverse temperature of the critic's gradient"),
    "alpha": (10.0, "α, weight of the data (denoising loss)"),
    "sampler": ("estimate", "'estimate' (the public code's) or 'ddpm'"),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults of this agent."""
    return base.get_config(SETTINGS)


# Settings of QAM's experiments (arXiv 2601.14234).
PRESETS = presets.presets(
    {
        "antmaze-large": {"inv_temp": 10.0, "alpha": 10.0},
        "antmaze-giant": {"inv_temp": 10.0, "alpha": 10.0},
        "humanoidmaze-medium": {"inv_temp": 10.0, "alpha": 30.0},
        "humanoidmaze-large": {"inv_temp": 10.0, "alpha": 30.0},
        "cube-double": {"inv_temp": 1.0, "alpha": 10.0},
        "cube-triple": {"inv_temp": 10.0, "alpha": 10.0},
        "cube-quadruple": {"inv_temp": 1.0, "alpha": 10.0},
        "scene": {"inv_temp": 3.0, "alpha": 30.0},
        "puzzle-3x3": {"inv_temp": 10.0, "alpha": 30.0},
        "puzzle-4x4": {"inv_temp": 10.0, "alpha": 1.0},
    }
)
CPU = presets.CPU
