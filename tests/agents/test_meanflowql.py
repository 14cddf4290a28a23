"""MeanFlowQL: its loss against NumPy, the MeanFlow identity, and what it learns on a bandit whose answer is known."""

import bandit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import check_loss_and_gradient, td_loss
from numpy_networks import as_float64, critic, make_agent, make_batch, random_params, velocity

from agents import meanflowql
from utils.networks import TokenTransformer
from utils.run.agent_config import resolve_config

BATCH = make_batch()
STATES = (np.asarray(BATCH["observations"]) - np.asarray(BATCH["observations"]).mean(0)) / np.asarray(
    BATCH["observations"]
).std(0)


@pytest.mark.check
def test_loss_and_gradient_equal_numpy(monkeypatch):
    """TD + α · weighted MeanFlow − Q + bound; targets and weights have no gradient, and Q trains the actor alone."""
    agent = make_agent(meanflowql, BATCH, alpha=3.0, discount=0.9, rho=0.5, best_of_n=1, time_steps=4)
    batch, own = as_float64(BATCH), agent.params
    actions, valid = batch["actions"], batch["valid"]
    times = np.random.default_rng(2).integers(1, 5, (12, 1))
    monkeypatch.setattr(jax.random, "randint", lambda *_: jnp.asarray(times))
    mean, deviation = (np.asarray(x, np.float64) for x in agent.condition_stats)
    following = (batch["next_observations"] - mean) / deviation

    def meanflow(params, noise):
        t = times / 4
        x, v = (1 - t) * actions + t * noise, noise - actions
        ends = [velocity(own["actor"], STATES, x + h * v, t + h) for h in (1e-5, -1e-5)]
        target = np.clip(x + (t - 1) * v - t * (ends[0] - ends[1]) / 2e-5, -5, 5)
        fixed, errors = (
            np.mean(batch["action_mask"] * (velocity(p, STATES, x, t) - target) ** 2, 1) for p in (own["actor"], params)
        )
        return np.mean(valid * errors * (fixed + 1e-4) ** -0.2)

    def expected(params, draws):
        next_noise, flow_noise, noise = draws
        one = np.ones((12, 1))
        next_actions = np.clip(velocity(own["actor"], following, next_noise[0], one), -1, 1)
        next_qs = critic(agent.targets["critic"], batch["next_observations"], next_actions)
        loss = td_loss(critic(params["critic"], batch["observations"], actions), next_qs, batch, agent)
        loss += 3.0 * meanflow(params["actor"], flow_noise)
        samples = velocity(params["actor"], STATES, noise, one)
        q = critic(own["critic"], batch["observations"], np.clip(samples, -1, 1)).mean(0)
        outside = np.maximum(samples - 1, 0) + np.maximum(-1 - samples, 0)
        return loss + np.mean(valid[:, None] * outside) - np.mean(valid * q)

    check_loss_and_gradient(agent, BATCH, expected)


def test_one_data_point_solves_the_identity():
    """If all actions are a, g = x − (x − a) / t has no loss, and g(ε, 1) = a."""
    point = jnp.float32([0.3, -0.5, 0.1, 0.8])
    batch = BATCH | {"actions": jnp.tile(point, (12, 1))}

    class Exact(meanflowql.Agent):
        def actor(self, observations, x, t, params=None):
            return x - (x - point) / t

    agent = make_agent(meanflowql, batch)
    exact = Exact(**{k: getattr(agent, k) for k in agent.__dataclass_fields__})
    assert exact.meanflow_loss(agent.params, batch, jax.random.key(0)) < 1e-6
    np.testing.assert_allclose(exact.propose(batch["observations"], jax.random.key(1)), batch["actions"], atol=1e-5)


def test_a_new_actor_starts_at_zero():
    """Before training every action is 0, within bounds; acting is one evaluation of standardised states."""
    config = meanflowql.get_config()
    config.update({"actor_hidden_dims": (8,), "value_hidden_dims": (8,), "num_qs": 2})
    fresh = meanflowql.Agent.create(0, BATCH, config)
    np.testing.assert_array_equal(fresh.propose(BATCH["observations"], jax.random.key(1)), np.zeros((12, 4)))
    agent = make_agent(meanflowql, BATCH)
    assert agent.nfe == 1
    noise = jax.random.normal(jax.random.key(1), (12, 4))
    expected = np.clip(velocity(agent.params["actor"], STATES, noise, np.ones((12, 1))), -1, 1)
    np.testing.assert_allclose(agent.propose(BATCH["observations"], jax.random.key(1)), expected, atol=1e-4)


