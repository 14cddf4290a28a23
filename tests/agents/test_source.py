"""Learned sources and shortcut targets: losses against NumPy, where acting starts, and what a source learns."""

import bandit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import check_loss_and_gradient, flow_error, flow_sample, td_loss
from numpy_networks import as_float64, critic, make_agent, make_batch, mlp, velocity
from scipy import stats

from agents import base, bc, ewfm, fawac, fql, otql, qc
from utils.errors import UserError
from utils.networks import GaussianSource
from utils.observations import Observation
from utils.run.agent_config import resolve_config

BATCH = make_batch()
INDEX = np.array([3, 3, 1, 10, 2, 7, 4, 11, 5, 6, 9, 2])
WEIGHTS = np.asarray(BATCH["valid"])[:, None] * np.asarray(BATCH["action_mask"])
SMALL = {"source_hidden_dims": (6,)}


def source(params, observations):
    """Mean and deviation, 0.05 + softplus, which is 1 at an output of 0."""
    (field,) = as_float64(params).values()
    mean, raw = np.split(mlp(field, np.asarray(observations, np.float64), False), 2, axis=-1)
    return mean, 0.05 + np.log1p(np.exp(raw + np.log(np.exp(0.95) - 1)))


def source_loss(params, observations, samples, weights):
    """Mean of −weight · log N(sample; m, σ²)."""
    return -np.mean(weights * stats.norm.logpdf(samples, *source(params, observations)))


@pytest.mark.check
def test_a_new_source_is_standard():
    """An untrained source is N(0, I) at every state, so that a flow from N(0, I) goes on from where it is."""
    net = GaussianSource((8,), 3)
    observations = 10 * jax.random.normal(jax.random.key(0), (5, 4))
    mean, deviation = net.apply(net.init(jax.random.key(1), observations), observations)
    np.testing.assert_array_equal(mean, np.zeros((5, 3)))
    np.testing.assert_allclose(deviation, np.ones((5, 3)), rtol=1e-6)


@pytest.mark.check
def test_bc_and_its_source_equal_numpy():
    """The flow starts at z = m̄ + σ̄ ε of the averaged source; −log N(a; m, σ²) trains the source alone."""
    agent, batch = make_agent(bc, BATCH, 2, source="action", **SMALL), as_float64(BATCH)
    observations, actions = batch["observations"], batch["actions"]

    def expected(params, draws):
        mean, deviation = source(agent.targets["source"], observations)
        error = flow_error(params["flow"], observations, actions, mean + deviation * draws[0], draws[1])
        return np.mean(WEIGHTS * error**2) + source_loss(params["source"], observations, actions, WEIGHTS)

    info, _ = check_loss_and_gradient(agent, BATCH, expected)
    np.testing.assert_allclose(info["source/std"], source(agent.params["source"], observations)[1].mean(), rtol=1e-4)


@pytest.mark.parametrize("module", [ewfm, fawac, qc])
def test_other_agents_fit_the_source_by_the_weights_of_their_flow(module):
    """EWFM's and FAWAC's weights are in both losses; QC's are those of valid windows."""
    settings = {"inv_temp": 1.5} if module is fawac else {"lam": 0.7} if module is ewfm else {"best_of_n": 1}
    agent = make_agent(module, BATCH, 5, source="action", flow_steps=2, **settings, **SMALL)
    captured = {}

    class Spy(module.Agent):
        def flow_loss(self, params, observations, key, noise, actions, weights, name="flow"):
            captured.update(noise=noise, weights=weights)
            return super().flow_loss(params, observations, key, noise, actions, weights, name)

    spy = Spy(**{k: getattr(agent, k) for k in agent.__dataclass_fields__})
    _, info = spy.loss(spy.params, BATCH, jax.random.key(3))
    weights = np.asarray(captured["weights"])
    assert np.unique(weights).size > (2 if module is not qc else 1)
    expected = source_loss(agent.params["source"], BATCH["observations"], np.asarray(BATCH["actions"]), weights)
    np.testing.assert_allclose(info["source/loss"], expected, rtol=1e-4)
    mean, deviation = source(agent.targets["source"], BATCH["observations"])
    drawn = (np.asarray(captured["noise"]) - mean) / deviation
    assert np.abs(drawn).max() < 4.5 and 0.7 < drawn.std() < 1.3


