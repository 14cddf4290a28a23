"""What all agents share: TD loss, best-of-N, Adam and Polyak steps, against NumPy."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from numpy_networks import as_float64, critic, fixed_policy, make_agent, make_batch, velocity

from agents import AGENTS, base, otql

sample_actions = jax.jit(lambda agent, observations, key: agent.sample_actions(observations, key))
critic_loss = jax.jit(lambda agent, key: agent.critic_loss(agent.params, BATCH, key))
CORNER = np.array([1.0, -1.0, -1.0, 1.0])
BATCH = make_batch()


def expected_loss(agent, params, next_actions, discount, rho):
    """Mean over ensemble and all rows of valid · (Q_k − R − γ^H mask (mean − ρ std) of the target networks)²."""
    batch = as_float64(BATCH)
    next_qs = critic(agent.targets["critic"], batch["next_observations"], next_actions)
    count = len(next_qs)
    mean = sum(next_qs) / count
    deviation = np.sqrt(sum((q - mean) ** 2 for q in next_qs) / count)
    target = batch["rewards"] + discount**2 * batch["masks"] * (mean - rho * deviation)
    qs = critic(params, batch["observations"], batch["actions"])
    return np.sum(batch["valid"] * (qs - target) ** 2) / (count * len(target)), qs, target


@pytest.mark.check
@pytest.mark.parametrize(("discount", "rho"), [(0.9, 0.5), (0.7, 0.0), (0.99, 2.0)])
def test_critic_loss_equals_numpy(discount, rho):
    """The TD loss, Q and what is logged, with invalid rows, masks, γ^H, pessimism and target networks."""
    agent = fixed_policy(make_agent(base, BATCH, discount=discount, rho=rho), CORNER)
    loss, qs, info = critic_loss(agent, jax.random.key(0))
    expected, expected_qs, target = expected_loss(
        agent, agent.params["critic"], np.tile(CORNER, (12, 1)), discount, rho
    )
    np.testing.assert_allclose(qs, expected_qs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(info["critic/loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(info["critic/target_max"], target.max(), rtol=1e-4)


@pytest.mark.check
def test_critic_gradient_equals_differences():
    """The gradient is that of the squared error with a fixed target: differences of the NumPy loss along directions."""
    agent = fixed_policy(make_agent(base, BATCH, discount=0.9, rho=0.5), CORNER)
    gradient = jax.jit(jax.grad(lambda params: agent.critic_loss(params, BATCH, jax.random.key(0))[0]))(agent.params)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient["flow"]))
    online, next_actions = as_float64(agent.params["critic"]), np.tile(CORNER, (12, 1))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        direction = jax.tree.map(lambda leaf, r=rng: r.normal(size=leaf.shape), online)
        ends = [
            expected_loss(agent, jax.tree.map(lambda p, d, h=h: p + h * d, online, direction), next_actions, 0.9, 0.5)[
                0
            ]
            for h in (1e-5, -1e-5)
        ]
        slope = sum(np.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (gradient["critic"], direction)), strict=True))
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-3)


@pytest.mark.check
def test_td_target_uses_best_of_n_of_the_online_critic():
    """The next action is what `sample_actions` gives for s', valued by the target networks."""
    agent = make_agent(base, BATCH, discount=0.9, rho=0.5, best_of_n=6, flow_steps=2)
    key = jax.random.key(4)
    next_actions = np.asarray(sample_actions(agent, BATCH["next_observations"], key))
    loss = critic_loss(agent, key)[0]
    np.testing.assert_allclose(loss, expected_loss(agent, agent.params["critic"], next_actions, 0.9, 0.5)[0], rtol=1e-3)


