"""EWFM: its loss against NumPy, and the tilt that it learns on a bandit whose answer is known."""

import bandit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import check_loss_and_gradient, flow_error, flow_sample, loss_and_gradient, td_loss
from numpy_networks import as_float64, critic, make_agent, make_batch

from agents import ewfm, otql
from utils.run.agent_config import resolve_config

BATCH = make_batch()
# What is static is the same in all tests: one compiled program.
SETTINGS = {"value_samples": 4, "flow_steps": 3}


@pytest.mark.check
@pytest.mark.parametrize(("lam", "w_max"), [(0.7, 1.5), (2.0, 3.0)])
def test_loss_and_gradient_equal_numpy(lam, w_max):
    """TD plus flow matching weighted by min(exp(λ (Q − V̂)), w_max) over its mean on valid rows, a fixed weight."""
    agent = make_agent(ewfm, BATCH, 5, lam=lam, w_max=w_max, discount=0.9, rho=0.5, **SETTINGS)
    batch = as_float64(BATCH)
    observations, actions, valid = batch["observations"], batch["actions"], batch["valid"]

    def unscaled_weights(value_noise):
        repeated = np.tile(observations, (4, 1, 1))
        samples = flow_sample(agent.targets["flow"], repeated, value_noise, 3)
        baseline = critic(agent.params["critic"], repeated, samples).mean((0, 1))
        advantages = critic(agent.params["critic"], observations, actions).mean(0) - baseline
        return np.exp(lam * advantages), advantages

    def expected(params, draws):
        next_noise, value_noise, noise, t = draws
        next_actions = flow_sample(agent.targets["flow"], batch["next_observations"], next_noise[0], 3)
        next_qs = critic(agent.targets["critic"], batch["next_observations"], next_actions)
        loss = td_loss(critic(params["critic"], observations, actions), next_qs, batch, agent)
        weights = np.minimum(unscaled_weights(value_noise)[0], w_max) * valid
        weights *= valid.sum() / weights.sum()
        error = flow_error(params["flow"], observations, actions, noise, t)
        return loss + np.sum(weights[:, None] * batch["action_mask"] * error**2) / error.size

    info, draws = check_loss_and_gradient(agent, BATCH, expected)
    weights, advantages = unscaled_weights(draws[1])
    assert 0 < np.sum((weights > w_max) * valid) < valid.sum()  # some weights are clamped and others not
    weights = np.minimum(weights, w_max) * valid
    np.testing.assert_allclose(info["advantage/mean"], advantages.mean(), rtol=1e-3)
    effective = weights.sum() ** 2 / (12 * np.sum(weights**2))
    np.testing.assert_allclose(info["weights/effective_sample_size"], effective, rtol=1e-3)


def test_no_tilt_is_behaviour_cloning():
    """At λ = 0, and where the clamp is below every weight, the flow loss is BC's: mean of valid · mask · error²."""
    weights = np.asarray(BATCH["valid"])[:, None] * np.asarray(BATCH["action_mask"])
    for tilt in ({"lam": 0.0}, {"lam": 0.1, "w_max": 1e-6}):
        agent = make_agent(ewfm, BATCH, **tilt, **SETTINGS)
        _, info, _, (_, _, noise, t) = loss_and_gradient(agent, BATCH, jax.random.key(3))
        error = flow_error(agent.params["flow"], *(BATCH[k] for k in ("observations", "actions")), noise, t)
        np.testing.assert_allclose(info["flow/loss"], np.mean(weights * error**2), rtol=1e-4)


def test_large_tilts_do_not_overflow():
    """λ A of ±10⁶ leaves a finite loss and gradient, and so does a batch without a valid row, which trains nothing."""
    agent, key = make_agent(ewfm, BATCH, lam=1e6, w_max=20.0, **SETTINGS), jax.random.key(3)
    loss, info, gradient, _ = loss_and_gradient(agent, BATCH, key)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((loss, info, gradient)))
    assert info["flow/loss"] > 0
    loss, info, gradient, _ = loss_and_gradient(agent, BATCH | {"valid": jnp.zeros(12)}, key)
    assert loss == 0
    assert np.isfinite(info["weights/effective_sample_size"])
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_settings():
    """Table 6 for the online tasks; λ and w_max of OTQL's Table 4 offline; NFE 10 and N 1 everywhere."""
    for domain, tilt in {
        "ArrangeBoxes": (1.0, 20.0),
        "OpenMicrowave": (1.0, 20.0),
        "antmaze-giant": (2.0, 3.0),
    }.items():
        config = resolve_config(ewfm, domain, "paper", {})[0]
        assert (config.lam, config.w_max, config.best_of_n, config.flow_steps) == (*tilt, 1, 10), domain
    assert ewfm.PRESETS.keys() == otql.PRESETS.keys()


# ---- the bandit


@pytest.fixture(scope="module")
def learned():
    """EWFM at λ = 0 and λ = 5, and 100-step samples of each at fresh contexts."""
    settings = {"lam": [0.0, 5.0], "w_max": [1000.0] * 2, "flow_steps": [5] * 2}
    agents = bandit.train(ewfm, bandit.make_data(), 2000, **settings)
    contexts = bandit.fresh_contexts()
    noise = jax.random.normal(jax.random.key(9), contexts.shape)
    samples = [np.asarray(bandit.flow_samples(agent, contexts, noise, 100)) for agent in agents]
    return [bandit.mode_shares(contexts, actions) for actions in samples], agents, contexts


def test_tilt_is_the_exponential_one(learned):
    """The modes' shares are the data's times exp(λ value), normalised: the best mode goes from 15 % to 80 %."""
    shares, agents, contexts = learned
    for lam, share in zip((0.0, 5.0), shares, strict=True):
        expected = bandit.SHARES * np.exp(lam * bandit.VALUES)
        print("λ", lam, "shares", share.round(3), "expected", (expected / expected.sum()).round(3))
        np.testing.assert_allclose(share, expected / expected.sum(), atol=0.1)
    acted = bandit.mode_shares(contexts, bandit.act(agents[1], contexts))
    print("5 steps:", acted.round(3))
    assert acted[3] >= 0.65
