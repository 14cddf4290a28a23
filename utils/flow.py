"""Flow matching on the linear interpolant: noise at t = 0, data at t = 1 (paper Eq. 1)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def euler(velocity: Velocity, noise: jax.Array, num_steps: int) -> jax.Array:
    """Integrates dx = v(x, t) dt from t = 0 to 1 with `num_steps` Euler steps (the NFE).

    Args:
        velocity: maps x [..., d] and t [..., 1] to [..., d].
        noise: x at t = 0, [..., d].
        num_steps: steps at t = 0, 1/n, …, 1 − 1/n.

    Returns:
        x at t = 1, [..., d], not clipped.
    """

    def step(x: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
        return x + velocity(x, jnp.full((*x.shape[:-1], 1), t)) / num_steps, None

    return jax.lax.scan(step, noise, jnp.arange(num_steps) / num_steps)[0]


def flow_matching_loss(
    velocity: Velocity, key: jax.Array, noise: jax.Array, actions: jax.Array, weights: jax.Array
) -> jax.Array:
    """Conditional flow-matching loss on given pairs (paper Eq. 1).

    Args:
        velocity: v(·, ·) with the observations of the pairs bound, [m, d], [m, 1] → [m, d].
        key: draws t ~ U[0, 1], one per pair.
        noise: z, [m, d].
        actions: a, [m, d].
        weights: [m] per pair, or [m, d] per component; zero leaves a pair or a component out.

    Returns:
        mean over all m · d components of weight · (v(x_t, t) − (a − z))², a scalar.
    """
    t = jax.random.uniform(key, (*noise.shape[:-1], 1))
    error = velocity(t * actions + (1 - t) * noise, t) - (actions - noise)
    return jnp.mean(jnp.square(error) * weights.reshape(noise.shape[0], -1))
