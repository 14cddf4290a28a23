"""QC: its loss against NumPy, and what N does on a bandit whose answer is known."""

import bandit
import jax
import ml_collections
import numpy as np
import pytest
from loss_checks import check_loss_and_gradient, flow_error, flow_sample, td_loss
from numpy_networks import as_float64, critic, make_agent, make_batch

from agents import qc
from utils.run.agent_config import resolve_config

BATCH = make_batch()


@pytest.mark.check
def test_loss_and_gradient_equal_numpy():
    """TD on the target value of the best of N flow samples by the online critic, plus flow matching."""
    agent, batch = make_agent(qc, BATCH, discount=0.9, rho=0.5, best_of_n=5, flow_steps=3), as_float64(BATCH)
    agent = agent.replace(targets=agent.targets | {"flow": jax.tree.map(lambda p: 0.4 * p, agent.targets["flow"])})
    observations, next_observations, actions = (batch[k] for k in ("observations", "next_observations", "actions"))
    weights = batch["valid"][:, None] * batch["action_mask"]

    def best_of_n(noise):
        repeated = np.tile(next_observations, (5, 1, 1))
        candidates = flow_sample(agent.targets["flow"], repeated, noise, 3)
        best = critic(agent.params["critic"], repeated, candidates).mean(0).argmax(0)
        return candidates[best, np.arange(12)], best

    def expected(params, draws):
        candidate_noise, noise, t = draws
        next_qs = critic(agent.targets["critic"], next_observations, best_of_n(candidate_noise)[0])
        loss = td_loss(critic(params["critic"], observations, actions), next_qs, batch, agent)
        return loss + np.mean(weights * flow_error(params["flow"], observations, actions, noise, t) ** 2)

    info, draws = check_loss_and_gradient(agent, BATCH, expected)
    assert draws[0].shape == (5, 12, 4)
    assert len(np.unique(best_of_n(draws[0])[1])) > 2
    error = flow_error(agent.params["flow"], observations, actions, *draws[1:])
    np.testing.assert_allclose(info["flow/loss"], np.mean(weights * error**2), rtol=1e-4)


@pytest.mark.parametrize("domain", ["cube-triple", "ArrangeBoxes", "OpenMicrowave", "antmaze-large"])
def test_settings(domain):
    """N 32 and NFE 10 in every domain (Table 6)."""
    config = resolve_config(qc, domain, "paper", {})[0]
    assert (config.best_of_n, config.flow_steps) == (32, 10)


def test_best_of_n_on_the_bandit():
    """The best mode is taken wherever one of N samples falls on it, 1 − (1 − p)^N; the flow itself stays the data's."""
    # One step without a bootstrap: N has no part in training.
    (agent,) = bandit.train(qc, bandit.make_data(), 2000, best_of_n=[1], flow_steps=[10])
    contexts, shares = bandit.fresh_contexts(), {}
    for n in (1, 4, 32):
        config = ml_collections.FrozenConfigDict(dict(agent.config) | {"best_of_n": n})
        actions = bandit.act(agent.replace(config=config), contexts)
        shares[n] = bandit.mode_shares(contexts, actions)
    print("shares:", {n: share.round(3) for n, share in shares.items()})
    np.testing.assert_allclose(shares[1], bandit.SHARES, atol=0.08)
    np.testing.assert_allclose(shares[4][3], 1 - (1 - shares[1][3]) ** 4, atol=0.08)
    assert shares[32][3] >= 0.95
