"""OTQL: its loss against NumPy, and what it learns on a bandit whose answer is known."""

import bandit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_networks import critic, fixed_policy, make_agent, make_batch, velocity

from agents import base, bc, otql
from utils.coupling import couple

CORNER = np.array([1.0, -1.0, -1.0, 1.0])
BATCH = make_batch()
INDEX = np.array([3, 3, 1, 10, 2, 7, 4, 11, 5, 6, 9, 2])


@pytest.mark.check
def test_value_is_the_mean_over_samples():
    """V̂(s) = mean over samples of the ensemble mean of the online critic, at s and the policy's own actions."""
    agent, key = make_agent(otql, BATCH, value_samples=5, best_of_n=3), jax.random.key(2)
    agent = agent.replace(targets=agent.targets | {"flow": jax.tree.map(lambda p: 0.3 * p, agent.targets["flow"])})
    observations, actions = (np.asarray(x) for x in agent.candidates(BATCH["observations"], key, 5))
    assert len(np.unique(actions.reshape(-1, 4), axis=0)) > 12
    expected = critic(agent.params["critic"], observations, actions).mean((0, 1))
    next_value, value = agent.values(BATCH, jax.random.key(3), key)
    np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-4)
    expected = agent.next_value(BATCH["next_observations"], jax.random.key(3))
    np.testing.assert_allclose(next_value, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture
def spied(monkeypatch):
    """Replaces the coupling and the time of the flow loss by given ones, and keeps what they are called with."""
    seen = {"noise": jnp.asarray(np.random.default_rng(9).normal(size=(12, 4)), jnp.float32)}

    def couple(key, actions, conditions, weights, config, action_mask=None):
        seen.update(actions=actions, conditions=conditions, weights=weights, config=config, action_mask=action_mask)
        return seen["noise"], jnp.asarray(INDEX), {}

    def flow_matching_loss(field, key, noise, actions, weights):
        error = field(0.3 * actions + 0.7 * noise, jnp.full((12, 1), 0.3)) - (actions - noise)
        return jnp.mean(weights * error**2)

    monkeypatch.setattr(otql, "couple", couple)
    monkeypatch.setattr(base, "flow_matching_loss", flow_matching_loss)
    return seen


@pytest.mark.check
@pytest.mark.parametrize(("lam", "w_max"), [(0.3, 10.0), (2.0, 3.0), (0.0, 10.0)])
def test_advantages_weights_and_pairs(spied, lam, w_max):
    """The coupling gets min(exp(λ (Q − V̂)), w_max) · valid, and the flow learns a_j − z_i at the TARGET's s_j."""
    agent = fixed_policy(make_agent(otql, BATCH, lam=lam, w_max=w_max, value_samples=4), CORNER)
    # The agent's own flow, which V̂ samples, always plays CORNER; the flow that is trained is another.
    params = agent.params | {"flow": make_agent(otql, BATCH, seed=5).params["flow"]}
    loss, info = agent.loss(params, BATCH, jax.random.key(0))
    batch = {k: np.asarray(v, np.float64) for k, v in BATCH.items()}
    observations, actions = batch["observations"], batch["actions"]
    q = critic(agent.params["critic"], observations, actions).mean(0)
    advantages = q - critic(agent.params["critic"], observations, np.tile(CORNER, (12, 1))).mean(0)
    weights = np.minimum(np.exp(lam * advantages), w_max) * batch["valid"]
    given = np.asarray(spied["weights"])
    np.testing.assert_allclose(given / given.sum(), weights / weights.sum(), rtol=1e-3)
    np.testing.assert_allclose(info["advantage/mean"], advantages.mean(), rtol=1e-3)
    np.testing.assert_array_equal(spied["actions"], BATCH["actions"])
    np.testing.assert_array_equal(spied["action_mask"], BATCH["action_mask"])
    standardised = (observations - observations.mean(0)) / observations.std(0)
    np.testing.assert_allclose(spied["conditions"], standardised, atol=1e-5)
    assert spied["config"].coupling == "ot"
    np.testing.assert_allclose(spied["config"].alpha, agent.hyper["alpha"])

    noise = np.asarray(spied["noise"])
    x = 0.3 * actions[INDEX] + 0.7 * noise
    error = velocity(params["flow"], observations[INDEX], x, np.full((12, 1), 0.3)) - (actions[INDEX] - noise)
    flow_loss = np.mean((batch["valid"][:, None] * batch["action_mask"])[INDEX] * error**2)
    np.testing.assert_allclose(info["flow/loss"], flow_loss, rtol=1e-4)
    np.testing.assert_allclose(loss, flow_loss + info["critic/loss"], rtol=1e-4)


def test_conditions_are_bounded():
    """A component that hardly moves in the data and far online is at the bound; what is within it stays as it is."""
    rng = np.random.default_rng(0)
    data = {"observations": rng.normal(size=(2000, 3)) * [1, 0.0016, 2] + [0, 0.3, 5], "actions": np.zeros((2000, 4))}
    agent = make_agent(otql, {name: jnp.asarray(value, jnp.float32) for name, value in data.items()})
    online = np.float32([[0.5, 0.3, 5], [-1, 1.4, 9], [2, -0.8, 5], [0, 0.3, 5 - 1e9], [np.inf, 0.3, 5]])
    standardised = (online - data["observations"].mean(0)) / data["observations"].std(0)
    assert np.abs(standardised[1:3, 1]).min() > 600
    conditions = np.asarray(agent.conditions(jnp.asarray(online)))
    np.testing.assert_allclose(conditions, np.clip(standardised, -5, 5), rtol=1e-3, atol=1e-3)


def test_bounded_conditions_let_the_plan_converge():
    """Half a batch from online, where one component is up to 700 deviations away: no solve stops at its cap."""
    rng, stats = np.random.default_rng(1), (jnp.zeros(6), jnp.ones(6))
    config = otql.get_config()
    config.update({"actor_hidden_dims": (8,), "value_hidden_dims": (8,), "num_qs": 2})
    z = rng.normal(size=(256, 6))
    z[:64, 3] += rng.uniform(0, 700, 64)
    actions = jnp.asarray(rng.uniform(-1, 1, (256, 10)), jnp.float32)
    batch = {"observations": jnp.asarray(z, jnp.float32), "actions": actions}
    agent = otql.Agent.create(jax.random.key(0), batch, config).replace(condition_stats=stats)
    weights = jnp.asarray(np.minimum(np.exp(1.5 * rng.normal(size=256)), 10), jnp.float32)
    solve = jax.jit(lambda key, conditions: couple(key, actions, conditions, weights, agent.cfg)[2])
    for seed in range(3):
        bounded = solve(jax.random.key(seed), agent.conditions(batch["observations"]))
        assert bounded["capped"] == 0 and bounded["iterations"] <= 20
        assert solve(jax.random.key(seed), batch["observations"])["capped"] == 1


@jax.jit
def gradients(agent, batch):
    """Gradients of the loss, of the TD loss and of the flow loss, stacked, and their values."""

    def losses(params):
        total, info = agent.loss(params, batch, agent.key)
        values = jnp.stack([total, info["critic/loss"], info["flow/loss"]])
        return values, values

    return jax.jacrev(losses, has_aux=True)(agent.params)


@pytest.mark.check
def test_gradients_stay_with_their_own_network():
    """The critic's gradient is the TD loss's alone and the flow's is the flow loss's alone."""
    tree, values = gradients(make_agent(otql, BATCH, max_iterations=10), BATCH)
    np.testing.assert_allclose(values[0], values[1] + values[2], rtol=1e-5)
    for name, own, other in (("critic", 1, 2), ("flow", 2, 1)):
        for leaf in jax.tree.leaves(tree[name]):
            assert np.all(leaf[other] == 0)
            assert np.abs(leaf[own]).max() > 0
            np.testing.assert_allclose(leaf[0], leaf[own], rtol=1e-4, atol=1e-6)


def test_no_valid_window_trains_nothing():
    """A batch of invalid windows has zero loss and zero gradient."""
    tree, values = gradients(make_agent(otql, BATCH, max_iterations=10), BATCH | {"valid": jnp.zeros(12)})
    assert np.all(values == 0)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(tree))


