"""Flow matching on the linear interpolant: noise at t = 0, data at t = 1 (paper Eq. 1)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from utils.arrays import Scalar

Velocity = Callable[[Float[Array, "*b d"], Float[Array, "*b 1"]], Float[Array, "*b d"]]


def euler(velocity: Velocity, noise: Float[Array, "*b d"], num_steps: int) -> Float[Array, "*b d"]:
    """Integrates dx = v(x, t) dt from t = 0 to 1 with `num_steps` Euler steps (the NFE).

    Args:
        velocity: v(x, t).
        noise: x at t = 0.
        num_steps: n; steps start at t = 0, 1/n, …, 1 − 1/n.

    Returns:
        x at t = 1, not clipped.
    """

    def step(x: Float[Array, "*b d"], t: Scalar) -> tuple[Float[Array, "*b d"], None]:
        return x + velocity(x, jnp.full((*x.shape[:-1], 1), t)) / num_steps, None

    return jax.lax.scan(step, noise, jnp.arange(num_steps) / num_steps)[0]


def flow_matching_loss(
    velocity: Velocity,
    key: PRNGKeyArray,
    noise: Float[Array, "m d"],
    actions: Float[Array, "m d"],
    weights: Float[Array, " m"] | Float[Array, "m d"],
) -> Scalar:
    """Computes the conditional flow-matching loss on given pairs (paper Eq. 1).

    Args:
        velocity: v(x, t) at the observations of the pairs.
        key: PRNG key of t ~ U[0, 1], one per pair.
        noise: z.
        actions: a.
        weights: one per pair or one per component.

    Returns:
        the mean over all m · d components of weight · (v(x_t, t) − (a − z))².
    """
    t = jax.random.uniform(key, (*noise.shape[:-1], 1))
    error = velocity(t * actions + (1 - t) * noise, t) - (actions - noise)
    return jnp.mean(jnp.square(error) * weights.reshape(noise.shape[0], -1))
