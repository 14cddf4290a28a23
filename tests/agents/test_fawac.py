"""FAWAC: its loss against NumPy, and V and the tilt that it learns on a bandit whose answer is known."""

import bandit
import jax
import numpy as np
import pytest
from loss_checks import check_loss_and_gradient, flow_error, flow_sample, loss_and_gradient, state_value, td_loss
from numpy_networks import as_float64, critic, make_agent, make_batch

from agents import fawac

BATCH = make_batch()


@pytest.mark.check
@pytest.mark.parametrize("inv_temp", [0.8, 6.4])
def test_loss_and_gradient_equal_numpy(inv_temp):
    """TD + (V − mean of target Q)² + flow matching weighted by min(exp(τ_inv (Q − V)), 100), a fixed weight."""
    agent, batch = (
        make_agent(fawac, BATCH, 4, inv_temp=inv_temp, discount=0.9, rho=0.5, flow_steps=3),
        as_float64(BATCH),
    )
    observations, actions, valid = batch["observations"], batch["actions"], batch["valid"]
    advantages = critic(agent.params["critic"], observations, actions).mean(0)
    advantages = advantages - state_value(agent.params["value"], observations)
    weights = np.minimum(np.exp(inv_temp * advantages), 100.0)

    def expected(params, draws):
        next_noise, noise, t = draws
        next_actions = flow_sample(agent.targets["flow"], batch["next_observations"], next_noise[0], 3)
        next_qs = critic(agent.targets["critic"], batch["next_observations"], next_actions)
        loss = td_loss(critic(params["critic"], observations, actions), next_qs, batch, agent)
        target_q = critic(agent.targets["critic"], observations, actions).mean(0)
        loss += np.sum(valid * (state_value(params["value"], observations) - target_q) ** 2) / 12
        error = flow_error(params["flow"], observations, actions, noise, t)
        return loss + np.sum((weights * valid)[:, None] * batch["action_mask"] * error**2) / error.size

    info, _ = check_loss_and_gradient(agent, BATCH, expected)
    np.testing.assert_allclose(info["advantage/mean"], advantages.mean(), rtol=1e-3)
    if inv_temp > 1:
        assert 0 < np.sum((weights == 100) * valid) < valid.sum()  # some weights are clamped and others not


def test_large_temperatures_do_not_overflow():
    """τ_inv A of ±10⁶ leaves a finite loss and gradient: the clamp holds. No valid row trains nothing."""
    agent, key = make_agent(fawac, BATCH, 4, inv_temp=1e6, flow_steps=3), jax.random.key(3)
    loss, info, gradient, _ = loss_and_gradient(agent, BATCH, key)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((loss, info, gradient)))
    assert info["flow/loss"] > 0
    loss, _, gradient, _ = loss_and_gradient(agent, BATCH | {"valid": 0 * BATCH["valid"]}, key)
    assert loss == 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


# ---- the bandit


@pytest.fixture(scope="module")
def learned():
    """FAWAC at τ_inv = 0 and τ_inv = 5, and contexts to test them on."""
    agents = bandit.train(fawac, bandit.make_data(), 2000, inv_temp=[0.0, 5.0], flow_steps=[2] * 2)
    return agents, bandit.fresh_contexts()


def test_value_is_that_of_the_data(learned):
    """V is the mean value of the data's actions, not of the policy's: the same 0.36 at both temperatures."""
    agents, contexts = learned
    values = np.stack([bandit.evaluate(agent, "value", contexts) for agent in agents])
    print("V:", values.mean(1).round(3), "±", values.std(1).round(3))
    np.testing.assert_allclose(values.mean(1), bandit.SHARES @ bandit.VALUES, atol=0.1)
    assert values.std(1).max() < 0.12


def test_tilt_is_the_exponential_one(learned):
    """The modes' shares are the data's times exp(τ_inv value), normalised: the best mode goes from 15 % to 80 %."""
    agents, contexts = learned
    noise = jax.random.normal(jax.random.key(9), contexts.shape)
    for inv_temp, agent in zip((0.0, 5.0), agents, strict=True):
        actions = np.asarray(bandit.flow_samples(agent, contexts, noise, 100))
        share, expected = bandit.mode_shares(contexts, actions), bandit.SHARES * np.exp(inv_temp * bandit.VALUES)
        print("τ_inv", inv_temp, "shares", share.round(3), "expected", (expected / expected.sum()).round(3))
        np.testing.assert_allclose(share, expected / expected.sum(), atol=0.1)