# ---- the bandit


@pytest.fixture(scope="module")
def learned():
    """BC, OTQL at λ = 0 and OTQL at λ = 10, trained on the same data, contexts and noise to test them on."""
    data, updates = bandit.make_data(), 2500
    (clone,) = bandit.train(bc, data, updates)
    fast = {"alpha": 1.0, "epsilon": 0.1, "max_iterations": 10, "threshold": 0.01, "value_samples": 2, "w_max": 100.0}
    plain, tilted = bandit.train(otql, data, updates, lam=[0.0, 10.0], **{k: [v, v] for k, v in fast.items()})
    contexts = bandit.fresh_contexts()
    noise = jax.random.normal(jax.random.key(9), contexts.shape)

    def samples(agent, num_steps):
        return np.asarray(bandit.flow_samples(agent, contexts, noise, num_steps))

    return {"bc": clone, "plain": plain, "tilted": tilted}, contexts, samples


def test_tilted_policy_takes_the_best_action(learned):
    """With two steps OTQL puts at least 90 % of its actions near the best mode, which the data take in 15 %."""
    agents, contexts, _ = learned
    assert agents["tilted"].config.flow_steps == 2
    actions = bandit.act(agents["tilted"], contexts)
    shares = bandit.mode_shares(contexts, actions, radius=0.4)
    print("OTQL, 2 steps:", shares.round(3))
    assert shares[3] >= 0.9


