"""FQL: its loss against NumPy, and what α does on a bandit whose answer is known."""

import bandit
import jax
import numpy as np
import pytest
from loss_checks import check_loss_and_gradient, flow_error, flow_sample, one_step, td_loss
from numpy_networks import as_float64, critic, make_agent, make_batch

from agents import fql

BATCH = make_batch()


@pytest.mark.check
@pytest.mark.parametrize("alpha", [0.5, 20.0])
def test_loss_and_gradient_equal_numpy(alpha):
    """TD + flow matching + α · mean (μ − Euler v̄)² − q(clip μ): only the one-step policy learns from the last two."""
    agent, batch = make_agent(fql, BATCH, alpha=alpha, discount=0.9, rho=0.5, flow_steps=3), as_float64(BATCH)
    observations, actions, valid = batch["observations"], batch["actions"], batch["valid"]
    # Of the one-step actions, some have to be clipped and others not.
    agent = agent.replace(params=agent.params | {"one_step": jax.tree.map(lambda p: 0.8 * p, agent.params["one_step"])})

    def expected(params, draws):
        next_noise, flow_noise, t, noise = draws
        next_actions = np.clip(one_step(agent.params["one_step"], batch["next_observations"], next_noise[0]), -1, 1)
        next_qs = critic(agent.targets["critic"], batch["next_observations"], next_actions)
        loss = td_loss(critic(params["critic"], observations, actions), next_qs, batch, agent)
        error = flow_error(params["flow"], observations, actions, flow_noise, t)
        loss += np.mean(valid[:, None] * batch["action_mask"] * error**2)
        proposals = one_step(params["one_step"], observations, noise)
        distance = proposals - flow_sample(agent.targets["flow"], observations, noise, 3)
        loss += alpha * np.sum(valid[:, None] * distance**2) / distance.size
        q = critic(agent.params["critic"], observations, np.clip(proposals, -1, 1)).mean(0)
        return loss - np.sum(valid * q) / len(q)

    info, (_, flow_noise, _, noise) = check_loss_and_gradient(agent, BATCH, expected)
    assert np.abs(flow_noise - noise).min() > 0  # drawn apart
    proposals = one_step(agent.params["one_step"], observations, noise)
    assert 0.1 < np.mean(np.abs(proposals) > 1) < 0.9
    q = critic(agent.params["critic"], observations, np.clip(proposals, -1, 1)).mean()
    np.testing.assert_allclose(info["one_step/q"], q, rtol=1e-4)


def test_acting_costs_one_evaluation():
    """The action is clip μ(s, z): it does not depend on the flow."""
    agent, key = make_agent(fql, BATCH), jax.random.key(1)
    assert agent.nfe == 1
    actions = agent.sample_actions(BATCH["observations"], key)
    other = agent.replace(
        params=agent.params | {"flow": jax.tree.map(lambda p: 0 * p, agent.params["flow"])},
        targets=agent.targets | {"flow": jax.tree.map(lambda p: 0 * p, agent.targets["flow"])},
    )
    assert np.array_equal(actions, other.sample_actions(BATCH["observations"], key))
    noise = jax.random.normal(key, (1, 12, 4))[0]
    expected = np.clip(one_step(agent.params["one_step"], BATCH["observations"], noise), -1, 1)
    np.testing.assert_allclose(actions, expected, atol=1e-4)


@pytest.mark.check
def test_distill_is_an_update_on_the_distillation_loss():
    """One step of Adam, with the key of an update: the one-step policy moves, nothing else but the Polyak copies."""
    agent = make_agent(fql, BATCH, lr=0.01, tau=0.1, flow_tau=0.5).replace(step=np.int32(3))
    key = jax.random.fold_in(agent.key, 3)
    gradient = jax.jit(jax.grad(lambda params: agent.distill_loss(params, BATCH, key)[0]))(agent.params)
    distilled, info = jax.jit(lambda agent: agent.distill(BATCH))(agent)
    # The first direction of Adam, whose averages start at step 0.
    expected = jax.tree.map(lambda p, g: p - 0.01 * g / (np.abs(g) + 1e-8), agent.params, gradient)
    for name, params in distilled.params.items():
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, agent.params[name])
        assert (max(jax.tree.leaves(moved)) > 0.005) == (name == "one_step")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, expected[name])
    assert set(info) == {"one_step/distill_loss"} and distilled.step == 4
    flows = (distilled.targets["flow"], agent.targets["flow"], agent.params["flow"])
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a, 0.5 * b + 0.5 * c, atol=1e-6), *flows)


# ---- the bandit


@pytest.fixture(scope="module")
def learned():
    """FQL with a weak and a strong distillation, and contexts to test them on."""
    alphas = {"greedy": 0.3, "clone": 300.0}
    agents = bandit.train(fql, bandit.make_data(), 2000, alpha=list(alphas.values()), flow_steps=[5, 5])
    return dict(zip(alphas, agents, strict=True)), bandit.fresh_contexts()


def test_weak_distillation_maximises_the_value(learned):
    """With α = 0.3 leaving any mode for the best one pays, and the one-step policy takes it."""
    agents, contexts = learned
    actions = bandit.act(agents["greedy"], contexts)
    shares = bandit.mode_shares(contexts, actions, radius=0.4)
    print("α = 0.3:", shares.round(3))
    assert shares[3] >= 0.9


def test_strong_distillation_imitates_the_flow(learned):
    """With α = 300 the one-step policy maps noise to where 5 steps of the flow do, which is the data."""
    agents, contexts = learned
    agent, key = agents["clone"], jax.random.key(3)
    shares = bandit.mode_shares(contexts, bandit.act(agent, contexts))
    noise = jax.random.normal(key, (1, *contexts.shape))[0]
    flow = np.asarray(bandit.flow_samples(agent, contexts, noise, 5))
    gap = np.linalg.norm(bandit.evaluate(agent, "one_step", contexts, noise) - flow, axis=1).mean()
    print("α = 300:", shares.round(3), "gap:", gap.round(3))
    np.testing.assert_allclose(shares, bandit.SHARES, atol=0.08)
    assert gap < 0.25