@pytest.mark.check
@pytest.mark.parametrize("kind", ["noise", "action"])
def test_otql_pairs_and_source_equal_numpy(monkeypatch, kind):
    """'action' couples ε with (a − m̄)/σ̄ and starts at m̄_j + σ̄_j ε_i; 'noise' leaves pairs alone and fits their z."""
    agent = make_agent(otql, BATCH, 4, source=kind, value_samples=2, **SMALL)
    noise, seen = np.random.default_rng(9).normal(size=(12, 4)).astype(np.float32), {}

    def couple(key, actions, conditions, weights, config, action_mask=None):
        seen.update(coupled=actions)
        return jnp.asarray(noise), jnp.asarray(INDEX), {}

    def flow_matching_loss(field, key, noise, actions, weights):
        error = field(0.3 * actions + 0.7 * noise, jnp.full((12, 1), 0.3)) - (actions - noise)
        return jnp.mean(weights * error**2)

    monkeypatch.setattr(otql, "couple", couple)
    monkeypatch.setattr(base, "flow_matching_loss", flow_matching_loss)
    params = agent.params | {"source": make_agent(otql, BATCH, 7, source=kind, **SMALL).params["source"]}

    def flow_part(params):
        loss, info = agent.loss(params, BATCH, jax.random.key(0))
        return loss - info["critic/loss"], info

    (loss, info), gradient = jax.value_and_grad(flow_part, has_aux=True)(params)
    observations, actions = (np.asarray(BATCH[k], np.float64) for k in ("observations", "actions"))
    mean, deviation = source(agent.targets["source"], observations)
    start = mean[INDEX] + deviation[INDEX] * noise if kind == "action" else noise
    np.testing.assert_allclose(
        seen["coupled"], (actions - mean) / deviation if kind == "action" else actions, rtol=1e-4, atol=1e-5
    )
    x = 0.3 * actions[INDEX] + 0.7 * start
    error = velocity(params["flow"], observations[INDEX], x, np.full((12, 1), 0.3)) - (actions[INDEX] - start)
    np.testing.assert_allclose(info["flow/loss"], np.mean(WEIGHTS[INDEX] * error**2), rtol=1e-4)
    samples = actions[INDEX] if kind == "action" else noise
    np.testing.assert_allclose(
        info["source/loss"], source_loss(params["source"], observations[INDEX], samples, WEIGHTS[INDEX]), rtol=1e-4
    )
    np.testing.assert_allclose(loss, info["flow/loss"] + info["source/loss"], rtol=1e-4)

    def likelihood(offset):
        field = jax.tree.map(lambda p: p, params["source"]["MLP_0"])
        last = max(name for name in field if name.startswith("Dense"))
        field[last] = field[last] | {"bias": field[last]["bias"] + offset}
        return source_loss({"MLP_0": field}, observations[INDEX], samples, WEIGHTS[INDEX])

    layers = gradient["source"]["MLP_0"]
    slope = layers[max(name for name in layers if name.startswith("Dense"))]["bias"]
    for i in range(8):
        step = 1e-2 * np.eye(8, dtype=np.float32)[i]
        np.testing.assert_allclose(slope[i], (likelihood(step) - likelihood(-step)) / 2e-2, rtol=2e-2, atol=1e-3)


