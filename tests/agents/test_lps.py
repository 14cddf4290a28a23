"""LPS: its loss against NumPy, the MeanFlow identity, and what it learns on a bandit whose answer is known."""

import bandit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import check_loss_and_gradient, td_loss
from numpy_networks import as_float64, critic, make_agent, make_batch, mlp

from agents import lps
from utils.run.agent_config import resolve_config

BATCH = make_batch()


def policy(params, observations, x, t, h):
    """g(s, x, t, h)."""
    (field,) = as_float64(params).values()
    return mlp(field, np.concatenate([observations, x, t, h], axis=-1).astype(np.float64), False)


def latent(params, observations):
    """ζ(s), on the sphere of radius √d."""
    (field,) = as_float64(params).values()
    outputs = mlp(field, np.asarray(observations, np.float64), False)
    return outputs * 2 / np.linalg.norm(outputs, axis=-1, keepdims=True)


def act(meanflow, actor, observations):
    """Clip g(s, ζ(s), 1, 1)."""
    one = np.ones((len(observations), 1))
    return np.clip(policy(meanflow, observations, latent(actor, observations), one, one), -1, 1)


@pytest.mark.check
def test_loss_and_gradient_equal_numpy():
    """TD + weighted MeanFlow − α λ Q(s, π(s)); the last reaches ζ alone, and targets and weights have no gradient."""
    agent = make_agent(lps, BATCH, alpha=0.7, discount=0.9, rho=0.5, latent_hidden_dims=(6,))
    agent = agent.replace(params=agent.params | {"meanflow": jax.tree.map(lambda p: 0.6 * p, agent.params["meanflow"])})
    batch = as_float64(BATCH)
    observations, actions, valid = batch["observations"], batch["actions"], batch["valid"]
    own = agent.params

    def meanflow(params, noise, times):
        noise = noise * 2 / np.linalg.norm(noise, axis=1, keepdims=True)
        times = 1 / (1 + np.exp(0.4 - times))
        t, r = times.max(0), times.min(0)
        r[:9] = t[:9]
        x, v = (1 - t) * actions + t * noise, noise - actions
        ends = [policy(own["meanflow"], observations, x + h * v, t + h, t + h - r) for h in (1e-5, -1e-5)]
        target = v - (t - r) * (v - (ends[0] - ends[1]) / 2e-5)
        fixed = np.mean(
            batch["action_mask"] * (x - policy(own["meanflow"], observations, x, t, t - r) - target) ** 2, 1
        )
        errors = np.mean(batch["action_mask"] * (x - policy(params, observations, x, t, t - r) - target) ** 2, 1)
        return np.mean(valid * errors / np.sqrt(fixed + 1e-3))

    def expected(params, draws):
        noise, times = draws
        next_actions = act(own["meanflow"], own["latent_actor"], batch["next_observations"])
        next_qs = critic(agent.targets["critic"], batch["next_observations"], next_actions)
        loss = td_loss(critic(params["critic"], observations, actions), next_qs, batch, agent)
        loss += meanflow(params["meanflow"], noise, times)
        q = critic(own["critic"], observations, act(own["meanflow"], params["latent_actor"], observations)).mean(0)
        fixed = critic(own["critic"], observations, act(own["meanflow"], own["latent_actor"], observations)).mean(0)
        return loss - 0.7 * valid.sum() / np.sum(valid * np.abs(fixed)) * np.mean(valid * q)

    check_loss_and_gradient(agent, BATCH, expected)


def test_one_data_point_solves_the_identity():
    """If all actions are a, u = e − a at every time, so that g = x − (x − a) / t has no loss."""
    point = jnp.float32([0.3, -0.5, 0.1, 0.8])
    batch = BATCH | {"actions": jnp.tile(point, (12, 1))}

    class Exact(lps.Agent):
        def apply(self, name, *inputs, params=None):
            if name != "meanflow":
                return super().apply(name, *inputs, params=params)
            _, x, t, _ = inputs
            return x - (x - point) / t

    agent = make_agent(lps, batch)
    exact = Exact(**{k: getattr(agent, k) for k in agent.__dataclass_fields__})
    assert exact.meanflow_loss(agent.params, batch, jax.random.key(0)) < 1e-8


def test_acting_draws_nothing():
    """Two evaluations give the same action for every key."""
    agent = make_agent(lps, BATCH)
    assert agent.nfe == 2
    actions = [agent.sample_actions(BATCH["observations"], jax.random.key(seed)) for seed in range(2)]
    np.testing.assert_array_equal(*actions)
    expected = act(agent.params["meanflow"], agent.params["latent_actor"], np.asarray(BATCH["observations"]))
    np.testing.assert_allclose(actions[0], expected, atol=1e-4)
    assert "flow" not in agent.targets and lps.Agent.FLOWS == ()


def test_settings():
    for domain in ("scene", "cube-single", "antmaze-large"):
        assert resolve_config(lps, domain, "paper", {})[0].alpha == 1.0


# ---- the bandit


@pytest.fixture(scope="module")
def learned():
    settings = {"rho": [0.0], "latent_hidden_dims": [(64, 64)], "lr": [1e-3], "batch_size": [256]}
    return bandit.train(lps, bandit.make_data(), 7000, **settings)[0]


def test_the_actor_steers_to_the_best_mode(learned):
    """The data's best mode is 15 % of it; −α Q in place of +α Q would lead to the worst one."""
    contexts = bandit.fresh_contexts()
    share = bandit.mode_shares(contexts, bandit.act(learned, contexts))
    print(share.round(3))
    assert share[3] > 0.6


def test_one_step_imitates(learned):
    """From random latents the MeanFlow policy plays every mode about as often as the data."""
    contexts = bandit.fresh_contexts()
    latents = lps.on_sphere(jax.random.normal(jax.random.key(5), contexts.shape))
    one = jnp.ones((len(contexts), 1))
    share = bandit.mode_shares(contexts, np.asarray(learned.apply("meanflow", contexts, latents, one, one)))
    print(share.round(3))
    assert np.abs(share - bandit.SHARES).max() < 0.15
