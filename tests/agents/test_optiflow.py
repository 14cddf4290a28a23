"""OptiFlow: its loss against NumPy, and what it learns on a bandit whose answer is known."""

import bandit
import jax
import numpy as np
import pytest
from loss_checks import check_loss_and_gradient, flow_error, flow_sample, one_step, td_loss
from numpy_networks import as_float64, critic, make_agent, make_batch
from scipy.special import logsumexp

from agents import optiflow
from utils.run.agent_config import resolve_config

BATCH = make_batch()
SMALL = {"policy_samples": 3, "flow_samples": 5, "flow_steps": 2, "max_iterations": 30}


def sinkhorn(x, y, target, epsilon, iterations):
    """Entropic plan between x, uniform, and y at marginal `target`; ε relative to the mean cost; log domain."""
    cost = np.sum((x[:, None] - y[None]) ** 2, axis=-1)
    scaled, f = cost / (epsilon * cost.mean()), np.zeros(len(x))
    for _ in range(iterations):
        g = np.log(target) - logsumexp(f[:, None] - scaled, axis=0)
        f = -np.log(len(x)) - logsumexp(g[None] - scaled, axis=1)
    return np.exp(f[:, None] + g[None] - scaled)


@pytest.mark.check
@pytest.mark.parametrize("eta", [0.5, 0.0])
def test_loss_and_gradient_equal_numpy(eta):
    """TD + guided flow matching + Σ_i Γ_ij* ‖x_i − y_j*‖², of which the policy's actions alone have a gradient."""
    agent = make_agent(optiflow, BATCH, eta=eta, tau_w=0.7, epsilon=0.2, discount=0.9, rho=0.5, **SMALL)
    batch = as_float64(BATCH)
    observations, actions, valid = batch["observations"], batch["actions"], batch["valid"]
    agent = agent.replace(params=agent.params | {"one_step": jax.tree.map(lambda p: 0.8 * p, agent.params["one_step"])})

    def guidance(draws):
        policy = np.clip(one_step(agent.params["one_step"], observations, draws[1][0]), -1, 1)
        q, reference = (critic(agent.params["critic"], observations, a).mean(0) for a in (actions, policy))
        scale = valid.sum() / np.sum(valid * np.abs(q))
        return 1 / (1 + np.exp(-scale / eta * (q - reference))) if eta else np.ones(len(q))

    def plans(draws):
        repeated = np.tile(observations, (5, 1, 1))
        x = one_step(agent.params["one_step"], np.tile(observations, (3, 1, 1)), draws[1])
        y = flow_sample(agent.targets["flow"], repeated, draws[4], 2)
        weights = np.exp(critic(agent.params["critic"], repeated, y).mean(0) / 0.7)
        weights /= weights.sum(axis=0)
        return y, [sinkhorn(x[:, s], y[:, s], weights[:, s], 0.2, 30) for s in range(12)]

    def expected(params, draws):
        next_noise, noise, flow_noise, t, _ = draws
        following = batch["next_observations"]
        next_actions = np.clip(one_step(agent.params["one_step"], following, next_noise[0]), -1, 1)
        next_qs = critic(agent.targets["critic"], following, next_actions)
        loss = td_loss(critic(params["critic"], observations, actions), next_qs, batch, agent)
        error = flow_error(params["flow"], observations, actions, flow_noise, t)
        loss += np.mean((guidance(draws) * valid)[:, None] * batch["action_mask"] * error**2)
        x, (y, plan) = one_step(params["one_step"], np.tile(observations, (3, 1, 1)), noise), plans(draws)
        for s in range(12):
            for i in range(3):
                j = plan[s][i].argmax()
                loss += valid[s] * plan[s][i, j] * np.sum((x[i, s] - y[j, s]) ** 2) / 12
        return loss

    info, draws = check_loss_and_gradient(agent, BATCH, expected)
    np.testing.assert_allclose(info["guidance/mean"], guidance(draws).mean(), rtol=1e-3)
    plan = plans(draws)[1]
    assert np.mean([len(np.unique(p.argmax(axis=1))) for p in plan]) > 1  # Anchors differ.
    np.testing.assert_allclose(np.array(plan).sum(axis=2), 1 / 3, rtol=1e-6)


def test_settings():
    """τ_w, η and the TD target of the paper's table."""
    for domain, (tau_w, eta, target) in {
        "antmaze-large": (2.0, 1e-2, "policy"),
        "humanoidmaze-medium": (1.0, 1e-3, "both"),
        "cube-triple": (1.0, 1e-5, "both"),
        "puzzle-3x3": (1.0, 1e-3, "policy"),
    }.items():
        config = resolve_config(optiflow, domain, "paper", {})[0]
        assert (config.tau_w, config.eta, config.target_actions) == (tau_w, eta, target)
        assert (config.policy_samples, config.flow_samples, config.epsilon, config.max_iterations) == (16, 64, 0.05, 30)


@pytest.fixture(scope="module")
def shares():
    """Shares of the modes under the policy, with weights by value and without."""
    settings = {"tau_w": [0.15, 1e6], "eta": [0.0] * 2, "rho": [0.0] * 2, "flow_steps": [4] * 2}
    settings |= {"policy_samples": [8] * 2, "flow_samples": [16] * 2}
    contexts = bandit.fresh_contexts()
    return [
        bandit.mode_shares(contexts, bandit.act(agent, contexts))
        for agent in bandit.train(optiflow, bandit.make_data(), 1200, **settings)
    ]


def test_the_policy_moves_to_the_better_samples(shares):
    """At τ_w = 0.15 the best mode, 15 % of the data, prevails; with equal weights the policy imitates."""
    weighted, equal = shares
    print(weighted.round(3), equal.round(3))
    assert weighted[3] > 0.6 and weighted[0] < 0.1
    assert equal[3] < 0.35 and equal[0] > 0.2