def test_the_transformer_equals_numpy():
    """Blocks on one token, modulated by the time; before training the output is 0."""
    width, inputs = 8, (BATCH["observations"], BATCH["actions"], jnp.full((12, 1), 0.3))
    network = TokenTransformer(width, 2, 4)
    fresh = jax.jit(network.init)(jax.random.key(0), *inputs)
    np.testing.assert_array_equal(jax.jit(network.apply)(fresh, *inputs), np.zeros((12, 4)))
    params = random_params(fresh, 1)
    own, (states, x, t) = as_float64(params)["params"], as_float64(inputs)
    layers = iter([own[f"Dense_{i}"] for i in range(sum(name.startswith("Dense") for name in own))])
    gains = iter([own[f"RMSNorm_{i}"]["scale"] for i in range(5)])

    def dense(h):
        layer = next(layers)
        return h @ layer["kernel"] + layer["bias"]

    def normed(h, scale, shift):
        return width**0.5 * next(gains) * h / np.sqrt(np.mean(h**2, 1, keepdims=True) + 1e-6) * (1 + scale) + shift

    silu = lambda h: h / (1 + np.exp(-h))  # noqa: E731
    gelu = lambda h: 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))  # noqa: E731
    phase = t * 10000.0 ** (-np.arange(128) / 128)
    time = silu(dense(silu(dense(np.concatenate([np.cos(phase), np.sin(phase)], 1)))))
    h = dense(np.concatenate([states, x], 1)) + own["position"]
    for _ in range(2):
        shift1, scale1, gate1, shift2, scale2, gate2 = np.split(dense(time), 6, axis=1)
        y = h + gate1 * dense(dense(normed(h, scale1, shift1)))
        y = y + gate2 * dense(gelu(dense(normed(y, scale2, shift2))))
        h = 0.9 * h + 0.1 * y
    shift, scale = np.split(dense(time), 2, axis=1)
    np.testing.assert_allclose(jax.jit(network.apply)(params, *inputs), dense(normed(h, scale, shift)), rtol=1e-3)


def test_the_transformer_is_an_actor():
    """With actor=transformer it proposes, at standardised states."""
    agent = make_agent(meanflowql, BATCH, actor="transformer", transformer_width=8, transformer_blocks=1)
    noise, one = jax.random.normal(jax.random.key(1), (12, 4)), jnp.ones((12, 1))
    expected = jnp.clip(
        TokenTransformer(8, 1, 4).apply({"params": agent.params["actor"]}, jnp.asarray(STATES), noise, one), -1, 1
    )
    np.testing.assert_allclose(agent.propose(BATCH["observations"], jax.random.key(1)), expected, atol=1e-4)


def test_settings():
    """Those of the two commands that are published."""
    for domain, (alpha, steps) in {"humanoidmaze-large": (6000.0, 50), "humanoidmaze-medium": (2000.0, 100)}.items():
        config = resolve_config(meanflowql, domain, "paper", {})[0]
        assert (config.alpha, config.time_steps, config.best_of_n, config.discount) == (alpha, steps, 5, 0.995)


# ---- the bandit


@pytest.fixture(scope="module")
def shares():
    """Shares of the modes under imitation alone (α large) and with Q."""
    settings = {"alpha": [1e4, 1.0], "best_of_n": [1] * 2, "rho": [0.0] * 2, "batch_size": [128] * 2}
    contexts = bandit.fresh_contexts()
    agents = bandit.train(meanflowql, bandit.make_data(), 3000, **settings)
    return [bandit.mode_shares(contexts, bandit.act(agent, contexts)) for agent in agents]


def test_q_turns_the_policy_to_the_best_mode(shares):
    """At a small α the best mode, 15 % of the data, prevails; at a large one the policy imitates."""
    imitation, improved = shares
    print(imitation.round(3), improved.round(3))
    assert improved[3] > 0.6 and improved[0] < 0.1
    assert imitation[0] > 0.2 and imitation[3] < 0.35
