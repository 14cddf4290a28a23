"""Flow matching on the linear interpolant: noise at t = 0, data at t = 1 (paper Eq. 1)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from utils.arrays import Scalar

Velocity = Callable[[Float[Array, "*b d"], Float[Array, "*b 1"]], Float[Array, "*b d"]]
# v(x, t, h), the mean velocity over a step h.
StepVelocity = Callable[[Float[Array, "*b d"], Float[Array, "*b 1"], Float[Array, "*b 1"]], Float[Array, "*b d"]]
SHORTCUT_SPANS = (1.0, 0.5, 0.25)  # Steps that are learned from two steps of half the size.
SMALLEST_STEP = SHORTCUT_SPANS[-1] / 2  # Learned by flow matching.
SHORTCUT_ROWS = 4  # One row of so many learns a step of SHORTCUT_SPANS.


def unrolled() -> bool:
    """True if short loops are written out: on a GPU, where an iteration is so short that the loop itself counts."""
    return jax.default_backend() != "cpu"


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

    return jax.lax.scan(step, noise, jnp.arange(num_steps) / num_steps, unroll=unrolled())[0]


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


def shortcut_loss(
    velocity: StepVelocity,
    average: StepVelocity,
    key: PRNGKeyArray,
    noise: Float[Array, "m d"],
    actions: Float[Array, "m d"],
    weights: Float[Array, " m"] | Float[Array, "m d"],
) -> Scalar:
    """Computes flow matching beside self-consistency on given pairs (shortcut models, arXiv 2410.12557, §3.2).

    A step h ∈ SHORTCUT_SPANS must lead where two steps of h/2 of the averaged flow lead; t is a multiple of h:

        v(x_t, t, h) ← ½ (v̄(x_t, t, h/2) + v̄(x_t + h/2 · v̄(x_t, t, h/2), t + h/2, h/2))

    The other rows learn v(x_t, t, SMALLEST_STEP) ← a − z.

    Args:
        velocity: v(x, t, h) at the observations of the pairs.
        average: v̄(x, t, h) at the observations of the first m // SHORTCUT_ROWS pairs.
        key: PRNG key of t and h.
        noise: z.
        actions: a.
        weights: one per pair or one per component.

    Returns:
        the mean over all m · d components of weight · (v − target)².
    """
    size, rows = len(noise), len(noise) // SHORTCUT_ROWS
    time_key, span_key, start_key = jax.random.split(key, 3)
    span = jax.random.choice(span_key, jnp.asarray(SHORTCUT_SPANS), (rows, 1))
    start = span * jnp.floor(jax.random.uniform(start_key, (rows, 1)) / span)
    t = jax.random.uniform(time_key, (size, 1)).at[:rows].set(start)
    h = jnp.full((size, 1), SMALLEST_STEP).at[:rows].set(span)
    x = t * actions + (1 - t) * noise
    first = average(x[:rows], start, span / 2)
    second = average(x[:rows] + span / 2 * first, start + span / 2, span / 2)
    target = (actions - noise).at[:rows].set((first + second) / 2)
    error = velocity(x, t, h) - jax.lax.stop_gradient(target)
    return jnp.mean(jnp.square(error) * weights.reshape(size, -1))