def test_best_of_n_takes_the_argmax():
    """Of N distinct candidates a row gets the one with the largest ensemble mean of the ONLINE critic."""
    agent, key = make_agent(base, BATCH, best_of_n=8, flow_steps=2), jax.random.key(1)
    agent = agent.replace(targets=agent.targets | {"flow": jax.tree.map(lambda p: 0.3 * p, agent.targets["flow"])})
    observations = BATCH["observations"]
    repeated, candidates = (np.asarray(x) for x in agent.candidates(observations, key, 8))
    assert np.array_equal(repeated, np.tile(observations, (8, 1, 1)))
    assert len(np.unique(candidates.reshape(-1, 4), axis=0)) == 96
    scores = {name: critic(getattr(agent, name)["critic"], repeated, candidates) for name in ("params", "targets")}
    best = scores["params"].mean(0).argmax(0)
    assert len(np.unique(best)) > 2
    for other in (scores["targets"].mean(0), scores["params"].min(0), -scores["params"].mean(0)):
        assert not np.array_equal(best, other.argmax(0))  # the check can tell them apart
    expected = candidates[best, np.arange(12)]
    assert np.array_equal(agent.sample_actions(observations, key), expected)


@pytest.mark.check
def test_flow_actions_equal_numpy():
    """Euler steps of the averaged vector field written by hand, clipped to [−1, 1]."""
    agent = make_agent(base, BATCH, flow_steps=3)
    agent = agent.replace(targets=agent.targets | {"flow": jax.tree.map(lambda p: 0.5 * p, agent.targets["flow"])})
    observations, noise = BATCH["observations"], np.random.default_rng(0).normal(size=(12, 4))
    x = noise
    for k in range(3):
        x = x + velocity(agent.targets["flow"], observations, x, np.full((12, 1), k / 3)) / 3
    assert np.abs(x).max() > 1 and np.mean(np.abs(x) < 1) > 0.3
    actions = agent.flow_actions(observations, jnp.float32(noise))
    np.testing.assert_allclose(actions, np.clip(x, -1, 1), atol=1e-4)


@pytest.mark.parametrize("best_of_n", [1, 4])
def test_shapes_of_sampled_actions(best_of_n):
    """One observation or a batch of them give as many chunks in [−1, 1]; a vmapped row equals its own call."""
    agent = make_agent(base, BATCH, best_of_n=best_of_n, flow_steps=2)
    key, observations = jax.random.key(0), BATCH["observations"]
    single, many = sample_actions(agent, observations[0], key), sample_actions(agent, observations, key)
    assert single.shape == (4,)
    assert many.shape == (12, 4)
    assert np.abs(many).max() <= 1
    vmapped = jax.vmap(sample_actions, (None, 0, None))(agent, observations, key)
    np.testing.assert_allclose(vmapped[0], single, atol=1e-5)
    assert np.abs(sample_actions(agent, observations, jax.random.key(1)) - many).max() > 1e-3


class Plain(base.Agent):
    """The smallest agent that trains both networks."""

    def loss(self, params, batch, key):
        """TD loss plus a regression of the velocity at t = 0."""
        loss, _, info = self.critic_loss(params, batch, key)
        noise = jax.random.normal(key, batch["actions"].shape)
        velocity = self.apply("flow", batch["observations"], noise, batch["masks"][:, None], params=params["flow"])
        return loss + jnp.mean((velocity - batch["actions"]) ** 2), info


@pytest.mark.check
def test_update_takes_adam_and_polyak_steps():
    """Two updates equal Adam at rate lr and Polyak averaging at rate τ of the parameters after the step."""
    agent = make_agent(SimpleNamespace(Agent=Plain, get_config=base.get_config), BATCH, lr=0.01, tau=0.1, flow_tau=0.5)
    params, targets = as_float64(agent.params), as_float64(agent.targets)
    first, second = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    gradient_of = jax.jit(lambda a, k: jax.grad(lambda p: a.loss(p, BATCH, k)[0])(a.params))
    update = jax.jit(lambda a: a.update(BATCH))
    for step in (1, 2):
        gradient = as_float64(gradient_of(agent, jax.random.fold_in(agent.key, agent.step)))
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, gradient)
        change = jax.tree.map(
            lambda m, v, s=step: (m / (1 - 0.9**s)) / (np.sqrt(v / (1 - 0.999**s)) + 1e-8), first, second
        )
        params = jax.tree.map(lambda p, c: p - 0.01 * c, params, change)
        targets = {
            name: jax.tree.map(lambda t, p, r=rate: (1 - r) * t + r * p, targets[name], params[name])
            for name, rate in (("critic", 0.1), ("flow", 0.5))
        }
        key, agent = agent.key, update(agent)[0]
        assert agent.step == step
        assert np.array_equal(agent.key, key)
        for tree, expected in ((agent.params, params), (agent.targets, targets)):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-4), tree, expected)


