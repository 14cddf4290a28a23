"""The tanh-Gaussian by hand, losses with their gradients and draws, and a problem of known entropy and temperature."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy_networks import as_float64, mlp

from utils.trees import tree_stack

CURVATURE = 10.0


def draw(params, inputs, noise):
    """tanh(μ + σ ξ) and its log-density: the Gaussian's less log |d tanh u / du|, which is −2 log cosh u."""
    (network,) = as_float64(params).values()
    mean, log_std = np.split(mlp(network, np.asarray(inputs, np.float64), False), 2, axis=-1)
    std = np.exp(np.clip(log_std, -20, 2))
    u = mean + std * np.asarray(noise, np.float64)
    gaussian = -0.5 * ((u - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    return np.tanh(u), (gaussian + 2 * (np.logaddexp(u, -u) - np.log(2))).sum(-1)


def assert_gradient(gradient, loss, params, seeds=(0, 1, 2)):
    """The gradient, along random directions, is the central difference of the float64 function `loss`."""
    params, gradient = as_float64(params), as_float64(gradient)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        direction = jax.tree.map(lambda leaf, r=rng: r.normal(size=leaf.shape), params)
        high, low = (
            loss(jax.tree.map(lambda p, d, s=sign: p + s * 1e-6 * d, params, direction)) for sign in (1.0, -1.0)
        )
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(g * d), gradient, direction)))
        assert abs(slope) > 1e-3
        np.testing.assert_allclose(slope, (high - low) / 2e-6, rtol=1e-3, atol=1e-4)


def evaluator(losses):
    """A function (agent, params, batch, key) → name → value, gradient, what is logged, and the normal draws made.

    `losses` maps names to functions (agent, params, batch, key) → loss, or loss, …, and what is logged.
    """
    seen = []

    def evaluate(agent, params, batch, key):
        results = {}
        for name, loss in losses.items():

            def with_info(params, loss=loss):
                found = loss(agent, params, batch, key)
                return (found[0], found[-1]) if isinstance(found, tuple) else (found, {})

            seen.clear()
            (value, info), gradient = jax.value_and_grad(with_info, has_aux=True)(params)
            results[name] = value, gradient, info, list(seen)
        return results

    compiled, normal = jax.jit(evaluate), jax.random.normal

    def run(*args):
        def spy(*args, **kwargs):
            seen.append(normal(*args, **kwargs))
            return seen[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.random, "normal", spy)
            return compiled(*args)

    return run


def assert_own_network(results, whole, own):
    """The loss `whole` is the sum of the others, each of which trains its own networks (`own`) and no other one."""
    parts = {name: results[name] for name in own}
    np.testing.assert_allclose(results[whole][0], sum(value for value, *_ in parts.values()), rtol=1e-4)
    assert sorted(network for names in own.values() for network in names) == sorted(results[whole][1])
    for name, (_, gradient, *_) in parts.items():
        for network, tree in gradient.items():
            for leaf, total in zip(jax.tree.leaves(tree), jax.tree.leaves(results[whole][1][network]), strict=True):
                if network in own[name]:
                    assert np.abs(leaf).max() > 0, (name, network)
                    np.testing.assert_allclose(leaf, total, rtol=1e-3, atol=1e-5)
                else:
                    assert np.all(leaf == 0), (name, network)


def quadratic(agent_class, network, peak):
    """The agent with −CURVATURE ‖x − peak‖² in place of the critic `network`, for every member."""

    class Quadratic(agent_class):
        def apply(self, name, *inputs, params=None):
            if name != network:
                return super().apply(name, *inputs, params=params)
            q = -CURVATURE * jnp.sum(jnp.square(inputs[1] - peak), axis=-1)
            return jnp.broadcast_to(q, (self.config.num_qs, *q.shape))

    return Quadratic


@partial(jax.jit, static_argnames=("loss", "num_steps"))
def fit(agents, loss, num_steps=2500):
    """The agents (stacked) after Adam steps on loss(agent, params, key) alone."""
    optimiser = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))

    def one(agent):
        def step(i, carry):
            params, state = carry
            key = jax.random.fold_in(agent.key, i)
            # The agent's own parameters are the current ones, as in `update`.
            gradient = jax.grad(lambda p: loss(agent.replace(params=params), p, key)[0])(params)
            updates, state = optimiser.update(gradient, state)
            return optax.apply_updates(params, updates), state

        params, _ = jax.lax.fori_loop(0, num_steps, step, (agent.params, optimiser.init(agent.params)))
        return agent.replace(params=params)

    return jax.vmap(one)(agents)


def assert_entropy_reaches_target(agent_class, network, scale_name, batch, loss, sample):
    """On a quadratic Q the policy takes the known deviation about the peak, at the known temperature.

    Args:
        agent_class, network: what learns, and the critic that it climbs.
        scale_name: the setting that scales its draws. batch: what it is created on, and the conditions.
        loss: (agent, params, key) → the actor's loss, …. sample: (agent, key) → scaled draws [n, d], log-density [n].
    """
    width = batch["actions"].shape[-1]
    peak = 0.1 * np.cos(np.arange(width))
    config = inspect.getmodule(agent_class).get_config()
    config.update({"actor_hidden_dims": (16, 16), "value_hidden_dims": (4,), "num_qs": 2})
    first = quadratic(agent_class, network, peak).create(jax.random.key(0), batch, config)
    settings = [{"target_entropy": 0.5, scale_name: 1.0}, {"target_entropy": 1.0, scale_name: 1.0}]
    settings.append({"target_entropy": 0.5, scale_name: 2.0})
    agents = [first.replace(hyper=first.hyper | jax.tree.map(jnp.float32, setting)) for setting in settings]
    trained = fit(tree_stack(agents), loss)
    draws, log_probs = jax.jit(jax.vmap(sample, (0, None)))(trained, jax.random.key(9))
    temperatures = np.exp(trained.params["temperature"]["log_value"])
    for setting, draw, log_prob, found in zip(settings, draws, log_probs, temperatures, strict=True):
        deviation, temperature = known_answer(setting["target_entropy"], setting[scale_name])
        print("entropy:", -log_prob.mean() / width, "temperature:", found, temperature)
        np.testing.assert_allclose(-log_prob.mean() / width, -setting["target_entropy"], atol=0.05)
        np.testing.assert_allclose(np.std(draw, 0) / setting[scale_name], deviation, rtol=0.1)
        np.testing.assert_allclose(np.mean(draw, 0), peak, atol=0.05)
        np.testing.assert_allclose(found, temperature, rtol=0.1)


def known_answer(multiplier, scale):
    """Deviation of e and temperature at which E[Q(scale · e)] + α H[e] is largest and H[e] = −multiplier · d.

    With Q = −c ‖scale · e − peak‖² the best policy is a Gaussian of variance α / (2 c scale²) per component, whose
    entropy is ½ log(2πe variance). The tanh is close to the identity when the peak is near 0 and the variance small.
    """
    variance = np.exp(-2 * multiplier) / (2 * np.pi * np.e)
    return np.sqrt(variance), 2 * CURVATURE * scale**2 * variance
