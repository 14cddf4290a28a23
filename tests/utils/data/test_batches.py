"""Batches: windows against a plain-Python reading of the rules, and how they are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from utils.data.batches import assemble, example_batch, gather, prepare, sample_starts

DISCOUNT = 0.9


def trajectories(lengths, masks, seed=0):
    """State-ordered rows of episodes of the given lengths; masks are 0 at the given rows."""
    rng, size = np.random.default_rng(seed), sum(lengths)
    terminals, alive = np.zeros(size, np.float32), np.ones(size, np.float32)
    terminals[np.cumsum(lengths) - 1] = 1
    alive[masks] = 0
    return {
        "observations": rng.normal(size=(size, 3)).astype(np.float32),
        "actions": rng.normal(size=(size, 2)).astype(np.float32),
        "rewards": rng.normal(size=size).astype(np.float32),
        "masks": alive,
        "terminals": terminals,
    }


# Three episodes, of rows 0-6, 7-11 and 12-20. In PLAY, states 3 and 4 and the second episode's last are solved, and
# play goes on. In ONLINE, the first episode ends by termination (mask 0 on its last transition, row 5), the second by
# the time limit, the third by termination.
LENGTHS = [7, 5, 9]
PLAY = trajectories(LENGTHS, [3, 4, 11])
ONLINE = trajectories(LENGTHS, [5, 19])


def reference(data, start, horizon, terminates, rule):
    """One window, step by step."""
    actions, mask, reward, valid, count = [], [], 0.0, 1.0, 0
    alive = 1.0
    for i in range(horizon):
        row = start + i
        if data["terminals"][row]:
            # The episode ended before this step: by a termination in its last transition, or by its time limit.
            terminated = terminates and data["masks"][row - 1] == 0
            valid = float(terminated and rule == "pad")
            break
        actions.append(data["actions"][row])
        reward += DISCOUNT**i * data["rewards"][row]
        alive = min(alive, data["masks"][row])
        count += 1
    mask = [1.0] * count + [0.0] * (horizon - count)
    actions += [actions[-1]] * (horizon - count)
    return {
        "observations": data["observations"][start],
        "actions": np.concatenate(actions),
        "rewards": reward,
        "masks": alive,
        "next_observations": data["observations"][min(start + horizon, len(data["observations"]) - 1)],
        "valid": valid,
        "action_mask": np.repeat(mask, 2),
    }


@pytest.mark.check
@pytest.mark.parametrize("horizon", [1, 3, 5, 8])
@pytest.mark.parametrize("rule", ["pad", "drop"])
@pytest.mark.parametrize(("data", "terminates"), [(PLAY, False), (ONLINE, True)], ids=["play", "online"])
def test_every_window_equals_the_reference(data, terminates, rule, horizon):
    """All fields of all windows, from NumPy and from JAX arrays bit for bit the same."""
    prepared = prepare(data, terminates)
    starts = [t for t in range(21) if not data["terminals"][t]]
    assert np.array_equal(prepared["starts"], starts)
    batch = assemble(gather(prepared, prepared["starts"], horizon), DISCOUNT, rule)
    for i, start in enumerate(starts):
        for name, expected in reference(data, start, horizon, terminates, rule).items():
            np.testing.assert_allclose(batch[name][i], expected, atol=1e-6, err_msg=f"{name} of {start}")

    on_device = jax.tree.map(jnp.asarray, prepared)
    again = assemble(gather(on_device, on_device["starts"], horizon), DISCOUNT, rule)
    jax.tree.map(np.testing.assert_array_equal, batch, again)


def window(data, terminates, start, horizon, rule="pad"):
    """One window as a dict of NumPy arrays."""
    rows = gather(prepare(data, terminates), np.array([start]), horizon)
    return {k: np.asarray(v)[0] for k, v in assemble(rows, DISCOUNT, rule).items()}


def test_success_in_the_middle_of_play():
    """Offline, a solved state ends nothing: the window is whole and its rewards keep summing, without a bootstrap."""
    before, across, after = (window(PLAY, False, start, 3) for start in (0, 1, 4))
    assert (before["masks"], across["masks"], after["masks"]) == (1, 0, 0)  # s_{t+H} = s_3 itself does not count
    assert across["valid"] == 1
    assert np.all(across["action_mask"] == 1)
    assert np.array_equal(across["actions"], PLAY["actions"][1:4].ravel())
    np.testing.assert_allclose(across["rewards"], PLAY["rewards"][1:4] @ DISCOUNT ** np.arange(3), rtol=1e-6)
    assert np.array_equal(across["next_observations"], PLAY["observations"][4])


def test_time_limit():
    """A window across a time limit is no sample under either rule; the last whole one before it is."""
    for rule in ("pad", "drop"):
        assert [window(ONLINE, True, start, 3, rule)["valid"] for start in (7, 8, 9, 10)] == [1, 1, 0, 0]
        assert [window(PLAY, False, start, 3, rule)["valid"] for start in (3, 4, 5)] == [1, 0, 0]


def test_true_termination():
    """Online, 'pad' keeps the windows that see the termination, the last action held and masked; 'drop' does not."""
    for start, steps in ((3, 3), (4, 2), (5, 1)):
        kept, dropped = (window(ONLINE, True, start, 3, rule) for rule in ("pad", "drop"))
        assert (kept["valid"], kept["masks"], dropped["valid"]) == (1, 0, float(steps == 3))
        assert np.array_equal(kept["action_mask"], np.arange(6) < 2 * steps)
        assert np.array_equal(kept["actions"].reshape(3, 2)[steps:], np.tile(ONLINE["actions"][5], (3 - steps, 1)))
        np.testing.assert_allclose(
            kept["rewards"], ONLINE["rewards"][start:6] @ DISCOUNT ** np.arange(steps), rtol=1e-6
        )


def test_a_solved_last_state_is_no_termination_offline():
    """The same rows end by termination only where the data say that they terminate."""
    assert window(ONLINE, True, 4, 3)["valid"] == 1
    assert window(ONLINE, False, 4, 3)["valid"] == 0


def test_unknown_rule_is_refused():
    """A misspelt rule raises and names itself."""
    with pytest.raises(ValueError, match="padded"):
        window(PLAY, False, 0, 3, "padded")


def test_starts_are_drawn_uniformly():
    """Positions are uniform over `starts`, and a function of key and step alone."""
    keys = jax.random.split(jax.random.PRNGKey(0), 2)
    draw = jax.jit(jax.vmap(lambda step: sample_starts(keys[0], step, 64, 13)))
    positions = np.asarray(draw(jnp.arange(500)))
    assert positions.shape == (500, 64)
    assert scipy.stats.chisquare(np.bincount(positions.ravel(), minlength=13)).pvalue > 1e-3
    assert np.array_equal(positions[[7, 3]], draw(jnp.array([7, 3])))
    assert len(np.unique(positions, axis=0)) == 500
    assert not np.array_equal(positions[0], sample_starts(keys[1], 0, 64, 13))


def test_example_batch():
    """At most max_rows windows, spread over the whole dataset."""
    data = prepare(trajectories([50] * 40, []), False)
    batch = example_batch(data, 2, max_rows=100)
    rows = [int(np.flatnonzero((data["observations"] == o).all(1))[0]) for o in np.asarray(batch["observations"])]
    assert 50 <= len(rows) <= 100
    assert min(rows) < 50 < 1900 < max(rows)
    assert len(example_batch(data, 2)["rewards"]) == len(data["starts"])


@pytest.mark.parametrize("horizon", [2, 5, 9])
@pytest.mark.parametrize("solved", [True, False])
def test_windows_at_the_end_of_the_file(horizon, solved):
    """A file of one episode keeps every window that sees the success; of one cut off, those that end in time."""
    data = prepare(trajectories([11], [9] if solved else []), True)
    assert np.array_equal(data["starts"], np.arange(10))
    for arrays in (data, jax.tree.map(jnp.asarray, data)):
        batch = assemble(gather(arrays, arrays["starts"], horizon), DISCOUNT, "pad")
        sees = np.arange(10) >= 10 - horizon
        assert np.array_equal(batch["masks"] == 0, sees & solved)
        assert np.array_equal(batch["valid"] == 1, (np.arange(10) <= 10 - horizon) | solved)
        executed = np.asarray(batch["action_mask"])[:, ::2].sum(axis=1)
        assert np.array_equal(executed[solved * sees], np.minimum(10 - np.arange(10), horizon)[solved * sees])
        # The same window of a longer file.
        longer = trajectories([11, 20], [9] if solved else [])
        longer = prepare({k: np.concatenate([np.asarray(data[k]), v[11:]]) for k, v in longer.items()}, True)
        other = assemble(gather(longer, data["starts"], horizon), DISCOUNT, "pad")
        for name in ("actions", "rewards", "masks", "valid", "action_mask"):
            np.testing.assert_array_equal(np.asarray(batch[name]), np.asarray(other[name]), err_msg=name)


def test_the_last_row_ends_an_episode_whatever_the_file_says():
    data = trajectories([6], [])
    data["terminals"][-1] = 0
    batch = assemble(gather(prepare(data, True), np.arange(5), 3), DISCOUNT, "pad")
    assert np.array_equal(batch["valid"], [1, 1, 1, 0, 0]) and data["terminals"][-1] == 0
