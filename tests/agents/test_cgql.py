"""CGQL: guided samples and the loss against NumPy, and what guidance does on a bandit whose answer is known."""

import bandit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import check_loss_and_gradient, flow_error, td_loss
from numpy_networks import as_float64, critic, make_agent, make_batch, velocity

from agents import base, cgql

BATCH = make_batch()
STEPS = 3


def guided_sample(agent, observations, noise, tau, coefficient):
    """Euler steps of v̄ + ω (x + (1 − t) τ ∇Q) / t, ∇Q by differences of the online critics' mean; none at t = 0."""
    x = np.asarray(noise, np.float64)
    for i in range(STEPS):
        t, v = i / STEPS, velocity(agent.targets["flow"], observations, x, np.full((len(x), 1), i / STEPS))
        if i > 0:
            ends = [
                [critic(agent.params["critic"], observations, x + h * move).mean(0) for h in (1e-6, -1e-6)]
                for move in np.eye(x.shape[-1])
            ]
            gradient = np.stack([(up - down) / 2e-6 for up, down in ends], axis=-1)
            v = v + coefficient * (x + (1 - t) * tau * gradient) / t
        x = x + v / STEPS
    return np.clip(x, -1, 1)


@pytest.mark.check
@pytest.mark.parametrize(("tau", "coefficient"), [(4.0, 0.3), (10.0, 0.1)])
def test_loss_and_gradient_equal_numpy(tau, coefficient):
    """TD, on guided actions that carry no gradient, and BC: critic and flow learn from their own loss alone."""
    agent = make_agent(cgql, BATCH, inv_temp=tau, guidance_coef=coefficient, flow_steps=STEPS, discount=0.9)
    flow = jax.tree.map(lambda p: 0.6 * p, agent.targets["flow"])  # of the samples, some are clipped and others not
    agent, batch, seen = agent.replace(targets=agent.targets | {"flow": flow}), as_float64(BATCH), {}

    def expected(params, draws):
        next_noise, noise, t = draws
        if not seen:
            seen["actions"] = guided_sample(agent, batch["next_observations"], next_noise[0], tau, coefficient)
        next_qs = critic(agent.targets["critic"], batch["next_observations"], seen["actions"])
        loss = td_loss(critic(params["critic"], batch["observations"], batch["actions"]), next_qs, batch, agent)
        error = flow_error(params["flow"], batch["observations"], batch["actions"], noise, t)
        return loss + np.mean(batch["valid"][:, None] * batch["action_mask"] * error**2)

    _, (next_noise, *_) = check_loss_and_gradient(agent, BATCH, expected)
    assert 0.1 < np.mean(np.abs(seen["actions"]) == 1) < 0.9
    # Without guidance, or with its critic's sign changed, the actions are others.
    for other in ((tau, 0.0), (-tau, coefficient)):
        actions = guided_sample(agent, batch["next_observations"], next_noise[0], *other)
        assert np.abs(actions - seen["actions"]).max() > 0.1


@pytest.mark.parametrize("changes", [{"guidance_coef": 0.0, "flow_steps": 4}, {"guidance_coef": 5.0, "flow_steps": 1}])
def test_unguided_samples_are_those_of_bc(changes):
    """With ω = 0, and at t = 0 with any ω, the flow is left as it is."""
    agent = make_agent(cgql, BATCH, **changes)
    flow = jax.tree.map(lambda p: 0.3 * p, agent.targets["flow"])
    agent = agent.replace(targets=agent.targets | {"flow": flow})
    noise = jax.random.normal(jax.random.key(0), (12, 4))
    own, plain = (
        sample(agent, BATCH["observations"], noise) for sample in (cgql.Agent.flow_actions, base.Agent.flow_actions)
    )
    np.testing.assert_allclose(own, plain, atol=1e-6)
    assert np.mean(np.abs(plain) < 1) > 0.1


def test_settings_are_published():
    """The flow that acts is a Polyak copy; τ is 10, and ω 0.1 but for three domains."""
    assert cgql.Agent.TARGETS is base.Agent.TARGETS and base.Agent.TARGETS["flow"] == "flow_tau"
    assert cgql.get_config().flow_tau == cgql.get_config().tau == 0.005
    domains = {domain: own for domain, own in cgql.PRESETS.items() if "inv_temp" in own}
    assert {own["inv_temp"] for own in domains.values()} == {10.0}
    weak = {domain for domain, own in domains.items() if own["guidance_coef"] == 0.01}
    assert weak == {"cube-double", "cube-single", "humanoidmaze-medium", "humanoidmaze-large", "humanoidmaze-giant"}
    assert {own["guidance_coef"] for own in domains.values()} == {0.01, 0.1}
    assert "flow_tau" not in domains["scene"]


# ---- the bandit


@pytest.fixture(scope="module")
def learned():
    """Actions without and with guidance, on fresh contexts."""
    coefficients = {"plain": 0.0, "guided": 0.1}
    same = {"flow_steps": [5] * 2, "flow_tau": [0.02] * 2}
    agents = bandit.train(cgql, bandit.make_data(), 1500, guidance_coef=list(coefficients.values()), **same)
    contexts = bandit.fresh_contexts()
    act = jax.jit(lambda agent: agent.sample_actions(jnp.asarray(contexts), jax.random.key(3)))
    return {name: np.asarray(act(agent)) for name, agent in zip(coefficients, agents, strict=True)}, contexts


def test_guidance_moves_mass_to_better_modes(learned):
    """Without guidance the data's shares; with it the best mode gains and the worst loses at least half of the data's.

    Guidance follows the slope of Q from where a sample is, so modes in between keep theirs: it is no exact tilt, which
    at τ = 10 would leave the best mode 97 %.
    """
    actions, contexts = learned
    shares = {name: bandit.mode_shares(contexts, own, radius=0.4) for name, own in actions.items()}
    print({name: own.round(3) for name, own in shares.items()})
    np.testing.assert_allclose(bandit.mode_shares(contexts, actions["plain"]), bandit.SHARES, atol=0.08)
    assert shares["guided"][3] >= 2 * bandit.SHARES[3]
    assert shares["guided"][0] <= bandit.SHARES[0] / 2
