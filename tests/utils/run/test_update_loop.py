"""The fused loop: which batches an agent sees, and that neither placement, calls nor other runs change the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorder_agent import BATCH, HORIZON, Recorder

from agents import otql
from utils.data.batches import assemble, gather, prepare, sample_starts
from utils.data.replay_buffer import ReplayBuffer
from utils.rollout.policy import act
from utils.run.update_loop import UpdateLoop, _train_on_device, capped_warning
from utils.trees import tree_slice, tree_stack


@pytest.fixture(scope="module")
def data():
    """Random episodes, a few of them ended by a termination."""
    rng, episodes, length = np.random.default_rng(0), 20, 12
    size = episodes * length
    terminals, masks = np.tile(np.arange(length) == length - 1, episodes), np.ones(size)
    masks[length - 2 :: 3 * length] = 0
    arrays = {
        "observations": rng.normal(size=(size, 3)),
        "actions": rng.uniform(-1, 1, (size, 2)),
        "rewards": rng.normal(size=size),
        "masks": masks,
        "terminals": terminals,
    }
    return prepare({k: v.astype(np.float32) for k, v in arrays.items()}, True)


@pytest.mark.check
@pytest.mark.parametrize("placement", ["device", "host"])
def test_batches_are_a_function_of_key_and_step(data, placement):
    """Every update of every lane sees the windows drawn by its key at its step, with its own discount."""
    keys = jax.random.split(jax.random.PRNGKey(3), 2)
    trainer = UpdateLoop(keys, placement)
    trainer.set_data(data)
    agents = tree_stack([Recorder.create(0.9, 25), Recorder.create(0.5, 25)])
    agents, first = trainer.run(agents, 0, 7)
    agents, second = trainer.run(agents, 7, 18)
    assert np.array_equal(agents.step, [25, 25])
    for i, discount in enumerate((0.9, 0.5)):
        for step in range(25):
            start = data["starts"][np.asarray(sample_starts(keys[i], step, BATCH, len(data["starts"])))]
            expected = assemble(gather(data, start, HORIZON), jnp.float32(discount), "pad")
            for name, value in expected.items():
                np.testing.assert_allclose(agents.batches[name][i, step], value, rtol=1e-6, atol=1e-6)
    sums = np.asarray(agents.batches["rewards"]).sum(-1)
    np.testing.assert_allclose(first["sum"], sums[:, :7].mean(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(second["sum"], sums[:, 7:].mean(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(second["step"], [15.5, 15.5], rtol=1e-5)


@pytest.fixture(scope="module")
def small_agent(data):
    """(seed, other float settings) → a small OTQL agent that uses every part of an update."""
    config = otql.get_config()
    config.update({"actor_hidden_dims": (16,), "value_hidden_dims": (16,), "num_qs": 2, "batch_size": BATCH})
    config.update({"horizon_length": HORIZON, "best_of_n": 2, "value_samples": 1, "lr": 1e-2, "max_iterations": 10})
    example = assemble(gather(data, data["starts"], HORIZON), 1.0, "drop")
    agents = [otql.Agent.create(jax.random.PRNGKey(seed), example, config) for seed in range(2)]

    def make(seed=0, **changes):
        hyper = agents[seed].hyper | {k: jnp.float32(v) for k, v in changes.items()}
        return agents[seed].replace(hyper=hyper)

    return make


def trained(data, agents, calls, seeds=(0,), placement="device"):
    """The agents after the given numbers of updates a call, as NumPy arrays, and the last info."""
    trainer, step, agents = (
        UpdateLoop(jnp.stack([jax.random.PRNGKey(s) for s in seeds]), placement),
        0,
        tree_stack(agents),
    )
    trainer.set_data(data)
    for count in calls:
        agents, info = trainer.run(agents, step, count)
        step += count
    return jax.tree.map(np.asarray, agents), info


def leaves(agent):
    """All trained state of an agent."""
    return jax.tree.leaves((agent.params, agent.targets, agent.opt_state))


def test_calls_do_not_change_the_numbers(data, small_agent):
    """30 updates in one call equal 10 and then 20, bit for bit, and they train."""
    whole, info = trained(data, [small_agent()], [30])
    parts, _ = trained(data, [small_agent()], [10, 20])
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert all(np.isfinite(leaf).all() for leaf in leaves(whole))
    assert np.isfinite(info["flow/loss"]).all()
    initial = jax.tree.leaves(small_agent().params)
    assert all(
        np.abs(new[0] - old).max() > 1e-3 for new, old in zip(jax.tree.leaves(whole.params), initial, strict=True)
    )


def test_host_and_device_give_the_same_agent(data, small_agent):
    """Batches gathered on the host, 27 updates in uneven calls, give the agent of the device bit for bit."""
    device, info = trained(data, [small_agent()], [4, 23])
    host, host_info = trained(data, [small_agent()], [4, 23], placement="host")
    jax.tree.map(np.testing.assert_array_equal, device, host)
    for name, value in info.items():
        np.testing.assert_allclose(host_info[name], value, rtol=1e-4, atol=1e-6)


def test_packed_state_gives_the_same_numbers(data, small_agent, monkeypatch):
    """On a GPU, the loop's small arrays are one vector: the agent and its infos are the same."""
    expected, info = trained(data, [small_agent()], [4])
    jax.clear_caches()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    agent, packed_info = trained(data, [small_agent()], [4])
    jax.clear_caches()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), agent, expected)
    for name, value in info.items():
        np.testing.assert_allclose(packed_info[name], value, rtol=1e-4, atol=1e-6)


