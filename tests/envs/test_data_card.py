"""The data card, and the file that a user's loop writes."""

import numpy as np
import pytest

from envs.datasets import load_dataset
from envs.tasks import parse_task

pytestmark = pytest.mark.check

ROBOT = parse_task("robot:arm")


def loop(outcomes, length=6, seed=0):
    """Rows of a loop `observation, action, reward, terminated`; outcome: reward of an episode's last step."""
    random, count = np.random.default_rng(seed), len(outcomes) * length
    last = np.arange(count) % length == length - 1
    return {
        "observations": random.normal(size=(count, 3)),
        "actions": random.uniform(-1, 1, (count, 2)),
        "rewards": np.where(last, np.repeat(outcomes, length), 0.0),
        "terminals": last,
    }


@pytest.fixture
def load(tmp_path):
    """Returns a function that writes arrays and gives the dataset and its card."""

    def write_and_load(sparse=False, **arrays):
        np.savez(tmp_path / "data.npz", **arrays)
        dataset, _, info = load_dataset(ROBOT, dataset_path=tmp_path / "data.npz", sparse=sparse)
        return dataset, info.card

    return write_and_load


def test_every_step_of_a_loop_is_trained_on(load):
    arrays = loop([14.0, 3.0])
    dataset, card = load(**arrays)
    followed = dataset["terminals"] == 0
    for name in ("observations", "actions", "rewards"):
        np.testing.assert_allclose(dataset[name][followed], arrays[name], rtol=1e-5)
    np.testing.assert_array_equal(np.flatnonzero(dataset["masks"] == 0), [5, 12])
    assert card.returns == (3, 8.5, 14) and card.lengths == (6, 6, 6) and card.transitions == 12
    assert card.unused == 0 and card.ends["truly terminated"] == 2 and card.warnings == ()


def test_masks_tell_terminations_from_time_limits(load):
    arrays = loop([14.0, 3.0, 5.0])
    masks = np.ones(18)
    masks[5] = 0
    dataset, card = load(**arrays, masks=masks)
    np.testing.assert_array_equal(np.flatnonzero(dataset["masks"] == 0), [5])
    assert card.returns == (0, pytest.approx(14 / 3), 14)
    assert (card.unused, card.unused_reward) == (2, 8)
    assert "2 transitions: no next observation recorded (sum of their rewards 8)" in "\n".join(card.lines())
    assert card.ends["truly terminated"] == 1 and card.ends["cut by a time limit"] == 2
    same, _ = load(**arrays | {"terminals": masks == 0, "timeouts": arrays["terminals"] * masks})
    for name, array in dataset.items():
        np.testing.assert_array_equal(array, same[name])


def test_an_unfinished_last_episode(load):
    arrays = {name: array[:-2] for name, array in loop([1.0, 1.0]).items()}
    dataset, card = load(**arrays)
    assert card.ends["cut by the end of the file"] == 1 and card.unused == 1
    assert len(dataset["rewards"]) == 11 and dataset["terminals"][-1] == 1


@pytest.mark.parametrize("extra", ["qpos", "empty", "masks"])
def test_last_rows_that_are_states(extra, load):
    """Each of these files says that its last rows hold no step."""
    arrays = loop([1.0, 1.0, 1.0])
    last = arrays["terminals"]
    if extra == "qpos":
        arrays["qpos"] = arrays["observations"]
    if extra == "empty":
        arrays["actions"][last], arrays["rewards"] = 0, np.roll(arrays["rewards"], -1)
    if extra == "masks":
        arrays["masks"] = 1 - np.roll(last, -1)
    dataset, card = load(**arrays)
    assert len(dataset["rewards"]) == 18 and card.lengths == (5, 5, 5)
    assert card.unused == (0 if extra == "empty" else 3)
    assert ("give 'masks'" in "".join(card.warnings)) == (extra != "masks")
    assert (dataset["masks"] == 0).sum() == (3 if extra == "masks" else 0)


def test_a_step_of_rest_that_ends_in_success_is_a_step(load):
    arrays = loop([0.0, 0.0])
    arrays["rewards"] = arrays["terminals"] - 1.0
    arrays["actions"][arrays["terminals"]] = 0
    _, card = load(**arrays)
    assert card.returns == (-5, -5, -5) and card.warnings == () and card.solved == 2


@pytest.mark.parametrize(
    ("rewards", "masks", "solved"),
    [
        ([0, 0, 1, 0, 0, 0], [1, 1, 0, 1, 1, 1], 1),
        ([-1, -1, 0, -1, -1, -1], [1, 1, 0, 1, 1, 1], 1),
        ([-1, 0, -1, -1, -1, -1], [1, 1, 1, 1, 1, 1], 1),
        ([-1, -1, -1, -1, -1, -1], [1, 1, 1, 1, 1, 1], 0),
        ([-1, -1, -1, -1, -1, -1], [1, 1, 0, 1, 1, 0], 2),
        ([0, 0, 0, 0, 0, -1], [1, 1, 1, 1, 1, 0], None),
        ([1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0], None),
        ([0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], None),
        ([0.3, 0, 1, 0.2, 0.1, 0], [1, 1, 0, 1, 1, 0], None),
    ],
)
def test_share_of_success(rewards, masks, solved, load):
    arrays = loop([0, 0], length=3) | {"rewards": np.array(rewards), "masks": np.array(masks)}
    following = np.roll(arrays["observations"], -1, axis=0) + 9 * arrays["terminals"][:, None]
    card = load(**arrays, next_observations=following)[1]
    assert card.solved == solved
    assert ("unknown" if solved is None else f"{solved} of 2 episodes") in "\n".join(card.lines())


def test_sparse_rewards_of_rewards_that_are_never_0(load):
    arrays = loop([1.0, 2.0]) | {"rewards": np.arange(1.0, 13)}
    assert load(**arrays)[1].warnings == ()
    assert "all rewards" in "".join(load(sparse=True, **arrays)[1].warnings)


def test_sparse_rewards_are_0_where_they_were(load):
    rewards = np.array([0, 2, -3, 0.5, 0, 1, 0, 0, -1, 4, 0, 7])
    dataset, _ = load(sparse=True, **loop([1.0, 2.0]) | {"rewards": rewards})
    np.testing.assert_array_equal(dataset["rewards"][dataset["terminals"] == 0], -1.0 * (rewards != 0))


def test_lines_are_few_and_aligned(load):
    lines = load(**loop([1.0, 0.0]))[1].lines()
    assert len(lines) <= 8 and len({len(line) - len(line[11:]) for line in lines}) == 1
    wide = loop([1.0, 0.0]) | {"actions": np.random.default_rng(0).uniform(-1, 1, (12, 40))}
    assert max(map(len, load(**wide)[1].lines())) < 250