@pytest.mark.check
@pytest.mark.parametrize("kind", ["standard", "noise", "action"])
def test_acting_starts_from_the_averaged_source(kind):
    """Actions are Euler samples from m̄ + κ σ̄ ε; so are those of V̂."""
    agent, key = (
        make_agent(otql, BATCH, 3, source=kind, noise_scale=0.4, flow_steps=3, value_samples=2, **SMALL),
        jax.random.key(5),
    )
    agent = agent.replace(targets=agent.targets | {"flow": jax.tree.map(lambda p: 0.3 * p, agent.targets["flow"])})
    learned, noise = kind != "standard", np.asarray(jax.random.normal(key, (2, 12, 4)))
    mean, deviation = source(agent.targets["source"], BATCH["observations"]) if learned else (0.0, 1.0)
    start = mean + 0.4 * deviation * noise
    repeated = np.tile(np.asarray(BATCH["observations"]), (2, 1, 1))
    expected = flow_sample(agent.targets["flow"], repeated, start, 3)
    assert np.mean(np.abs(expected) < 1) > 0.1
    _, actions = agent.candidates(BATCH["observations"], key, 2)
    np.testing.assert_allclose(actions, expected, atol=2e-4)
    value = critic(agent.params["critic"], repeated, expected).mean((0, 1))
    np.testing.assert_allclose(agent.values(BATCH, jax.random.key(6), key)[1], value, rtol=1e-3, atol=1e-3)
    assert agent.nfe == 3


def test_td_target_starts_from_the_source():
    """QC with N = 1 bootstraps from Euler samples that start at the source."""
    agent, batch = make_agent(qc, BATCH, 5, source="action", best_of_n=1, flow_steps=2, **SMALL), as_float64(BATCH)

    def expected(params, draws):
        mean, deviation = source(agent.targets["source"], batch["next_observations"])
        actions = flow_sample(agent.targets["flow"], batch["next_observations"], mean + deviation * draws[0][0], 2)
        next_qs = critic(agent.targets["critic"], batch["next_observations"], actions)
        mean, deviation = source(agent.targets["source"], batch["observations"])
        start = mean + deviation * draws[1]
        error = flow_error(params["flow"], batch["observations"], batch["actions"], start, draws[2])
        td = td_loss(critic(params["critic"], batch["observations"], batch["actions"]), next_qs, batch, agent)
        own = source_loss(params["source"], batch["observations"], batch["actions"], WEIGHTS)
        return td + np.mean(WEIGHTS * error**2) + own

    check_loss_and_gradient(agent, BATCH, expected, directions=1)


def test_noise_scale_is_not_in_the_training_noise():
    """BC's loss is the same at any noise_scale."""
    losses = [
        agent.loss(agent.params, BATCH, jax.random.key(0))[0]
        for agent in (make_agent(bc, BATCH, source="action", noise_scale=scale, **SMALL) for scale in (1.0, 0.5))
    ]
    assert losses[0] == losses[1]


def test_one_step_policies_take_the_noise_scale():
    """FQL acts from κ z and is distilled from z."""
    whole, half = (make_agent(fql, BATCH, 3, noise_scale=scale) for scale in (1.0, 0.5))
    noise = jax.random.normal(jax.random.key(2), (12, 4))
    expected = jnp.clip(half.apply("one_step", BATCH["observations"], 0.5 * noise), -1, 1)
    np.testing.assert_allclose(half.propose(BATCH["observations"], jax.random.key(2)), expected, atol=1e-5)
    losses = [agent.distill_loss(agent.params, BATCH, jax.random.key(3))[0] for agent in (whole, half)]
    assert losses[0] == losses[1]


