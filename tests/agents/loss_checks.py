"""An agent's whole loss and its gradient against the formula in float64 NumPy, on the draws that the agent made."""

from unittest import mock

import jax
import numpy as np
from numpy_networks import as_float64, mlp, velocity


def one_step(params, observations, noise):
    """μ(s, z), and any other network of these two inputs without layer norm."""
    (field,) = as_float64(params).values()
    return mlp(field, np.concatenate([observations, noise], axis=-1).astype(np.float64), False)


def state_value(params, observations):
    """V(s)."""
    (field,) = as_float64(params).values()
    return mlp(field, np.asarray(observations, np.float64), True)[..., 0]


def flow_sample(params, observations, noise, num_steps):
    """Euler steps of the velocity, clipped to [−1, 1]."""
    x = np.asarray(noise, np.float64)
    for i in range(num_steps):
        x = x + velocity(params, observations, x, np.full((*x.shape[:-1], 1), i / num_steps)) / num_steps
    return np.clip(x, -1, 1)


def flow_error(params, observations, actions, noise, t):
    """v(s, t a + (1 − t) z, t) − (a − z)."""
    return velocity(params, observations, t * actions + (1 - t) * noise, t) - (actions - noise)


def td_loss(qs, next_qs, batch, agent):
    """Mean over ensemble and all rows of valid · (Q_k − R − γ^H mask (mean − ρ std of the target's))²."""
    discount, rho = float(agent.hyper["discount"]), float(agent.hyper["rho"])
    next_value = next_qs.mean(0) - rho * next_qs.std(0)
    target = batch["rewards"] + discount**agent.config.horizon_length * batch["masks"] * next_value
    return np.mean(batch["valid"] * (qs - target) ** 2)


@jax.jit
def loss_and_gradient(agent, batch, key):
    """The loss, what it logs, its gradient, and the normal and uniform draws that it makes, in their order."""
    draws = []

    def recorded(sample):
        def draw(*args, **kwargs):
            draws.append(sample(*args, **kwargs))
            return draws[-1]

        return draw

    def loss(params):
        value, info = agent.loss(params, batch, key)
        return value, (info, draws)

    with (
        mock.patch.object(jax.random, "normal", recorded(jax.random.normal)),
        mock.patch.object(jax.random, "uniform", recorded(jax.random.uniform)),
    ):
        (value, (info, draws)), gradient = jax.value_and_grad(loss, has_aux=True)(agent.params)
    return value, info, gradient, draws


def check_loss_and_gradient(agent, batch, expected, directions=2):
    """Compares `agent.loss` with `expected(params, draws)`, where only what depends on `params` is differentiated.

    The gradient with respect to each network is compared with differences of `expected` along random directions.

    Returns:
        what the loss logs, and the draws.
    """
    loss, info, gradient, draws = loss_and_gradient(agent, batch, jax.random.key(3))
    params, draws = as_float64(agent.params), as_float64(draws)
    np.testing.assert_allclose(loss, expected(params, draws), rtol=1e-4)
    for name in params:
        for seed in range(directions):
            rng = np.random.default_rng(seed)
            direction = jax.tree.map(lambda leaf, r=rng: r.normal(size=leaf.shape), params[name])
            ends = [
                expected(params | {name: jax.tree.map(lambda p, d, h=h: p + h * d, params[name], direction)}, draws)
                for h in (1e-5, -1e-5)
            ]
            slope = sum(
                np.sum(np.asarray(g, np.float64) * d)
                for g, d in zip(*map(jax.tree.leaves, (gradient[name], direction)), strict=True)
            )
            np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=2e-3, err_msg=name)
    return info, draws
