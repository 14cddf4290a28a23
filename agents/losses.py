"""Parts of losses that several agents share: of soft actor-critic (arXiv 1812.05905, §5), and the scale of Q."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from utils.arrays import Info, Scalar


def soft_loss(
    temperature: Scalar,
    log_probs: Float[Array, " m"],
    q: Float[Array, " m"],
    target_entropy: Scalar,
    valid: Float[Array, " m"],
) -> tuple[Scalar, Info]:
    """Computes the losses of a stochastic policy and of its temperature α.

    The mean of valid · (sg(α) log π − q), for the policy, plus the mean of valid · α (−sg(log π) − target), for α.

    Args:
        temperature: α, a function of the parameters.
        log_probs: log π of the policy's samples.
        q: value of the samples.
        target_entropy: entropy that α is adjusted to.
        valid: 1 where the window is a sample, else 0.

    Returns:
        the sum of both losses, and scalars to log.
    """
    actor_loss = jnp.mean(valid * (jax.lax.stop_gradient(temperature) * log_probs - q))
    temperature_loss = temperature * jnp.mean(valid * (-jax.lax.stop_gradient(log_probs) - target_entropy))
    info = {
        "actor/loss": actor_loss,
        "actor/q": q.mean(),
        "actor/entropy": -log_probs.mean(),
        "temperature/loss": temperature_loss,
        "temperature/value": temperature,
    }
    return actor_loss + temperature_loss, info


def inverse_scale(q: Float[Array, " m"], valid: Float[Array, " m"]) -> Scalar:
    """Returns 1 / mean |Q| over the valid windows, without gradient; it normalises Q as TD3+BC (arXiv 2106.06860)."""
    return jax.lax.stop_gradient(valid.sum() / jnp.maximum(jnp.sum(valid * jnp.abs(q)), 1e-6))