def test_config_floats_are_leaves():
    """Floats are traced leaves; all else, and the action width, is static."""
    config = otql.get_config()
    config.update({"actor_hidden_dims": (8,), "value_hidden_dims": (8,), "num_qs": 3})
    agent = otql.Agent.create(jax.random.key(0), BATCH, config)
    assert set(agent.hyper) == {k for k, v in config.items() if isinstance(v, float)}
    assert {"lr", "discount", "tau", "rho", "lam", "w_max", "alpha", "epsilon", "threshold"} <= set(agent.hyper)
    assert set(agent.config) == {k for k, v in config.items() if not isinstance(v, float)} | {"action_dim", "algorithm"}
    assert agent.config.action_dim == 4
    assert len({id(leaf) for leaf in jax.tree.leaves(agent)} & {id(v) for v in agent.hyper.values()}) == len(
        agent.hyper
    )
    assert hash(jax.tree.structure(agent)) is not None
    assert agent.cfg.batch_size == 256
    np.testing.assert_allclose(agent.cfg.lam, config.lam)


def test_create():
    """Targets start as copies, conditions are standardised by the data, and both kinds of key give the same agent."""
    batch = BATCH | {"observations": BATCH["observations"].at[:, 1].set(3.0)}
    config = base.get_config()
    config.update({"actor_hidden_dims": (8,), "value_hidden_dims": (8,), "num_qs": 3})
    agents = [base.Agent.create(key, batch, config) for key in (jax.random.key(7), jax.random.PRNGKey(7))]
    jax.tree.map(np.testing.assert_array_equal, *agents)
    agent = agents[0]
    jax.tree.map(np.testing.assert_array_equal, agent.params["critic"], agent.targets["critic"])
    mean, deviation = agent.condition_stats
    np.testing.assert_allclose(mean, np.mean(batch["observations"], 0), atol=1e-6)
    expected = np.std(batch["observations"], 0)
    np.testing.assert_allclose(deviation, [expected[0], 1.0, expected[2]], rtol=1e-5)
    other = base.Agent.create(jax.random.key(8), batch, config)
    assert np.abs(other.apply("critic", *[batch[k] for k in ("observations", "actions")])
                  - agent.apply("critic", *[batch[k] for k in ("observations", "actions")])).max() > 0.01  # fmt: skip
    qs = np.asarray(agent.apply("critic", batch["observations"], batch["actions"]))
    assert qs.shape == (3, 12)
    assert np.abs(qs[0] - qs[1]).max() > 0.01  # members start apart


def test_list_of_agents():
    """Every file with presets is listed."""
    files = Path(base.__file__).parent.glob("*.py")
    assert sorted(AGENTS) == sorted(file.stem for file in files if "\nPRESETS" in file.read_text())


@pytest.mark.parametrize("name", AGENTS)
def test_presets_are_valid_settings(name):
    """Every preset names settings that the agent has, with values of the same type."""
    module = importlib.import_module(f"agents.{name}")
    for domain, settings in module.PRESETS.items():
        config = ml_collections.ConfigDict(module.get_config())
        known = set(config) | {"sparse"}
        assert set(settings) <= known, domain
        config.update({k: v for k, v in (settings | module.CPU).items() if k != "sparse"})
