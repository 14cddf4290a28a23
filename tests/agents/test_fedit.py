"""FEdit: its losses and their gradients against NumPy, its entropy, and what it learns on a bandit."""

import functools

import bandit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_networks import as_float64, critic, make_agent, make_batch, random_params, velocity
from squashed_gaussian import assert_entropy_reaches_target, assert_gradient, assert_own_network, draw, evaluator

from agents import base, fedit

BATCH = make_batch()
KEY = jax.random.key(3)


def edit_loss(agent, params, batch, key):
    """The loss of the edit policy on samples of the flow, with the keys that `loss` gives them."""
    *_, sample_key, edit_key = jax.random.split(key, 4)
    actions = base.Agent.propose(agent, batch["observations"], sample_key)
    return agent.edit_loss(params, batch, actions, edit_key)


evaluate = evaluator(
    {
        "critic": lambda agent, params, batch, key: agent.critic_loss(params, batch, jax.random.split(key, 4)[0]),
        "flow": lambda agent, params, batch, key: agent.bc_loss(params, batch, jax.random.split(key, 4)[1]),
        "edit": edit_loss,
        "whole": lambda agent, params, batch, key: agent.loss(params, batch, key),
    }
)


@pytest.fixture(scope="module")
def agent():
    """A small agent; its flow is weak, so that its samples are not all clipped."""
    agent = make_agent(fedit, BATCH, flow_steps=3, edit_scale=0.3, target_entropy=0.7, discount=0.9, rho=0.5)
    return agent.replace(targets=agent.targets | {"flow": jax.tree.map(lambda p: 0.3 * p, agent.targets["flow"])})


@pytest.fixture(scope="module")
def params(agent):
    """Parameters to differentiate at, unlike the agent's own, which stand wherever no gradient flows."""
    return random_params(agent.params, 5)


@pytest.fixture(scope="module")
def results(agent, params):
    """Value, gradient, log and draws of the losses."""
    return evaluate(agent, params, BATCH, KEY)


def sample(agent, observations, noise):
    """Three Euler steps of the flow that is sampled from, clipped."""
    x = np.asarray(noise, np.float64)
    for t in range(3):
        x = x + velocity(agent.targets["flow"], observations, x, np.full((*x.shape[:-1], 1), t / 3)) / 3
    return np.clip(x, -1, 1)


def edit(edit_actor, observations, actions, noise):
    """clip(a + 0.3 e), and log π(e|s, a): the density before scaling."""
    edits, log_probs = draw(edit_actor, np.concatenate([observations, actions], axis=-1), noise)
    return np.clip(actions + 0.3 * edits, -1, 1), log_probs


