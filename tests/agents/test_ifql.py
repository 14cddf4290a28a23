"""IFQL: its loss against NumPy, V against known expectiles, and what its best-of-N takes on a bandit."""

import bandit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import check_loss_and_gradient, flow_error, state_value
from numpy_networks import as_float64, critic, make_agent, make_batch
from scipy.stats import expectile

from agents import ifql
from utils.run.agent_config import resolve_config

BATCH = make_batch()


@pytest.mark.check
@pytest.mark.parametrize("kappa", [0.9, 0.2])
def test_loss_and_gradient_equal_numpy(kappa):
    """TD on R + γ^H mask V(s') without pessimism, expectile loss of V on pessimistic target Q, and flow matching."""
    rho = 2.0
    agent, batch = make_agent(ifql, BATCH, kappa=kappa, rho=rho, discount=0.9), as_float64(BATCH)
    observations, actions, valid = batch["observations"], batch["actions"], batch["valid"]
    target = batch["rewards"] + 0.9**2 * batch["masks"] * state_value(agent.params["value"], batch["next_observations"])
    target_qs = critic(agent.targets["critic"], observations, actions)
    pessimistic_q = target_qs.mean(0) - rho * target_qs.std(0)

    def expected(params, draws):
        loss = np.sum(valid * (critic(params["critic"], observations, actions) - target) ** 2) / 36
        gap = pessimistic_q - state_value(params["value"], observations)
        loss += np.sum(valid * np.abs(kappa - (gap < 0)) * gap**2) / 12
        error = flow_error(params["flow"], observations, actions, *draws)
        return loss + np.sum(valid[:, None] * batch["action_mask"] * error**2) / 48

    info, draws = check_loss_and_gradient(agent, BATCH, expected)
    assert len(draws) == 2  # noise and time of the flow: training samples no action
    gap = pessimistic_q - state_value(agent.params["value"], observations)
    assert 0 < np.sum((gap < 0) * valid) < valid.sum()
    np.testing.assert_allclose(info["value/loss"], np.mean(valid * np.abs(kappa - (gap < 0)) * gap**2), rtol=1e-4)


@pytest.mark.parametrize("kappa", [0.1, 0.5, 0.9, 0.95])
def test_the_minimiser_is_the_expectile(kappa):
    """A V that is one number has zero gradient at the κ-expectile of the valid rows' Q and is pulled there."""
    agent = make_agent(ifql, BATCH, kappa=kappa, rho=0.7)
    ((name, network),) = agent.params["value"].items()
    last = max(layer for layer in network if layer.startswith("Dense"))

    @jax.jit
    def slope(constant):
        def loss(v):
            value = network | {last: {"kernel": 0 * network[last]["kernel"], "bias": v[None]}}
            return agent.value_loss(agent.params | {"value": {name: value}}, BATCH)[0]

        return jax.grad(loss)(constant)

    qs = critic(agent.targets["critic"], np.asarray(BATCH["observations"]), np.asarray(BATCH["actions"]))
    qs = (qs.mean(0) - 0.7 * qs.std(0))[np.asarray(BATCH["valid"]) > 0]
    answer = expectile(qs, kappa)
    assert qs.std() > 0.1
    scale = abs(float(slope(answer - qs.std())))
    assert abs(slope(answer)) < 1e-4 * scale
    assert slope(answer - 0.1 * qs.std()) < 0 < slope(answer + 0.1 * qs.std())


def test_acting_ranks_by_the_ensemble_minimum():
    """Of the candidates the one with the largest min_k Q_k of the ONLINE critics, 32 by default."""
    assert ifql.get_config().best_of_n == 32
    agent, key = make_agent(ifql, BATCH, best_of_n=8, flow_steps=2), jax.random.key(1)
    agent = agent.replace(targets=agent.targets | {"flow": jax.tree.map(lambda p: 0.3 * p, agent.targets["flow"])})
    observations, candidates = (np.asarray(x) for x in agent.candidates(BATCH["observations"], key, 8))
    qs = critic(agent.params["critic"], observations, candidates)
    best = qs.min(0).argmax(0)
    for other in (qs.mean(0), qs.max(0), critic(agent.targets["critic"], observations, candidates).min(0)):
        assert not np.array_equal(best, other.argmax(0))  # the check can tell them apart
    np.testing.assert_array_equal(agent.sample_actions(BATCH["observations"], key), candidates[best, np.arange(12)])


def test_settings():
    """κ of each domain as in QAM's experiments; a domain without an entry takes its nearest."""
    kappas = {"antmaze-large": 0.9, "antmaze-giant": 0.8, "humanoidmaze-medium": 0.7, "humanoidmaze-large": 0.8}
    kappas |= {"cube-double": 0.9, "cube-triple": 0.95, "cube-quadruple": 0.95, "scene": 0.9, "puzzle-3x3": 0.95}
    for domain, kappa in (kappas | {"puzzle-4x4": 0.9, "puzzle-4x6": 0.9, "cube-single": 0.9}).items():
        config = resolve_config(ifql, domain, "paper", {})[0]
        assert (config.kappa, config.best_of_n, config.flow_steps) == (kappa, 32, 10)


# ---- the bandit


@pytest.fixture(scope="module")
def learned():
    """IFQL at κ = 0.5 and κ = 0.9, and contexts to test them on."""
    agents = bandit.train(ifql, bandit.make_data(), 2000, kappa=[0.5, 0.9], lr=[1e-3] * 2, flow_steps=[10] * 2)
    return agents, bandit.fresh_contexts()


def test_value_is_the_expectile_of_the_data(learned):
    """V is the κ-expectile of the modes' values at the data's shares: their mean 0.36, and 0.70."""
    agents, contexts = learned
    expected = [expectile(bandit.VALUES, kappa, weights=bandit.SHARES) for kappa in (0.5, 0.9)]
    values = np.stack([bandit.evaluate(agent, "value", contexts) for agent in agents])
    print("V:", values.mean(1).round(3), "±", values.std(1).round(3), "expected", np.round(expected, 3))
    np.testing.assert_allclose(values.mean(1), expected, atol=0.1)


def test_acting_takes_the_best_of_the_data(learned):
    """One of 32 samples lies on the best mode wherever the flow, which stays at the data's shares, gives it 15 %."""
    agents, contexts = learned
    shares = bandit.mode_shares(contexts, bandit.act(agents[1], contexts))
    cloned = bandit.mode_shares(contexts, jax.jit(agents[1].propose)(contexts, jax.random.key(3)))
    print("IFQL:", shares.round(3), "its flow:", cloned.round(3))
    assert shares[3] >= 0.95
    np.testing.assert_allclose(cloned, bandit.SHARES, atol=0.08)


def test_nothing_is_learned_from_no_sample():
    """A batch of invalid windows has zero loss and zero gradient."""
    agent = make_agent(ifql, BATCH)
    value_and_gradient = jax.jit(jax.value_and_grad(agent.loss, has_aux=True))
    (loss, _), gradient = value_and_gradient(agent.params, BATCH | {"valid": jnp.zeros(12)}, jax.random.key(3))
    assert loss == 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))
