"""Euler integration and the flow-matching loss against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utils.flow import euler, flow_matching_loss, shortcut_loss


@pytest.mark.check
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
def test_euler_equals_a_loop(num_steps):
    """Steps are taken at t = 0, 1/n, …, 1 − 1/n with a velocity that depends on x and on t."""
    rng = np.random.default_rng(num_steps)
    matrix, x = rng.normal(size=(3, 3)), rng.normal(size=(2, 4, 3))
    noise = jnp.asarray(x, jnp.float32)
    result = euler(lambda x, t: jnp.tanh(x @ matrix) + t**2 - 3 * t, noise, num_steps)
    for k in range(num_steps):
        t = k / num_steps
        x = x + (np.tanh(x @ matrix) + t**2 - 3 * t) / num_steps
    np.testing.assert_allclose(result, x, atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_euler_is_exact_on_straight_fields(num_steps):
    """v(x, t) = (a − x) / (1 − t), whose paths are straight, reaches a in any number of steps; t has shape [..., 1]."""
    noise, action = jax.random.normal(jax.random.key(0), (2, 5, 3))

    def velocity(x, t):
        assert t.shape == (5, 1)
        return (action - x) / (1 - t)

    np.testing.assert_allclose(euler(velocity, noise, num_steps), action, atol=1e-5)


@pytest.mark.check
@pytest.mark.parametrize("shape", [(6,), (6, 4)])
def test_loss_equals_numpy(shape):
    """Mean over m·d of weight · (v − (a − z))² at x_t = t a + (1 − t) z, with weights a row or a component."""
    rng = np.random.default_rng(0)
    noise, actions = rng.normal(size=(2, 6, 4)).astype(np.float32)
    weights = rng.integers(0, 3, shape).astype(np.float32)
    seen = {}

    def velocity(x, t):
        seen.update(x=np.asarray(x), t=np.asarray(t))
        return 2 * x - t

    loss = flow_matching_loss(velocity, jax.random.key(0), *map(jnp.asarray, (noise, actions, weights)))
    assert seen["t"].shape == (6, 1)
    assert len(np.unique(seen["t"])) == 6
    np.testing.assert_allclose(seen["x"], seen["t"] * actions + (1 - seen["t"]) * noise, atol=1e-6)
    errors = (2 * seen["x"] - seen["t"] - (actions - noise)) ** 2
    expected = sum(weights[i] * errors[i] if len(shape) == 1 else weights[i] @ errors[i, :, None] for i in range(6))
    np.testing.assert_allclose(loss, np.sum(expected) / 24, rtol=1e-5)


def test_times_are_uniform():
    """Over a large batch t is U[0, 1]."""
    seen = {}

    def velocity(x, t):
        seen["t"] = np.sort(np.asarray(t)[:, 0])
        return x

    zeros = jnp.zeros((20_000, 1))
    flow_matching_loss(velocity, jax.random.key(3), zeros, zeros, jnp.ones(20_000))
    assert np.abs(seen["t"] - np.linspace(0, 1, 20_000)).max() < 0.015  # Kolmogorov-Smirnov, p = 0.0002


def test_weight_zero_leaves_no_gradient():
    """A component of weight zero does not train the field."""
    noise, actions = jax.random.normal(jax.random.key(0), (2, 3, 2))
    weights = jnp.ones((3, 2)).at[1, 1].set(0.0)

    def loss(offset):
        return flow_matching_loss(lambda x, t: x + offset, jax.random.key(1), noise, actions, weights)

    gradient = jax.grad(loss)(jnp.zeros((3, 2)))
    assert np.array_equal(np.asarray(gradient) == 0, np.asarray(weights) == 0)


@pytest.mark.check
def test_shortcut_loss_equals_numpy():
    """A quarter of the rows learns a step h from two averaged half steps; the rest a − z at the smallest step."""
    rng, size = np.random.default_rng(1), 4000
    noise, actions = rng.normal(size=(2, size, 3)).astype(np.float32)
    weights, seen = rng.integers(0, 3, (size, 3)).astype(np.float32), {}

    def velocity(x, t, h):
        seen.update(x=np.asarray(x), t=np.asarray(t), h=np.asarray(h))
        return 2 * x - t + h

    def average(x, t, h):
        assert x.shape == (size // 4, 3)
        return jnp.sin(x) + 3 * t - 2 * h

    loss = shortcut_loss(velocity, average, jax.random.key(0), *map(jnp.asarray, (noise, actions, weights)))
    x, t, h = seen["x"], seen["t"], seen["h"]
    np.testing.assert_allclose(x, t * actions + (1 - t) * noise, atol=1e-6)
    rows = np.arange(size) < size // 4
    assert np.all(h[~rows] == 0.125)
    values, counts = np.unique(h[rows], return_counts=True)
    np.testing.assert_array_equal(values, [0.25, 0.5, 1.0])
    assert np.abs(counts / 1000 - 1 / 3).max() < 0.05
    for span in values:  # Starts of whole steps, all about as often.
        starts, counts = np.unique(t[rows][h[rows] == span], return_counts=True)
        np.testing.assert_array_equal(starts, np.arange(0, 1, span))
        assert counts.min() > 0.7 * counts.max()
    first = np.sin(x) + 3 * t - h
    second = np.sin(x + h / 2 * first) + 3 * (t + h / 2) - h
    target = np.where(rows[:, None], (first + second) / 2, actions - noise)
    np.testing.assert_allclose(loss, np.mean(weights * (2 * x - t + h - target) ** 2), rtol=1e-5)


def test_shortcut_targets_have_no_gradient():
    """The averaged flow is a target, even where it is the trained flow itself."""
    noise, actions = jax.random.normal(jax.random.key(0), (2, 8, 2))

    def gradient(of_target):
        def loss(offset):
            average = (lambda x, t, h: x + offset) if of_target else (lambda x, t, h: x)
            return shortcut_loss(lambda x, t, h: x + offset, average, jax.random.key(1), noise, actions, jnp.ones(8))

        return jax.grad(loss)(0.0)

    np.testing.assert_allclose(gradient(True), gradient(False), rtol=1e-6)


def test_a_straight_flow_has_no_shortcut_error():
    """Straight paths to one action satisfy flow matching and self-consistency at every point and step."""
    noise, action = jax.random.normal(jax.random.key(0), (64, 2)), jnp.float32([0.3, -0.2])

    def velocity(x, t, h):
        return (action - x) / jnp.maximum(1 - t, 1e-6)

    actions = jnp.tile(action, (64, 1))
    loss = shortcut_loss(velocity, lambda x, t, h: velocity(x, t, h), jax.random.key(1), noise, actions, jnp.ones(64))
    assert loss < 1e-6