@pytest.fixture(params=["cpu", "gpu"])
def backend(request, monkeypatch):
    """Lanes are mapped as on this kind of device."""
    jax.clear_caches()
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    yield request.param
    jax.clear_caches()


@pytest.mark.parametrize("placement", ["device", "host"])
def test_stacked_runs_equal_single_runs(data, small_agent, backend, placement):
    """Two seeds and two λ side by side give what each gives alone (on a processor to the bit), and not the other's."""
    settings = [{"seed": 0, "lam": 0.5}, {"seed": 1, "lam": 3.0}, {"seed": 0, "lam": 3.0}]
    agents = [small_agent(**s) for s in settings]
    alone = [
        tree_slice(trained(data, [agent], [3], (s["seed"],))[0], 0) for agent, s in zip(agents, settings, strict=True)
    ]
    seeds = trained(data, agents[:2], [3], (0, 1), placement)[0]
    lams = trained(data, agents[::2], [3], (0, 0), placement)[0]
    for side_by_side, singles in ((seeds, alone[:2]), (lams, alone[::2])):
        for i, single in enumerate(singles):
            for a, b in zip(leaves(tree_slice(side_by_side, i)), leaves(single), strict=True):
                np.testing.assert_allclose(a, b, atol=0 if backend == "cpu" else 1e-4)
    for other in (alone[1], alone[2]):  # three updates at this rate move parameters by up to 0.03
        assert max(np.abs(a - b).max() for a, b in zip(leaves(alone[0]), leaves(other), strict=True)) > 3e-3


def test_settings_of_type_float_do_not_recompile(data, small_agent):
    """Other values of λ, the learning rate, α, ε or the number of updates use the program that is there."""
    trained(data, [small_agent()], [2])
    before = _train_on_device._cache_size()
    trained(data, [small_agent(lam=7.0, lr=1e-3, alpha=0.1, epsilon=0.3, discount=0.5, rho=0.0)], [5])
    assert _train_on_device._cache_size() == before


def test_actions_do_not_depend_on_the_batch(data, small_agent):
    """An evaluation row's action is a function of (key, episode, chunk) and its observation."""
    agents = tree_stack([small_agent(seed=s) for s in (0, 1)])
    observations = jnp.asarray(data["observations"][:4])
    episodes, chunks, key = jnp.array([0, 1, 1, 5]), jnp.array([0, 0, 3, 0]), jax.random.PRNGKey(5)
    actions = np.asarray(act(agents, 1, observations, key, episodes, chunks))
    order = np.array([2, 0, 3, 1])
    shuffled = act(agents, 1, observations[order], key, episodes[order], chunks[order])
    np.testing.assert_allclose(shuffled, actions[order], atol=1e-5)
    same = act(agents, 1, observations[:1].repeat(4, 0), key, episodes, chunks)
    assert len(np.unique(np.round(same, 5), axis=0)) == 4
    assert np.abs(act(agents, 0, observations, key, episodes, chunks) - actions).max() > 1e-2


def numbered(first, episodes=6, length=7):
    """Prepared episodes whose observations are numbers of rows, from `first` on."""
    size = episodes * length
    arrays = {"observations": np.repeat(first + np.arange(size)[:, None], 3, 1), "actions": np.zeros((size, 2))}
    arrays |= {"rewards": np.zeros(size), "masks": np.ones(size), "terminals": np.arange(size) % length == length - 1}
    return prepare({k: v.astype(np.float32) for k, v in arrays.items()}, True)


@pytest.mark.parametrize("mode", ["offline", "balanced", "uniform"])
def test_every_window_is_drawn(mode):
    """From the oldest to the newest, and rows of the experience are not at the places of those of the dataset."""
    data, own, updates = numbered(0), numbered(1000), 40
    trainer = UpdateLoop(jax.random.PRNGKey(4)[None])
    trainer.set_data(data)
    agents = tree_stack([Recorder.create(0.9, updates)])
    if mode == "offline":
        agents, _ = trainer.run(agents, 0, updates)
    else:
        size = len(own["rewards"])
        experience = {k: jnp.asarray(np.resize(v, (1, size, *v.shape[1:]))) for k, v in own.items()}
        replay = ReplayBuffer(1, updates, 1, np.zeros(3, np.float32), 2)
        replay.arrays, replay.counts[:] = experience, len(own["starts"])
        agents, _ = trainer.run_online(agents, replay, updates, mode == "balanced")
    seen = np.asarray(agents.batches["observations"])[0, :, :, 0].astype(int)
    expected = set(data["starts"].tolist()) | ({1000 + int(s) for s in own["starts"]} if mode != "offline" else set())
    assert set(seen.ravel()) == expected
    assert len(np.unique(seen, axis=0)) == updates
    if mode == "balanced":
        from_data, from_experience = seen[:, : BATCH // 2], seen[:, BATCH // 2 :] - 1000
        assert from_data.max() < 1000 and from_experience.min() >= 0
        assert 0 < np.mean(from_data == from_experience) < 0.1


@pytest.mark.parametrize(("share", "warns"), [(0.0, False), (0.05, False), (0.06, True), (1.0, True), (None, False)])
def test_warning_of_capped_couplings(share, warns):
    """From more than one in twenty on; agents without a coupling have nothing to warn of."""
    info = {"flow/loss": 1.0} | ({} if share is None else {"coupling/capped": share, "coupling/marginal_error": 0.04})
    assert bool(capped_warning(info)) == warns