def test_updates_average_the_source():
    """The source's Polyak copy moves by flow_tau."""
    agent = make_agent(bc, BATCH, source="action", flow_tau=0.25, **SMALL)
    new, _ = jax.jit(lambda agent: agent.update(BATCH))(agent)
    assert not np.allclose(jax.tree.leaves(new.params["source"])[0], jax.tree.leaves(agent.params["source"])[0])
    expected = jax.tree.map(lambda p, t: 0.25 * p + 0.75 * t, new.params["source"], agent.targets["source"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new.targets["source"], expected)


def test_a_pre_trained_flow_brings_its_source():
    """Without a source the flow started at N(0, I), and so does the agent's; with one, the agent goes on from it."""
    config = otql.get_config()
    config.update({"source": "action", "actor_hidden_dims": (8,), "value_hidden_dims": (8,), "num_qs": 2, **SMALL})
    agent = otql.Agent.create(0, BATCH, config)
    trained = make_agent(otql, BATCH, 6, source="action", actor_hidden_dims=(8,), **SMALL)
    plain = agent.with_flow(trained.targets["flow"])
    np.testing.assert_array_equal(plain.source(BATCH["observations"])[0], np.zeros((12, 4)))
    both = agent.with_flow(trained.targets["flow"], trained.targets["source"])
    for part in (both.params, both.targets):
        jax.tree.map(np.testing.assert_array_equal, part["source"], trained.targets["source"])
        jax.tree.map(np.testing.assert_array_equal, part["flow"], trained.targets["flow"])


@pytest.mark.check
@pytest.mark.parametrize("module", [bc, ewfm, otql])
def test_shortcut_targets_are_of_the_averaged_flow(monkeypatch, module):
    """The loss gets v at `params` for all rows, and v̄ of the Polyak copy at the first quarter's observations."""
    agent, seen = make_agent(module, BATCH, 3, targets="shortcut"), {}

    def shortcut_loss(field, average, key, noise, actions, weights):
        rows, t = jnp.full((12, 1), 0.25), jnp.full((12, 1), 0.5)
        seen.update(
            observations=BATCH["observations"], field=field(noise, rows, t), noise=noise, weights=weights,
            average=average(noise[:3], rows[:3], t[:3]),
        )  # fmt: skip
        return jnp.zeros(())

    monkeypatch.setattr(base, "shortcut_loss", shortcut_loss)
    index = np.arange(12)
    if module is otql:
        index = INDEX
        monkeypatch.setattr(otql, "couple", lambda key, actions, *_, **__: (0.5 * actions, jnp.asarray(INDEX), {}))
    agent.loss(agent.params, BATCH, jax.random.key(0))
    observations, noise = np.asarray(BATCH["observations"])[index], np.asarray(seen["noise"])
    times = np.tile([0.25, 0.5], (12, 1))
    np.testing.assert_allclose(
        seen["field"], velocity(agent.params["flow"], observations, noise, times), rtol=1e-3, atol=1e-4
    )
    expected = velocity(agent.targets["flow"], observations[:3], noise[:3], times[:3])
    np.testing.assert_allclose(seen["average"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("steps", "h"), [(1, 1.0), (2, 0.5), (3, 1 / 3), (8, 0.125), (10, 0.125)])
def test_shortcut_flows_act_with_the_size_of_their_step(steps, h):
    """v̄(x, t, 1/n), and not below the smallest step that training sees."""
    agent = make_agent(bc, BATCH, 1, targets="shortcut", flow_steps=steps)
    agent = agent.replace(targets=jax.tree.map(lambda p: 0.3 * p, agent.targets))
    x = np.random.default_rng(3).normal(size=(12, 4))
    noise = jnp.asarray(x, jnp.float32)
    for i in range(steps):
        times = np.tile([i / steps, h], (12, 1))
        x = x + velocity(agent.targets["flow"], np.asarray(BATCH["observations"]), x, times) / steps
    assert np.mean(np.abs(x) < 1) > 0.1
    np.testing.assert_allclose(agent.flow_actions(BATCH["observations"], noise), np.clip(x, -1, 1), atol=2e-4)


def test_images_reach_the_source_by_an_encoder_of_its_own():
    """The likelihood trains the source's encoder; the flow's loss does not."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (12, 1, 16, 16, 3)), jnp.uint8)
    batch = BATCH | {k: Observation(BATCH[k], images) for k in ("observations", "next_observations")}
    for kind, targets in (("noise", "velocity"), ("action", "shortcut")):
        agent = make_agent(
            otql, batch, source=kind, targets=targets, encoder="impala_tiny", image_components=2, **SMALL
        )
        gradient = jax.jit(jax.grad(lambda params, agent=agent: agent.loss(params, batch, jax.random.key(0))[0]))
        found = gradient(agent.params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
        assert np.abs(jax.tree.leaves(found["source"]["encoder"])[0]).max() > 0


@pytest.mark.parametrize(
    ("module", "values", "message"),
    [
        (otql, {"source": "nois"}, "did you mean --agent.source=noise"),
        (otql, {"source": "noise", "coupling": "independent"}, "N\\(0, I\\) at every state"),
        (bc, {"source": "noise"}, "N\\(0, I\\) at every state"),
        (ewfm, {"targets": "shortcuts"}, "did you mean --agent.targets=shortcut"),
        (otql, {"noise_scale": "0"}, "greater than 0"),
        (fql, {"source": "action"}, "no setting 'source'"),
        (otql, {"epsilon": "2"}, "epsilon has no effect: preset cpu has coupling=independent; add --agent.coupling=ot"),
    ],
)
def test_mistakes_end_in_one_line(module, values, message):
    with pytest.raises(UserError, match=message):
        resolve_config(module, "scene", "cpu", values)


def test_the_cpu_preset_starts_from_the_actions():
    config = resolve_config(otql, "scene", "cpu", {})[0]
    assert (config.source, config.coupling) == ("action", "independent")
    config = resolve_config(otql, "scene", "cpu", {"coupling": "ot", "source": "standard", "epsilon": "2"})[0]
    assert (config.source, config.coupling, config.epsilon) == ("standard", "ot", 2.0)


def test_paper_settings_are_the_standard_source():
    for module in (otql, bc, ewfm, qc, fawac):
        config = resolve_config(module, "scene", "paper", {})[0]
        assert (config.source, config.targets, config.noise_scale) == ("standard", "velocity", 1.0)


# ---- the bandit


@pytest.fixture(scope="module")
def learned():
    """OTQL at λ = 3 on independent pairs from a source of actions, and with a sharp plan from one of its noise."""
    data, shared = bandit.make_data(), {"lam": [3.0], "w_max": [1000.0], "flow_steps": [2]}
    action = {"source": ["action"], "coupling": ["independent"]}
    noise = {"source": ["noise"], "epsilon": [0.05], "alpha": [0.1]}
    return {
        name: bandit.train(otql, data, 2000, **shared, **own)[0]
        for name, own in {"action": action, "noise": noise}.items()
    }


def test_a_source_of_actions_learns_their_tilted_moments(learned):
    """m(s) and σ(s) are mean and deviation of the data's modes at shares ∝ exp(λ value)."""
    contexts = bandit.fresh_contexts()
    shares = bandit.SHARES * np.exp(3.0 * bandit.VALUES)
    shares /= shares.sum()
    centres = bandit.modes(contexts)
    mean = np.einsum("abc,b->ac", centres, shares)
    deviation = np.sqrt(np.einsum("abc,b->ac", centres**2, shares) - mean**2 + bandit.SPREAD**2)
    found = [np.asarray(x) for x in learned["action"].source(contexts)]
    print("mean", np.abs(found[0] - mean).mean(), "deviation", np.abs(found[1] - deviation).mean(), deviation.mean())
    assert np.abs(found[0] - mean).mean() < 0.08
    assert np.abs(found[1] - deviation).mean() < 0.08


@pytest.mark.parametrize("name", ["action", "noise"])
def test_the_tilt_is_kept(learned, name):
    """Two steps from either start reach the best mode as often as the tilt says, 64 %; the data's share is 15 %."""
    contexts = bandit.fresh_contexts()
    share = bandit.mode_shares(contexts, bandit.act(learned[name], contexts))
    print(name, share.round(3))
    assert share[3] > 0.5
