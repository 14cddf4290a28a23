"""GFP: its loss against NumPy, and what the guidance does on a bandit whose answer is known."""

import bandit
import jax
import numpy as np
import pytest
from loss_checks import check_loss_and_gradient, flow_error, flow_sample, one_step
from numpy_networks import as_float64, critic, make_agent, make_batch

from agents import gfp
from utils.run.agent_config import resolve_config

BATCH = make_batch()


def pessimistic(qs, rho=0.5):
    """Mean − ρ · population deviation over the ensemble."""
    return qs.mean(0) - rho * qs.std(0)


@pytest.mark.check
@pytest.mark.parametrize(
    ("settings", "eta"),
    [
        ({"target_actions": "policy", "reference": "policy"}, 0.5),
        ({"target_actions": "both", "reference": "min"}, 0.2),
        ({"target_actions": "policy", "reference": "policy"}, 0.0),
    ],
)
def test_loss_and_gradient_equal_numpy(settings, eta):
    """TD + g-weighted flow loss + α · distillation − λ Q^ρ; g and λ have no gradient; invalid rows do not count."""
    agent = make_agent(gfp, BATCH, alpha=2.0, eta=eta, discount=0.9, rho=0.5, flow_steps=3, **settings)
    batch = as_float64(BATCH)
    observations, actions, valid = batch["observations"], batch["actions"], batch["valid"]
    agent = agent.replace(params=agent.params | {"one_step": jax.tree.map(lambda p: 0.8 * p, agent.params["one_step"])})
    both = settings["target_actions"] == "both"

    def parts(draws):
        samples = flow_sample(agent.targets["flow"], observations, draws[-3], 3)
        policy = np.clip(one_step(agent.params["one_step"], observations, draws[-3]), -1, 1)
        q = pessimistic(critic(agent.params["critic"], observations, policy))
        scale = valid.sum() / np.sum(valid * np.abs(q))
        of = [pessimistic(critic(agent.targets["critic"], observations, a)) for a in (actions, policy, samples)]
        reference = np.minimum(of[1], of[2]) if settings["reference"] == "min" else of[1]
        guidance = 1 / (1 + np.exp(-scale / eta * (of[0] - reference))) if eta else np.ones(len(q))
        return samples, scale, guidance

    def expected(params, draws):
        *next_draws, noise, flow_noise, t = draws
        following = batch["next_observations"]
        next_policy = np.clip(one_step(agent.params["one_step"], following, next_draws[-1][0]), -1, 1)
        value = pessimistic(critic(agent.targets["critic"], following, next_policy))
        if both:
            sampled = flow_sample(agent.targets["flow"], following, next_draws[0], 3)
            value = (value + pessimistic(critic(agent.targets["critic"], following, sampled))) / 2
        target = batch["rewards"] + 0.9**2 * batch["masks"] * value
        loss = np.mean(valid * (critic(params["critic"], observations, actions) - target) ** 2)
        samples, scale, guidance = parts(draws)
        error = flow_error(params["flow"], observations, actions, flow_noise, t)
        loss += np.mean((guidance * valid)[:, None] * batch["action_mask"] * error**2)
        proposals = one_step(params["one_step"], observations, noise)
        loss += 2.0 * np.sum(valid[:, None] * (proposals - samples) ** 2) / samples.size
        q = pessimistic(critic(agent.params["critic"], observations, np.clip(proposals, -1, 1)))
        return loss - scale * np.mean(valid * q)

    info, draws = check_loss_and_gradient(agent, BATCH, expected)
    _, _, guidance = parts(draws)
    np.testing.assert_allclose(info["guidance/mean"], guidance.mean(), rtol=1e-3)
    if eta:
        assert 0.05 < guidance.min() < 0.5 < guidance.max() < 0.95


def test_acting_costs_one_evaluation():
    """GFP acts with FQL's one-step policy."""
    agent = make_agent(gfp, BATCH)
    assert agent.nfe == 1
    noise = jax.random.normal(jax.random.key(1), (12, 4))
    expected = np.clip(one_step(agent.params["one_step"], BATCH["observations"], noise), -1, 1)
    np.testing.assert_allclose(agent.propose(BATCH["observations"], jax.random.key(1)), expected, atol=1e-4)


def test_settings():
    """Those of the authors' table, where the discount stays this project's."""
    for domain, (alpha, eta, target, reference) in {
        "antmaze-giant": (0.1, 0.1, "policy", "min"),
        "humanoidmaze-medium": (0.3, 1e-3, "both", "min"),
        "cube-double": (1.0, 1e-2, "both", "policy"),
        "cube-single": (1.0, 1e-2, "both", "policy"),
        "scene": (10.0, 1e-3, "policy", "policy"),
    }.items():
        config = resolve_config(gfp, domain, "paper", {})[0]
        assert (config.alpha, config.eta, config.target_actions, config.reference) == (alpha, eta, target, reference)
    assert resolve_config(gfp, "humanoidmaze-large", "paper", {})[0].discount == 0.995


# ---- the bandit


@pytest.fixture(scope="module")
def shares():
    """Shares of the modes under the flow and the one-step policy, without guidance and with."""
    settings = {"eta": [0.0, 0.3], "alpha": [3.0] * 2, "rho": [0.0] * 2, "flow_steps": [5] * 2}
    agents, contexts = bandit.train(gfp, bandit.make_data(), 2000, **settings), bandit.fresh_contexts()
    noise = jax.random.normal(jax.random.key(9), contexts.shape)
    flows = [bandit.mode_shares(contexts, np.asarray(bandit.flow_samples(a, contexts, noise, 50))) for a in agents]
    return flows, [bandit.mode_shares(contexts, bandit.act(a, contexts)) for a in agents]


def test_guidance_turns_the_flow_to_better_modes(shares):
    """Without guidance the flow has the data's shares; with it the worst mode, of 35 %, becomes rare."""
    (plain, guided), (_, acted) = shares
    print(plain.round(3), guided.round(3), acted.round(3))
    np.testing.assert_allclose(plain, bandit.SHARES, atol=0.08)
    assert guided[0] < 0.6 * plain[0] and guided[3] > 1.3 * plain[3]
    assert acted[3] > 0.6
