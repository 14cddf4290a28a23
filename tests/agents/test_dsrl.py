"""DSRL: its losses and their gradients against NumPy, its entropy, and what it learns on a bandit."""

import bandit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_networks import as_float64, critic, make_agent, make_batch, random_params, velocity
from squashed_gaussian import assert_entropy_reaches_target, assert_gradient, assert_own_network, draw, evaluator

from agents import dsrl

BATCH = make_batch()
KEY = jax.random.key(3)
evaluate = evaluator(
    {
        "critic": lambda agent, params, batch, key: agent.critic_loss(params, batch, jax.random.split(key, 4)[0]),
        "flow": lambda agent, params, batch, key: agent.bc_loss(params, batch, jax.random.split(key, 4)[1]),
        "latent": lambda agent, params, batch, key: agent.distillation_loss(params, batch, jax.random.split(key, 4)[2]),
        "actor": lambda agent, params, batch, key: agent.actor_loss(params, batch, jax.random.split(key, 4)[3]),
        "whole": lambda agent, params, batch, key: agent.loss(params, batch, key),
    }
)


@pytest.fixture(scope="module")
def agent():
    """A small agent; its averaged flow is weak, so that its samples are not all clipped."""
    agent = make_agent(dsrl, BATCH, flow_steps=3, noise_scale=1.3, target_entropy=0.7, discount=0.9, rho=0.5)
    return agent.replace(targets=agent.targets | {"flow": jax.tree.map(lambda p: 0.3 * p, agent.targets["flow"])})


@pytest.fixture(scope="module")
def params(agent):
    """Parameters to differentiate at, unlike the agent's own, which stand wherever no gradient flows."""
    return random_params(agent.params, 5)


@pytest.fixture(scope="module")
def results(agent, params):
    """Value, gradient, log and draws of the losses."""
    return evaluate(agent, params, BATCH, KEY)


def steer(agent, observations, noise):
    """Three Euler steps of the averaged flow, clipped."""
    x = np.asarray(noise, np.float64)
    for t in range(3):
        x = x + velocity(agent.targets["flow"], observations, x, np.full((*x.shape[:-1], 1), t / 3)) / 3
    return np.clip(x, -1, 1)


