"""QSM: loss and samplers against NumPy, what each sampler makes of a known density, and what the agent learns."""

from types import SimpleNamespace

import bandit
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from compiling import optimised
from loss_checks import check_loss_and_gradient, td_loss
from numpy_networks import as_float64, critic, make_agent, make_batch

from agents import qsm
from utils.run.agent_config import resolve_config

BATCH = make_batch()
CORNER = np.array([1.0, -1.0, -1.0, 1.0])
STEPS = np.array([1, 10, 2, 3, 5, 9, 4, 6, 7, 8, 10, 1])


def schedule(num_steps):
    """α_t and ᾱ_t, t = 1 … T, from the rates of the public code."""
    t = np.arange(1, num_steps + 1)
    alpha = np.exp(-0.1 / num_steps - 0.5 * (10.0 - 0.1) * (2 * t - 1) / num_steps**2)
    return alpha, np.cumprod(alpha)


def noise_prediction(params, observations, x, t):
    """ε(s, x, t) in float64: Fourier features of t, their MLP, then the MLP on all, both with Mish."""
    params = as_float64(params)
    phase = 2 * np.pi * np.asarray(t, np.float64) * params["frequencies"]
    depth = (len(params) - 1) // 2

    def mlp(h, first, last):
        for i in range(first, last):
            h = h if i == first else h * np.tanh(np.logaddexp(0, h))
            h = h @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
        return h

    time = mlp(np.concatenate([np.cos(phase), np.sin(phase)], axis=-1), 0, depth)
    return mlp(np.concatenate([observations, x, time], axis=-1), depth, 2 * depth + 1)


def critic_slope(params, observations, x):
    """∇_x of the ensemble mean, by central differences."""
    slope = np.zeros_like(x)
    for i in range(x.shape[-1]):
        step = 1e-5 * np.eye(x.shape[-1])[i]
        ends = [critic(params, observations, x + h * step).mean(0) for h in (1, -1)]
        slope[:, i] = (ends[0] - ends[1]) / 2e-5
    return slope


# ---- the loss


class Cornered(qsm.Agent):
    """QSM whose action is CORNER."""

    def propose(self, observations, key):
        """CORNER for each observation."""
        return jnp.broadcast_to(jnp.float32(CORNER), (*observations.shape[:-1], 4))


@pytest.mark.check
@pytest.mark.parametrize(("inv_temp", "alpha"), [(3.0, 2.0), (0.5, 0.0)])
def test_loss_and_gradient_equal_numpy(monkeypatch, inv_temp, alpha):
    """TD + mean of weight · ((ε_θ + τ ∇Q̄)² + α (ε_θ − ε)²), x = sqrt(ᾱ_t) a + sqrt(1 − ᾱ_t) ε, Q̄ the targets' mean."""
    monkeypatch.setattr(jax.random, "randint", lambda key, shape, low, high: jnp.asarray(STEPS).reshape(shape))
    module = SimpleNamespace(Agent=Cornered, get_config=qsm.get_config)
    agent = make_agent(module, BATCH, inv_temp=inv_temp, alpha=alpha, discount=0.9, rho=0.5, time_dim=6)
    batch = as_float64(BATCH)
    observations, actions = batch["observations"], batch["actions"]
    next_qs = critic(agent.targets["critic"], batch["next_observations"], np.tile(CORNER, (12, 1)))
    powers, weights = schedule(10)[1][STEPS - 1, None], batch["valid"][:, None] * batch["action_mask"]
    slopes = {}

    def expected(params, draws):
        (noise,) = draws
        x = np.sqrt(powers) * actions + np.sqrt(1 - powers) * noise
        if not slopes:
            slopes["q"] = critic_slope(agent.targets["critic"], observations, x)
        predicted = noise_prediction(params["denoiser"], observations, x, STEPS[:, None])
        loss = td_loss(critic(params["critic"], observations, actions), next_qs, batch, agent)
        loss += np.sum(weights * (predicted + inv_temp * slopes["q"]) ** 2) / 48
        return loss + alpha * np.sum(weights * (predicted - noise) ** 2) / 48

    info, draws = check_loss_and_gradient(agent, BATCH, expected)
    assert np.abs(draws[0]).max() > 1
    np.testing.assert_allclose(info["denoiser/q_slope"], np.sqrt(np.mean(slopes["q"] ** 2)), rtol=1e-3)