def test_tilted_policy_follows_the_context(learned):
    """The best action turns with s_0, and so does the policy: the slope of its angle is the problem's."""
    agents, contexts, samples = learned
    x, y = samples(agents["tilted"], 2).T
    angle = np.arctan2(y, x) - (3 * np.pi / 2 + np.pi / 4)
    slope = np.polyfit(contexts[:, 0], (angle + np.pi) % (2 * np.pi) - np.pi, 1)[0]
    print("slope:", slope.round(3))
    assert abs(slope / bandit.TURN - 1) < 0.3


def test_untilted_policy_is_the_data(learned):
    """BC and OTQL at λ = 0 keep the data's shares, so they agree with each other."""
    agents, contexts, samples = learned
    shares = {name: bandit.mode_shares(contexts, samples(agents[name], 100)) for name in ("bc", "plain")}
    print("100 steps:", {k: v.round(3) for k, v in shares.items()})
    for share in shares.values():
        np.testing.assert_allclose(share, bandit.SHARES, atol=0.08)
    np.testing.assert_allclose(shares["bc"], shares["plain"], atol=0.08)


def test_coupled_flow_is_straighter(learned):
    """Samples of two steps lie far nearer to those of 100 steps than with the independent coupling."""
    agents, _, samples = learned
    gaps = {k: np.linalg.norm(samples(a, 2) - samples(a, 100), axis=1).mean() for k, a in agents.items()}
    print("gap:", {k: round(float(v), 3) for k, v in gaps.items()})
    assert gaps["plain"] < 0.5 * gaps["bc"]


def test_critic_knows_the_values(learned):
    """Q of each mode's centre is its value: a bandit has no bootstrap."""
    agents, contexts, _ = learned
    centres = jnp.float32(bandit.modes(contexts))
    observations = jnp.repeat(contexts[:, None], 4, axis=1)
    values = np.asarray(bandit.evaluate(agents["tilted"], "critic", observations, centres).mean(0))
    np.testing.assert_allclose(values.mean(0), bandit.VALUES, atol=0.1)