def test_networks(agent):
    """What is trained and what has a Polyak copy; an update keeps all types, so it is compiled once."""
    assert set(agent.params) == {"critic", "flow", "latent_critic", "latent_actor", "temperature"}
    assert set(agent.targets) == {"critic", "flow"}
    assert agent.nfe == 4
    fresh = jax.eval_shape(lambda: dsrl.Agent.create(KEY, BATCH, dsrl.get_config()))
    updated = jax.eval_shape(lambda a: a.update(BATCH)[0], fresh)
    first, second = ([(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(a)] for a in (fresh, updated))
    assert first == second


def test_critic_bootstraps_from_a_steered_action(agent, params, results):
    """Target: y = R + γ^H mask (mean − ρ std) of the target critics at Euler_v̄(s', b z'), v̄ AVERAGED, z' ~ π."""
    loss, *_, (noise,) = results["critic"]
    batch = as_float64(BATCH)
    latents, _ = draw(agent.params["latent_actor"], batch["next_observations"], noise[0])
    next_actions = steer(agent, batch["next_observations"], 1.3 * latents)
    assert np.mean(np.abs(next_actions) < 1) > 0.3
    next_qs = critic(agent.targets["critic"], batch["next_observations"], next_actions)
    target = batch["rewards"] + 0.9**2 * batch["masks"] * (next_qs.mean(0) - 0.5 * next_qs.std(0))
    qs = critic(params["critic"], batch["observations"], batch["actions"])
    np.testing.assert_allclose(loss, np.mean(batch["valid"] * (qs - target) ** 2), rtol=1e-3)


def test_acting_is_stochastic(agent):
    """Actions come from the latent actor's draws, for observations of any leading shape."""
    observations = jnp.tile(BATCH["observations"][0], (2, 5, 1))
    actions = np.asarray(jax.jit(agent.sample_actions)(observations, KEY))
    assert actions.shape == (2, 5, 4)
    assert len(np.unique(actions.reshape(10, 4), axis=0)) == 10


@pytest.mark.check
def test_distillation_equals_numpy(agent, params, results):
    """Member by member from the ONLINE critics at the steered action, at z ~ N(0, I); value and gradient."""
    loss, gradient, _, (noise,) = results["latent"]
    batch = as_float64(BATCH)
    qs = critic(agent.params["critic"], batch["observations"], steer(agent, batch["observations"], noise))

    def expected(latent_critic):
        return np.mean(batch["valid"] * (critic(latent_critic, batch["observations"], noise) - qs) ** 2)

    np.testing.assert_allclose(loss, expected(params["latent_critic"]), rtol=1e-4)
    assert_gradient(gradient["latent_critic"], expected, params["latent_critic"])
    np.testing.assert_allclose(results["whole"][2]["latent_critic/loss"], loss, rtol=1e-5)


@pytest.mark.check
def test_actor_and_temperature_equal_numpy(agent, params, results):
    """sg(α) log π(z|s) − mean_k Q^z_k(s, b z), and α (−sg log π − H̄), H̄ = −0.7 · 4; values and gradients."""
    loss, gradient, info, (noise,) = results["actor"]
    batch, temperature = as_float64(BATCH), np.exp(float(params["temperature"]["log_value"]))

    def actor(latent_actor):
        latents, log_probs = draw(latent_actor, batch["observations"], noise)
        q = critic(agent.params["latent_critic"], batch["observations"], 1.3 * latents).mean(0)
        return np.mean(batch["valid"] * (temperature * log_probs - q))

    _, log_probs = draw(params["latent_actor"], batch["observations"], noise)
    surplus = np.mean(batch["valid"] * (-log_probs + 0.7 * 4))
    np.testing.assert_allclose(info["actor/loss"], actor(params["latent_actor"]), rtol=1e-3)
    np.testing.assert_allclose(info["temperature/loss"], temperature * surplus, rtol=1e-3)
    np.testing.assert_allclose(loss, info["actor/loss"] + info["temperature/loss"], rtol=1e-5)
    np.testing.assert_allclose(info["actor/entropy"], -log_probs.mean(), rtol=1e-3)
    assert_gradient(gradient["latent_actor"], actor, params["latent_actor"])
    # dα / d log α = α.
    np.testing.assert_allclose(gradient["temperature"]["log_value"], temperature * surplus, rtol=1e-3)


def test_gradients_stay_with_their_own_network(results):
    """The critic learns from the TD loss alone, the flow from flow matching, the latent critic from distillation."""
    own = {
        "critic": ["critic"],
        "flow": ["flow"],
        "latent": ["latent_critic"],
        "actor": ["latent_actor", "temperature"],
    }
    assert_own_network(results, "whole", own)


def test_draws_are_independent(results):
    """Each of the four losses has noise of its own, N(0, I)."""
    noises = np.stack([np.ravel(draws[0]) for name, (*_, draws) in results.items() if name != "whole"])
    assert np.abs(np.corrcoef(noises) - np.eye(4)).max() < 0.6
    assert np.abs(noises.mean(1)).max() < 0.6
    assert np.abs(noises.std(1) - 1).max() < 0.4


def test_no_valid_window_trains_nothing(agent, params):
    """A batch of invalid windows has zero losses and zero gradients."""
    for value, gradient, *_ in evaluate(agent, params, BATCH | {"valid": jnp.zeros(12)}, KEY).values():
        assert value == 0
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_temperature_brings_the_entropy_to_its_target():
    """On a quadratic Q^z; the entropy is that of z before scaling."""
    batch = make_batch(64) | {"valid": jnp.ones(64)}
    assert_entropy_reaches_target(
        dsrl.Agent,
        "latent_critic",
        "noise_scale",
        batch,
        loss=lambda agent, params, key: agent.actor_loss(params, batch, key),
        sample=lambda agent, key: agent.latents(jnp.tile(batch["observations"], (50, 1)), key),
    )


# The table of QAM's experiments, and two domains that take the nearest.
SCALES = {
    "puzzle-3x3": 1.0,
    "scene": 0.4,
    "cube-double": 1.0,
    "cube-triple": 1.4,
    "antmaze-large": 0.8,
    "antmaze-giant": 1.2,
    "humanoidmaze-medium": 0.6,
    "humanoidmaze-large": 0.8,
    "cube-quadruple": 1.4,
    "puzzle-4x4": 1.0,
    "puzzle-4x6": 1.0,
    "cube-single": 1.0,
}


def test_settings():
    """The published noise scales; nearest domains; a Polyak copy of the flow at the critics' rate."""
    assert {domain: dsrl.PRESETS[domain]["noise_scale"] for domain in SCALES} == SCALES
    config = dsrl.get_config()
    assert (config.flow_tau, config.tau, config.target_entropy) == (0.005, 0.005, 0.5)
    assert (config.flow_steps, config.best_of_n) == (10, 1)


# ---- the bandit


@pytest.fixture(scope="module")
def learned():
    """DSRL, at an entropy so low that it does not spread over the modes (the default leaves it 80 % on the best)."""
    settings = {"flow_steps": [5], "flow_tau": [0.02], "target_entropy": [2.0], "lr": [4e-3]}
    (agent,) = bandit.train(dsrl, bandit.make_data(), 2500, **settings)
    return agent


def test_steered_policy_takes_the_best_action(learned):
    """From chosen noise at least 90 % of the actions are the best mode's; from N(0, I) the data's share, 15 %."""
    contexts = bandit.fresh_contexts()
    chosen = bandit.mode_shares(contexts, jax.jit(learned.sample_actions)(contexts, KEY), radius=0.4)
    noise = jax.random.normal(KEY, contexts.shape)
    cloned = bandit.mode_shares(contexts, jax.jit(learned.flow_actions)(contexts, noise))
    print("DSRL:", chosen.round(3), "its flow:", cloned.round(3))
    assert chosen[3] >= 0.9
    np.testing.assert_allclose(cloned, bandit.SHARES, atol=0.1)


def test_latent_critic_knows_the_steered_values(learned):
    """Q^z(s, z) is Q(s, Euler(s, z)) on N(0, I)."""
    contexts = bandit.fresh_contexts()
    noise = jax.random.normal(KEY, contexts.shape)
    latent = np.asarray(bandit.evaluate(learned, "latent_critic", contexts, noise).mean(0))
    q = np.asarray(bandit.evaluate(learned, "critic", contexts, jax.jit(learned.flow_actions)(contexts, noise)).mean(0))
    print("correlation:", np.corrcoef(latent, q)[0, 1].round(3), "error:", np.mean((latent - q) ** 2).round(4))
    assert np.mean((latent - q) ** 2) < 0.25 * np.var(q)