def test_networks(agent):
    """What is trained and what has a Polyak copy; an update keeps all types, so it is compiled once."""
    assert set(agent.params) == {"critic", "flow", "edit_actor", "temperature"}
    assert set(agent.targets) == {"critic", "flow"}
    assert agent.nfe == 4
    fresh = jax.eval_shape(lambda: fedit.Agent.create(KEY, BATCH, fedit.get_config()))
    updated = jax.eval_shape(lambda a: a.update(BATCH)[0], fresh)
    first, second = ([(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(a)] for a in (fresh, updated))
    assert first == second


def test_critic_bootstraps_from_an_edited_action(agent, params, results):
    """Target y = R + γ^H mask (mean − ρ std) of the target critics at edit(s', Euler_v(s', z'))."""
    loss, *_, draws = results["critic"]
    batch = as_float64(BATCH)
    sampled = sample(agent, batch["next_observations"], draws[0][0])
    next_actions, _ = edit(agent.params["edit_actor"], batch["next_observations"], sampled, draws[1][0])
    assert np.mean(np.abs(sampled) < 1) > 0.3
    assert 0.1 < np.abs(next_actions - sampled).max() <= 0.3
    next_qs = critic(agent.targets["critic"], batch["next_observations"], next_actions)
    target = batch["rewards"] + 0.9**2 * batch["masks"] * (next_qs.mean(0) - 0.5 * next_qs.std(0))
    qs = critic(params["critic"], batch["observations"], batch["actions"])
    np.testing.assert_allclose(loss, np.mean(batch["valid"] * (qs - target) ** 2), rtol=1e-3)


def test_acting_is_stochastic(agent):
    """Both the flow's noise and the edit are drawn, for observations of any leading shape."""
    observations = jnp.tile(BATCH["observations"][0], (2, 5, 1))
    actions = np.asarray(jax.jit(agent.sample_actions)(observations, KEY))
    assert actions.shape == (2, 5, 4)
    assert len(np.unique(actions.reshape(10, 4), axis=0)) == 10
    edits = np.asarray(jax.jit(agent.edit)(observations, jnp.zeros((2, 5, 4)), KEY)[0])
    assert len(np.unique(edits.reshape(10, 4), axis=0)) == 10


@pytest.mark.check
def test_edit_and_temperature_equal_numpy(agent, params, results):
    """sg(α) log π(e) − mean_k Q_k(s, edit), and α (−sg log π − H̄), H̄ = −0.7 · 4; values and gradients."""
    loss, gradient, info, (flow_noise, noise) = results["edit"]
    batch, temperature = as_float64(BATCH), np.exp(float(params["temperature"]["log_value"]))
    actions = sample(agent, batch["observations"], flow_noise)

    def actor(edit_actor):
        edited, log_probs = edit(edit_actor, batch["observations"], actions, noise)
        q = critic(agent.params["critic"], batch["observations"], edited).mean(0)
        return np.mean(batch["valid"] * (temperature * log_probs - q))

    edited, log_probs = edit(params["edit_actor"], batch["observations"], actions, noise)
    assert np.mean(np.abs(edited) < 1) > 0.3
    surplus = np.mean(batch["valid"] * (-log_probs + 0.7 * 4))
    np.testing.assert_allclose(info["actor/loss"], actor(params["edit_actor"]), rtol=1e-3)
    np.testing.assert_allclose(info["temperature/loss"], temperature * surplus, rtol=1e-3)
    np.testing.assert_allclose(loss, info["actor/loss"] + info["temperature/loss"], rtol=1e-5)
    np.testing.assert_allclose(info["actor/entropy"], -log_probs.mean(), rtol=1e-3)
    assert_gradient(gradient["edit_actor"], actor, params["edit_actor"])
    # dα / d log α = α.
    np.testing.assert_allclose(gradient["temperature"]["log_value"], temperature * surplus, rtol=1e-3)


def test_gradients_stay_with_their_own_network(results):
    """The critic learns from the TD loss alone and the flow from flow matching alone."""
    own = {"critic": ["critic"], "flow": ["flow"], "edit": ["edit_actor", "temperature"]}
    assert_own_network(results, "whole", own)


def test_draws_are_independent(results):
    """Each of the losses has noise of its own, N(0, I)."""
    noises = np.stack([np.ravel(x) for name, (*_, draws) in results.items() if name != "whole" for x in draws])
    assert noises.shape == (5, 48)
    assert np.abs(np.corrcoef(noises) - np.eye(5)).max() < 0.6
    assert np.abs(noises.mean(1)).max() < 0.6
    assert np.abs(noises.std(1) - 1).max() < 0.4


def test_no_valid_window_trains_nothing(agent, params):
    """A batch of invalid windows has zero losses and zero gradients."""
    for value, gradient, *_ in evaluate(agent, params, BATCH | {"valid": jnp.zeros(12)}, KEY).values():
        assert value == 0
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_temperature_brings_the_entropy_to_its_target():
    """On a quadratic Q, from actions at 0; the entropy is that of e before scaling."""
    batch = make_batch(64) | {"valid": jnp.ones(64)}
    assert_entropy_reaches_target(
        fedit.Agent,
        "critic",
        "edit_scale",
        batch,
        loss=lambda agent, params, key: agent.edit_loss(params, batch, jnp.zeros((64, 4)), key),
        sample=lambda agent, key: agent.edit(jnp.tile(batch["observations"], (50, 1)), jnp.zeros((3200, 4)), key),
    )


# The table of QAM's experiments, and two domains that take the nearest.
SCALES = {
    "puzzle-3x3": 0.2,
    "scene": 0.2,
    "cube-double": 0.2,
    "cube-triple": 0.3,
    "antmaze-large": 0.2,
    "antmaze-giant": 0.3,
    "humanoidmaze-medium": 0.5,
    "humanoidmaze-large": 0.1,
    "cube-quadruple": 0.4,
    "puzzle-4x4": 0.8,
    "puzzle-4x6": 0.8,
    "cube-single": 0.2,
}


def test_settings():
    """The published edit scales; nearest domains; the online flow is the one that is sampled from."""
    assert {domain: fedit.PRESETS[domain]["edit_scale"] for domain in SCALES} == SCALES
    config = fedit.get_config()
    assert (config.flow_tau, config.tau, config.target_entropy) == (1.0, 0.005, 0.5)
    assert (config.flow_steps, config.best_of_n) == (10, 1)


# ---- the bandit


@pytest.fixture(scope="module")
def learned():
    """FEdit with edits that cannot leave a mode, and with edits that reach every other mode."""
    return bandit.train(fedit, bandit.make_data(), 2000, flow_steps=[5, 5], edit_scale=[0.2, 1.2], lr=[4e-3, 4e-3])


def test_edits_reach_as_far_as_their_scale(learned):
    """Short edits cannot leave a mode and keep the data's shares; long ones turn to the best mode, 0.85 or more away.

    No term keeps a long edit near the data, so only its direction is tested.
    """
    contexts = bandit.fresh_contexts()
    short, far = (bandit.mode_shares(contexts, jax.jit(agent.sample_actions)(contexts, KEY)) for agent in learned)
    print("FEdit, scale 0.2:", short.round(3), "scale 1.2:", far.round(3))
    np.testing.assert_allclose(short, bandit.SHARES, atol=0.12)
    assert far[3] >= 0.8


def test_edits_raise_the_value(learned):
    """The critic rates edited samples above those that they were."""
    contexts = bandit.fresh_contexts()
    for agent in learned:
        sampled = jax.jit(functools.partial(base.Agent.propose, agent))(contexts, KEY)
        edited, _ = jax.jit(agent.edit)(contexts, sampled, KEY)
        before, after = (float(bandit.evaluate(agent, "critic", contexts, a).mean()) for a in (sampled, edited))
        print("Q before and after:", round(before, 3), round(after, 3))
        assert after > before + 0.02
