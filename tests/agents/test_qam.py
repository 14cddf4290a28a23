"""QAM and its variants: losses and adjoints against NumPy, and what adjoint matching learns on a known bandit."""

import functools

import bandit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import check_loss_and_gradient, flow_error, flow_sample, loss_and_gradient, one_step, td_loss
from numpy_networks import as_float64, critic, make_agent, make_batch, mlp, velocity

from agents import base, qam, qam_e, qam_f
from utils.errors import UserError

BATCH = make_batch()
STEPS, TAU = 4, 1.5
VARIANTS = {"qam": {}, "qam_f": {"fql_alpha": 20.0}, "qam_e": {"edit_scale": 0.3}}


@functools.cache
def make(variant="qam"):
    """An agent whose samples are clipped in part."""
    agent = make_agent(qam, BATCH, **VARIANTS[variant], inv_temp=TAU, discount=0.9, flow_steps=STEPS)
    for name, scale in (("flow", 0.6), ("slow", 0.6), ("edit_actor", 0.6), ("one_step", 0.8)):
        for networks in (agent.params, agent.targets):
            if name in networks:
                networks[name] = jax.tree.map(lambda p, s=scale: s * p, networks[name])
    return agent


def euler_maruyama(agent, observations, noise):
    """x_0 … x_{T−1} and x_T for x_0 = noise[0] and ξ_i = noise[i + 1]."""
    steps = len(noise)
    h, x, path = 1 / steps, noise[0], []
    for i in range(steps):
        t = np.full((*x.shape[:-1], 1), i * h)
        path.append(x)
        if i == steps - 1:
            return np.stack(path), x + h * velocity(agent.targets["slow"], observations, x, t)
        drift = 2 * velocity(agent.params["flow"], observations, x, t) - x / (t + h)
        x = x + h * drift + np.sqrt(h) * np.sqrt(2 * (1 - t + h) / (t + h)) * noise[i + 1]


def gradients_of_value(agent, observations, path, last, tau):
    """∂/∂x_i of −τ Q̄(clip x_T), by differences, for x moved off the path and then kept on the drift of the base."""
    steps, slow = len(path), as_float64(agent.targets["slow"])

    def value(i, shift):
        for k in range(i, steps):
            t = np.full((*shift.shape[:-1], 1), (k + 1) / steps)
            drift = [2 * velocity(slow, observations, x, t) - x / t for x in (path[k] + shift, path[k])]
            shift = shift + (drift[0] - drift[1]) / steps
        return -tau * critic(agent.targets["critic"], observations, np.clip(last + shift, -1, 1)).mean(0)

    moves = 1e-6 * np.eye(path.shape[-1])
    return np.stack(
        [
            np.stack([(value(i, 0 * last + move) - value(i, 0 * last - move)) / 2e-6 for move in moves], axis=-1)
            for i in range(steps)
        ]
    )