def test_steps_are_drawn_from_one_to_the_last(monkeypatch):
    """Times t ~ U{1, …, T}, one for each row, apart from the noise."""
    agent, randint, calls = make_agent(qsm, BATCH, flow_steps=7), jax.random.randint, []
    monkeypatch.setattr(jax.random, "randint", lambda *args: calls.append(args) or randint(*args))
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: calls.append((key, shape)) or jnp.zeros(shape))

    @jax.jit
    def keys():
        agent.denoiser_loss(agent.params, BATCH, jax.random.key(0))
        return [jax.random.key_data(call[0]) for call in calls]

    step_key, noise_key = keys()
    assert not np.array_equal(step_key, noise_key)
    (_, shape, low, high), (_, noise_shape) = calls
    assert (np.prod(shape), low, high, noise_shape) == (12, 1, 8, (12, 4))


gradient_of = jax.jit(lambda agent, batch: jax.value_and_grad(agent.loss, has_aux=True)(agent.params, batch, agent.key))


def test_nothing_is_learned_from_no_sample():
    """A batch of invalid windows has zero loss and zero gradient (the public code's power of `valid` gives it one)."""
    (loss, _), gradient = gradient_of(make_agent(qsm, BATCH, flow_steps=2), BATCH | {"valid": jnp.zeros(12)})
    assert loss == 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_gradients_are_clipped_together():
    """Adam sees a gradient of norm 1 over critics and denoiser: its first moment after one update has norm 0.1."""
    agent = make_agent(qsm, BATCH, flow_steps=2)
    gradient = gradient_of(agent, BATCH)[1]
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
    assert norm > 2
    moment = jax.jit(agent.OPTIMISER.update)(gradient, agent.opt_state)[1][1].mu
    for ours, expected in zip(jax.tree.leaves(moment), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(ours, 0.1 * expected / norm, rtol=1e-3, atol=1e-6)


# ---- the samplers


@pytest.mark.parametrize("num_steps", [1, 10, 200])
def test_schedule_is_variance_preserving(num_steps):
    """ᾱ is the product of the public code's α_t; the whole process keeps exp(−5.05) of the signal's power for any T."""
    powers = qsm.signal_powers(num_steps)
    np.testing.assert_allclose(powers[1:], schedule(num_steps)[1], rtol=1e-12)
    assert powers[0] == 1
    np.testing.assert_allclose(powers[-1], np.exp(-5.05))


def test_posterior_is_bayes():
    """q(x_{t−1} | x_t, x_0) of 'ddpm': the product of N(sqrt(ᾱ_{t−1}) x_0, 1 − ᾱ_{t−1}) and the step's likelihood."""
    alpha, powers = schedule(10)
    of_clean, of_x, of_noise = qsm.reverse_weights(10, "ddpm")
    assert (of_clean[0], of_x[0], of_noise[0]) == (pytest.approx(1), 0, 0)  # x_0 itself
    for t in range(1, 10):
        prior, likelihood = 1 / (1 - powers[t - 1]), alpha[t] / (1 - alpha[t])
        variance = 1 / (prior + likelihood)
        np.testing.assert_allclose(of_clean[t], variance * prior * np.sqrt(powers[t - 1]), rtol=1e-9)
        np.testing.assert_allclose(of_x[t], variance * likelihood / np.sqrt(alpha[t]), rtol=1e-9)
        np.testing.assert_allclose(of_noise[t], np.sqrt(variance), rtol=1e-9)
    with pytest.raises(ValueError, match="'estimate' or 'ddpm'"):
        qsm.reverse_weights(10, "euler")


@pytest.mark.parametrize("sampler", ["estimate", "ddpm"])
def test_acting_equals_numpy(monkeypatch, sampler):
    """The reverse process written out, on the draws that the averaged denoiser's sampling makes."""
    agent = make_agent(qsm, BATCH, flow_steps=6, sampler=sampler, time_dim=6)
    # Predictions of the size of noise, so that the clipping does not hide the rest.
    agent = agent.replace(
        targets=agent.targets | {"denoiser": jax.tree.map(lambda p: 0.4 * p, agent.targets["denoiser"])}
    )
    draws, normal = [], jax.random.normal

    def recorded(*args, **kwargs):
        draws.append(np.asarray(normal(*args, **kwargs), np.float64))
        return jnp.asarray(draws[-1], jnp.float32)

    monkeypatch.setattr(jax.random, "normal", recorded)
    with jax.disable_jit():
        actions = agent.propose(BATCH["observations"], jax.random.key(0))
    (alpha, powers), x = schedule(6), draws[0]
    clipped = 0
    for t, noise in zip(range(6, 0, -1), draws[1:], strict=True):
        a, power, before = alpha[t - 1], powers[t - 1], 1.0 if t == 1 else powers[t - 2]
        predicted = noise_prediction(agent.targets["denoiser"], BATCH["observations"], x, np.full((12, 1), t))
        clean = (x - np.sqrt(1 - power) * predicted) / np.sqrt(power)
        if sampler == "estimate":
            x = clean + (t > 1) * np.sqrt(1 - a) * noise
        else:
            mean = np.sqrt(before) * (1 - a) * np.clip(clean, -1, 1) + np.sqrt(a) * (1 - before) * x
            x = (mean + np.sqrt((1 - a) * (1 - before) * (1 - power)) * noise) / (1 - power)
        clipped += np.mean(np.abs(clean) > 1)
        x = np.clip(x, -1, 1) if sampler == "estimate" else x
    assert 0.05 < clipped / 6 < 0.95
    assert np.mean(np.abs(x) < 0.99) > 0.2
    np.testing.assert_allclose(actions, np.clip(x, -1, 1), atol=1e-4)


def mixture(means, deviation, shares):
    """E[ε | x_t] of a mixture of Gaussians on the line: (x [n, 1], ᾱ) → [n, 1]."""

    def predict(x, power):
        variance = power * deviation**2 + 1 - power
        distance = x - jnp.sqrt(power) * jnp.asarray(means)
        share = jax.nn.softmax(jnp.log(jnp.asarray(shares)) - 0.5 * distance**2 / variance, axis=-1)
        return jnp.sqrt(1 - power) * jnp.sum(share * distance / variance, axis=-1, keepdims=True)

    return predict


def draw(predict, num_steps, sampler, size=10_000):
    """Samples of the reverse process with the noise prediction predict(x, ᾱ_t), [size]."""
    powers = jnp.asarray(qsm.signal_powers(num_steps), jnp.float32)
    noise = jax.random.normal(jax.random.key(5), (size, 1))
    by_step = lambda x, t: predict(x, powers[t.astype(int)])  # noqa: E731
    return np.asarray(jax.jit(lambda z: qsm.denoise(by_step, z, jax.random.key(6), num_steps, sampler))(noise))[:, 0]


def test_only_the_posterior_tends_to_the_density():
    """With the exact prediction and T = 200, 'ddpm' gives the density; 'estimate' narrows it to its heaviest mode."""
    bell, modes = mixture([0.2], 0.3, [1.0]), mixture([-0.5, 0.5], 0.1, [0.3, 0.7])
    moments, shares = {}, {}
    for num_steps in (10, 200):
        for sampler in ("estimate", "ddpm"):
            x = draw(bell, num_steps, sampler)
            moments[sampler, num_steps] = x.mean(), x.std()
            shares[sampler, num_steps] = np.mean(draw(modes, num_steps, sampler) > 0)
    print({k: np.round(v, 3) for k, v in moments.items()}, {k: v.round(3) for k, v in shares.items()})
    np.testing.assert_allclose(moments["ddpm", 200], [0.2, 0.3], atol=0.02)
    np.testing.assert_allclose(shares["ddpm", 200], 0.7, atol=0.03)
    assert moments["estimate", 200][1] < 0.15
    assert shares["estimate", 200] > 0.97
    for sampler in ("estimate", "ddpm"):  # at T = 10 both are near it, and both too narrow
        np.testing.assert_allclose(shares[sampler, 10], 0.7, atol=0.07)
        np.testing.assert_allclose(moments[sampler, 10][0], 0.2, atol=0.02)
        assert 0.15 < moments[sampler, 10][1] < 0.27


def test_published_target_is_not_the_tilted_density():
    """The DDPM process with −τ ∇Q, or its average with E[ε|x], is far from exp(τ Q) and from p_data exp(τ Q)."""
    # τ Q = −(a − 0.2)² / (2 · 0.25²): the density exp(τ Q) is N(0.2, 0.25²).
    exact, published = draw(mixture([0.2], 0.25, [1.0]), 200, "ddpm"), draw(lambda x, _: 16 * (x - 0.2), 200, "ddpm")
    np.testing.assert_allclose([exact.mean(), exact.std()], [0.2, 0.25], atol=0.02)
    assert published.std() < 0.1
    # p_data = N(0, 0.3²) and τ Q = 3 a: the product is N(0.27, 0.3²).
    exact, data = draw(mixture([0.27], 0.3, [1.0]), 200, "ddpm"), mixture([0.0], 0.3, [1.0])
    published = draw(lambda x, power: (data(x, power) - 3) / 2, 200, "ddpm")
    np.testing.assert_allclose([exact.mean(), exact.std()], [0.27, 0.3], atol=0.02)
    assert published.mean() > 0.8


# ---- learning


class Line(qsm.Agent):
    """QSM on the line with the known value Q(a) = −(a − 0.4)² in place of the critics; it trains the denoiser only."""

    def apply(self, name, *inputs, params=None):
        """Evaluates a network, or the known value."""
        if name == "critic":
            return -jnp.square(inputs[1][..., 0] - 0.4)[None]
        return super().apply(name, *inputs, params=params)

    loss = qsm.Agent.denoiser_loss


def test_samples_climb_the_value():
    """The denoiser learns (α E[ε|x] − τ ∇Q) / (1 + α), so its samples rise from the data towards the best action."""
    config = qsm.get_config()
    config.update({"actor_hidden_dims": (64, 64), "value_hidden_dims": (4,), "num_qs": 1, "time_dim": 16})
    config.update({"alpha": 5.0, "lr": 3e-3, "flow_tau": 0.01})
    size, inv_temps = 256, (0.0, 2.0, 6.0)
    ones = {"valid": jnp.ones(size), "action_mask": jnp.ones((size, 1)), "observations": jnp.ones((size, 1))}
    actions = 0.3 * jax.random.normal(jax.random.key(1), (600, size, 1))

    @jax.jit
    @jax.vmap
    def train(inv_temp):
        agent = Line.create(jax.random.key(0), ones | {"actions": actions[0]}, config)
        agent = agent.replace(hyper=agent.hyper | {"inv_temp": inv_temp})
        step = lambda agent, a: (agent.update(ones | {"actions": a})[0], None)  # noqa: E731
        agent = jax.lax.scan(step, agent, actions)[0]
        return agent.sample_actions(jnp.ones((2000, 1)), jax.random.key(2))[:, 0]

    with optimised():
        samples = np.asarray(train(jnp.asarray(inv_temps)))
    data = mixture([0.0], 0.3, [1.0])
    values = -np.mean((samples - 0.4) ** 2, axis=1)
    print("values:", values.round(3))
    assert values[0] + 0.1 < values[1] < values[2] - 0.02
    for inv_temp, x in zip(inv_temps, samples, strict=True):
        ideal = draw(lambda x, power, k=inv_temp: (5 * data(x, power) + 2 * k * (x - 0.4)) / 6, 10, "estimate")
        print(inv_temp, x.mean().round(3), x.std().round(3), "ideal", ideal.mean().round(3), ideal.std().round(3))
        np.testing.assert_allclose([x.mean(), x.std()], [ideal.mean(), ideal.std()], atol=0.05)


def test_bandit():
    """Without a temperature QSM keeps the data's shares; with one the best mode has three times its share."""
    settings = {"alpha": 10.0, "flow_steps": 10, "flow_tau": 0.005, "time_dim": 16}
    agents = bandit.train(
        qsm, bandit.make_data(), 1500, inv_temp=[0.0, 10.0], **{k: [v] * 2 for k, v in settings.items()}
    )
    contexts, shares = bandit.fresh_contexts(), {}
    act = jax.jit(lambda agent: agent.sample_actions(contexts, jax.random.key(3)))
    for inv_temp, agent in zip((0, 10), agents, strict=True):
        for sampler in ("estimate", "ddpm"):
            config = ml_collections.FrozenConfigDict(dict(agent.config) | {"sampler": sampler})
            shares[inv_temp, sampler] = bandit.mode_shares(contexts, act(agent.replace(config=config)))
    print({k: v.round(3) for k, v in shares.items()})
    for sampler in ("estimate", "ddpm"):
        np.testing.assert_allclose(shares[0, sampler], bandit.SHARES, atol=0.1)
        assert shares[10, sampler][3] > 0.4
        assert shares[10, sampler][0] < 0.2


def test_settings():
    """τ and α of each domain as in QAM's experiments; a domain without an entry takes its nearest."""
    table = {
        "antmaze-large": (10, 10),
        "antmaze-giant": (10, 10),
        "humanoidmaze-medium": (10, 30),
        "humanoidmaze-large": (10, 30),
        "cube-double": (1, 10),
        "cube-triple": (10, 10),
        "cube-quadruple": (1, 10),
        "scene": (3, 30),
        "puzzle-3x3": (10, 30),
        "puzzle-4x4": (10, 1),
        "puzzle-4x6": (10, 1),
    }
    for domain, expected in table.items():
        config = resolve_config(qsm, domain, "paper", {})[0]
        assert (config.inv_temp, config.alpha) == expected
        assert (config.flow_steps, config.best_of_n, config.sampler) == (10, 1, "estimate")