def test_adjoints_are_gradients_along_the_linearised_path():
    """g_i is the gradient of −τ Q̄(clip x_T) with respect to x_i, through Euler steps of the base drift alone."""
    agent, rng = make(), np.random.default_rng(0)
    path, last = 0.8 * rng.normal(size=(STEPS, 12, 4)), rng.normal(size=(12, 4))
    adjoints = jax.jit(lambda *inputs: agent.adjoints(BATCH["observations"], *inputs))(*map(jnp.float32, (path, last)))
    expected = gradients_of_value(agent, np.asarray(BATCH["observations"]), path, last, TAU)
    assert 0.1 < np.mean(np.abs(last) > 1) < 0.9  # some are clipped, others not
    np.testing.assert_allclose(adjoints, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.check
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_equal_numpy(variant):
    """TD, BC of v_slow, adjoint matching and the variant's loss; each network learns from its own loss alone."""
    agent, batch, fixed = make(variant), as_float64(BATCH), {}
    observations, actions, valid = batch["observations"], batch["actions"], batch["valid"]

    def edit(params, observations, actions, noise):
        (actor,) = params["edit_actor"].values()
        outputs = mlp(as_float64(actor), np.concatenate([observations, actions], axis=-1), False)
        mean, log_std = outputs[..., :4], np.clip(outputs[..., 4:], -20, 2)
        u = mean + np.exp(log_std) * noise
        # log(1 − tanh²u) = 2 log 2 − 2 log(2 cosh u)
        log_prob = -0.5 * (noise**2 + np.log(2 * np.pi)) - log_std - 2 * (np.log(2) - np.logaddexp(u, -u))
        return np.clip(actions + 0.3 * np.tanh(u), -1, 1), log_prob.sum(-1)

    def act(params, observations, draws):
        noise = draws.pop(0)
        if variant == "qam_f":
            return np.clip(one_step(params["one_step"], observations, noise), -1, 1)
        sample = flow_sample(agent.targets["flow"], observations, noise, STEPS)
        return edit(params, observations, sample, draws.pop(0))[0] if variant == "qam_e" else sample

    def expected(params, draws):
        draws = list(draws)
        next_actions = act(as_float64(agent.params), batch["next_observations"][None], draws)[0]
        next_qs = critic(agent.targets["critic"], batch["next_observations"], next_actions)
        loss = td_loss(critic(params["critic"], observations, actions), next_qs, batch, agent)
        error = flow_error(params["slow"], observations, actions, draws.pop(0), draws.pop(0))
        loss += np.mean(valid[:, None] * batch["action_mask"] * error**2)

        noise, h = draws.pop(0), 1 / STEPS
        if not fixed:
            path, fixed["last"] = euler_maruyama(agent, observations, noise)
            fixed.update(path=path, adjoints=gradients_of_value(agent, observations, path, fixed["last"], TAU))
        for i in range(STEPS):
            x, t = fixed["path"][i], np.full((12, 1), i * h)
            sigma = np.sqrt(2 * (1 - i * h + h) / (i * h + h))
            gap = velocity(params["flow"], observations, x, t) - velocity(agent.targets["slow"], observations, x, t)
            loss += np.sum(valid[:, None] * (2 / sigma * gap + sigma * fixed["adjoints"][i]) ** 2) / 12

        if variant == "qam_f":
            noise = draws.pop(0)
            proposals = one_step(params["one_step"], observations, noise)
            assert 0.1 < np.mean(np.abs(proposals) > 1) < 0.9
            distance = proposals - flow_sample(agent.targets["flow"], observations, noise, STEPS)
            loss += 20 * np.mean(valid[:, None] * distance**2)
            loss -= np.mean(valid * critic(agent.params["critic"], observations, np.clip(proposals, -1, 1)).mean(0))
        if variant == "qam_e":
            sample = flow_sample(agent.targets["flow"], observations, draws.pop(0), STEPS)
            noise, own = draws.pop(0), as_float64(agent.params)
            edited, log_prob = edit(params, observations, sample, noise)
            q = critic(own["critic"], observations, edited).mean(0)
            loss += np.mean(valid * (np.exp(own["temperature"]["log_value"]) * log_prob - q))
            surplus = -edit(own, observations, sample, noise)[1] - -0.5 * 4
            loss += np.exp(params["temperature"]["log_value"]) * np.mean(valid * surplus)
        return loss

    check_loss_and_gradient(agent, BATCH, expected)
    assert 0.1 < np.mean(np.abs(fixed["last"]) > 1) < 0.9


def test_policy_loss_vanishes_at_the_base():
    """Without Q the loss of v_fast is zero, with its gradient, where v_fast = v̄_slow; not elsewhere, nor with Q."""

    def at(agent):
        _, info, gradient, _ = loss_and_gradient(agent, BATCH, jax.random.key(3))
        return info["flow/loss"], max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient["flow"]))

    for tau, same, least in ((0.0, True, 0.0), (0.0, False, 0.1), (TAU, True, 0.1)):
        agent = make().replace(hyper=make().hyper | {"inv_temp": jnp.float32(tau)})
        agent = agent.replace(params=agent.params | {"flow": agent.targets["slow"]}) if same else agent
        for value in at(agent):
            assert value >= least
            # v_fast is evaluated along the whole path at once, v̄_slow too, and rounds as the compiler likes.
            assert least or value < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_valid_window_trains_nothing(variant):
    """A batch of invalid windows has zero loss and zero gradient."""
    loss, _, gradient, _ = loss_and_gradient(make(variant), BATCH | {"valid": jnp.zeros(12)}, jax.random.key(3))
    assert loss == 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_variants_have_the_networks_that_they_use():
    """None but the variant's own are created; both at once are refused in one line."""
    own = {"qam": set(), "qam_f": {"one_step"}, "qam_e": {"edit_actor", "temperature"}}
    for (variant, networks), evaluations in zip(own.items(), (STEPS, 1, STEPS + 1), strict=True):
        agent = make(variant)
        assert set(agent.params) == {"critic", "flow", "slow"} | networks
        assert set(agent.targets) == {"critic", "flow", "slow"}
        assert agent.nfe == evaluations
    with pytest.raises(UserError, match="exclude"):
        make_agent(qam, BATCH, fql_alpha=1.0, edit_scale=0.1)
    assert qam.Agent.TARGETS == base.Agent.TARGETS | {"slow": "tau"}


def test_the_two_flows_start_apart():
    """v_fast has an initialisation of its own; the Polyak copy of v_slow starts as v_slow."""
    config = qam.get_config()
    config.update({"actor_hidden_dims": (8, 8), "value_hidden_dims": (8, 8), "num_qs": 3})
    agent = qam.Agent.create(jax.random.key(0), BATCH, config)
    jax.tree.map(np.testing.assert_array_equal, agent.params["slow"], agent.targets["slow"])
    flows = [jax.tree.leaves(agent.params[name]) for name in ("flow", "slow")]
    assert max(np.abs(a - b).max() for a, b in zip(*flows, strict=True)) > 0.1


def test_a_pre_trained_flow_takes_the_place_of_both():
    """And of their averages: without Q the policy then is what it was."""
    agent = make("qam")
    flow = jax.tree.map(lambda leaf: leaf + 1, agent.params["flow"])
    begun = agent.with_flow(flow)
    for flows in (begun.params, begun.targets):
        for name in ("flow", "slow"):
            jax.tree.map(np.testing.assert_array_equal, flows[name], flow)
        jax.tree.map(np.testing.assert_array_equal, begun.params["critic"], agent.params["critic"])


def test_gradients_of_all_networks_are_clipped_together():
    """Adam sees the gradient scaled to a global norm of 1, or as it is below that."""
    for scale, expected in ((10.0, [0.6, 0.8]), (0.1, [0.3, 0.4])):
        gradient = {"critic": jnp.float32(3 * scale), "flow": jnp.float32(4 * scale)}
        _, (_, adam) = qam.Agent.OPTIMISER.update(gradient, qam.Agent.OPTIMISER.init(gradient))
        np.testing.assert_allclose([adam.mu["critic"], adam.mu["flow"]], 0.1 * np.array(expected), rtol=1e-5)


def test_presets_are_published():
    """τ of QAM; τ and α of QAM-F; τ and edit scale of QAM-E."""
    published = {
        "puzzle-3x3": [3, 3, 0, 1, 0.1],
        "puzzle-4x4": [30, 3, 3, 0.1, 0.9],
        "scene": [1, 1, 300, 1, 0],
        "cube-double": [1, 1, 0, 1, 0],
        "cube-triple": [3, 10, 300, 3, 0.1],
        "cube-quadruple": [1, 0.3, 30, 3, 0.1],
        "antmaze-large": [10, 3, 30, 1, 0.1],
        "antmaze-giant": [3, 3, 30, 10, 0.1],
        "humanoidmaze-medium": [3, 1, 30, 3, 0.1],
        "humanoidmaze-large": [3, 0.3, 30, 3, 0.1],
    }
    for domain, expected in published.items():
        plain, fast, edited = (module.PRESETS[domain] for module in (qam, qam_f, qam_e))
        found = [plain["inv_temp"], fast["inv_temp"], fast["fql_alpha"], edited["inv_temp"], edited["edit_scale"]]
        assert found == expected, domain
        assert not {"fql_alpha", "edit_scale"} & set(plain)


# ---- the bandit


@pytest.fixture(scope="module")
def learned():
    """Actions of v_fast and of its one-step policy, at τ = 0 and at τ = 30, on fresh contexts."""
    taus = {"clone": 0.0, "tilted": 30.0}
    same = {"fql_alpha": [100.0] * 2, "flow_steps": [10] * 2, "tau": [0.02] * 2}
    agents = bandit.train(qam, bandit.make_data(), 800, inv_temp=list(taus.values()), **same)
    contexts = bandit.fresh_contexts()
    noise = jax.random.normal(jax.random.key(5), contexts.shape)

    @jax.jit
    def act(agent):
        return agent.flow_actions(contexts, noise), jnp.clip(agent.apply("one_step", contexts, noise), -1.0, 1.0)

    return {name: act(agent) for name, agent in zip(taus, agents, strict=True)}, contexts


def test_without_q_adjoint_matching_is_the_data(learned):
    """At τ = 0 v_fast, which never sees an action of the data, has come to their shares by way of v_slow."""
    actions, contexts = learned
    shares = [bandit.mode_shares(contexts, own) for own in actions["clone"]]
    print("τ = 0, v_fast and one step:", *(s.round(3) for s in shares))
    for share in shares:
        np.testing.assert_allclose(share, bandit.SHARES, atol=0.08)


def test_with_q_the_best_mode_wins(learned):
    """At τ = 30 the tilt exp(τ Q) leaves the best mode all but 1e-5 of the mass: v_fast is nearest to it nearly always.

    The tilted flow also stays near the data, if less closely than they do.
    """
    actions, contexts = learned
    for name, own in zip(("v_fast", "one step"), actions["tilted"], strict=True):
        shares, close = bandit.mode_shares(contexts, own), bandit.mode_shares(contexts, own, radius=0.4)
        print("τ = 30,", name, shares.round(3), close.round(3))
        assert shares[3] >= 0.9
        assert close[3] >= 0.4
