"""Datasets of other gymnasium environments, on hand-made rows (Pendulum: 3 observations, 1 action)."""

import time

import gymnasium
import numpy as np
import pytest

from envs import datasets
from envs.datasets import load_dataset
from envs.tasks import parse_task
from utils.errors import UserError

TASK = parse_task("gym:Pendulum-v1")


def states(*numbers):
    return np.repeat(np.array(numbers, np.float64)[:, None], 3, axis=1)


def rows(count):
    return {"actions": np.linspace(-1, 1, count)[:, None], "rewards": np.arange(1.0, count + 1)}


def load(tmp_path, **arrays):
    np.savez(tmp_path / "data.npz", **arrays)
    return load_dataset(TASK, dataset_path=tmp_path / "data.npz")[0]


def check(dataset, **expected):
    for name, values in expected.items():
        array = dataset[name][:, 0] if dataset[name].ndim == 2 else dataset[name]
        np.testing.assert_allclose(array, values, err_msg=name, atol=1e-4)
        assert dataset[name].dtype == np.float32


@pytest.mark.check
def test_with_next_observations(tmp_path):
    # Truly terminated at state 12; cut by time at 22; and a jump from 31 to 40 that no flag marks.
    dataset = load(
        tmp_path,
        observations=states(10, 11, 20, 21, 30, 40),
        next_observations=states(11, 12, 21, 22, 31, 41),
        terminals=np.array([0, 1, 0, 0, 0, 0]),
        timeouts=np.array([0, 0, 0, 1, 0, 0]),
        **rows(6),
    )
    check(
        dataset,
        observations=[10, 11, 12, 20, 21, 22, 30, 31, 40, 41],
        actions=[-1, -0.6, 0, -0.2, 0.2, 0, 0.6, 0, 1, 0],
        rewards=[1, 2, 0, 3, 4, 0, 5, 0, 6, 0],
        masks=[1, 0, 1, 1, 1, 1, 1, 1, 1, 1],
        terminals=[0, 0, 1, 0, 0, 1, 0, 1, 0, 1],
    )


def test_with_timeouts_only(tmp_path):
    # D4RL's raw rows: the step at 11 terminates; 22 was cut by time; 31 is where the file ends.
    dataset = load(
        tmp_path,
        observations=states(10, 11, 20, 21, 22, 30, 31),
        terminals=np.array([0, 1, 0, 0, 0, 0, 0]),
        timeouts=np.array([0, 0, 0, 0, 1, 0, 0]),
        **rows(7),
    )
    check(
        dataset,
        observations=[10, 11, 11, 20, 21, 22, 30, 31],
        rewards=[1, 2, 0, 3, 4, 0, 6, 0],
        masks=[1, 0, 1, 1, 1, 1, 1, 1],
        terminals=[0, 0, 1, 0, 0, 1, 0, 1],
    )


def test_ogbenchs_convention(tmp_path):
    arrays = {"observations": states(10, 11, 12, 20, 21), "terminals": np.array([0, 0, 1, 0, 1])}
    dataset = load(tmp_path, **arrays, **rows(5), qpos=states(0, 0, 0, 0, 0))
    expected = {"observations": [10, 11, 12, 20, 21], "rewards": [1, 2, 0, 4, 0], "terminals": [0, 0, 1, 0, 1]}
    check(dataset, **expected, masks=[1, 1, 1, 1, 1])
    assert "qpos" in "".join(load_dataset(TASK, dataset_path=tmp_path / "data.npz")[2].card.warnings)
    arrays["masks"] = np.array([1, 0, 1, 1, 1])
    for extra in ({}, {"qpos": states(0, 0, 0, 0, 0)}):
        dataset = load(tmp_path, **arrays, **extra, **rows(5))
        check(dataset, **expected, masks=[1, 0, 1, 1, 1])
        assert not load_dataset(TASK, dataset_path=tmp_path / "data.npz")[2].card.warnings


@pytest.mark.check
def test_masks_win_over_terminals(tmp_path):
    dataset = load(
        tmp_path,
        observations=states(10, 11),
        next_observations=states(11, 12),
        terminals=np.array([0, 1]),
        masks=np.ones(2),
        **rows(2),
    )
    check(dataset, masks=[1, 1, 1], terminals=[0, 0, 1])


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"actions": np.full((2, 1), 2.1)}, r"an action of 2.1 \(row 0, dimension 0\).* beyond .* \[-2, 2\]"),
        ({"actions": np.zeros((2, 2))}, r"'actions' .*\[2, 2\]"),
        ({"observations": np.zeros((2, 4))}, r"'observations' .*\[N, 3\]"),
        ({"next_observations": np.zeros((2, 4))}, "'next_observations'"),
        ({"next_observations": np.full((2, 3), np.nan)}, "'next_observations' .*NaN"),
        ({"rewards": np.array([0, np.nan])}, "'rewards' .*NaN"),
        ({"rewards": np.zeros((2, 1))}, "'rewards' .*flatten"),
        ({"timeouts": np.zeros(3)}, "differ in length"),
        ({"masks": np.array([0.5, 1])}, "'masks' .*0 or 1"),
        ({"terminals": None}, "lacks the array 'terminals'"),
    ],
)
def test_wrong_files(change, hint, tmp_path):
    arrays = {"observations": states(10, 11), "terminals": np.array([0, 1]), **rows(2)} | change
    arrays = {name: array for name, array in arrays.items() if array is not None}
    with pytest.raises(UserError, match=hint) as caught:
        load(tmp_path, **arrays)
    assert str(tmp_path / "data.npz") in str(caught.value)


def test_a_dataset_must_be_given():
    with pytest.raises(UserError, match="--dataset"):
        load_dataset(TASK)


def test_slightly_rounded_actions_are_clipped(tmp_path):
    arrays = {"observations": states(10, 11), "terminals": np.array([0, 1]), **rows(2)}
    arrays["actions"] = np.array([[1.0001], [0.0]])
    assert load(tmp_path, **arrays)["actions"][0, 0] == np.float32(1 - 1e-5)


# ---- images

ROBOT, SPOT = parse_task("robot:arm"), parse_task("gym:spot_env:Spot-v0")


def pictures(*numbers):
    """Images of one camera that show a number."""
    return np.array(numbers, np.uint8)[:, None, None, None, None] * np.ones((1, 1, 64, 64, 3), np.uint8)


def load_images(tmp_path, task=ROBOT, **arrays):
    np.savez(tmp_path / "data.npz", **arrays)
    return load_dataset(task, dataset_path=tmp_path / "data.npz")[0]


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        # With and without next images, with and without timeouts, each with a true termination at 12.
        (
            {
                "images": (10, 11, 20, 30),
                "next_images": (11, 12, 21, 31),
                "terminals": [0, 1, 0, 0],
                "timeouts": [0, 0, 1, 0],
            },
            [10, 11, 12, 20, 21, 30, 31],
        ),
        ({"images": (10, 11, 20, 21), "terminals": [0, 1, 0, 0], "timeouts": [0, 0, 0, 1]}, [10, 11, 11, 20, 21]),
        ({"images": (10, 11, 20, 21), "terminals": [0, 1, 0, 1]}, [10, 11, 11, 20, 21, 21]),
    ],
)
def test_images_follow_their_states(tmp_path, arrays, expected):
    """Rows that are added are added to both; images stay uint8."""
    given = {k: pictures(*v) if "images" in k else np.array(v) for k, v in arrays.items()}
    for name in ("images", "next_images"):
        if name in arrays:
            given[name.replace("images", "observations")] = states(*arrays[name])
    dataset = load_images(tmp_path, **given, **rows(4))
    assert dataset["images"].dtype == np.uint8
    np.testing.assert_array_equal(dataset["images"], pictures(*expected))
    np.testing.assert_array_equal(dataset["observations"][:, 0], expected)


def test_images_alone_end_episodes_where_they_jump(tmp_path, monkeypatch):
    """Where nothing else is observed, a file needs no states."""
    monkeypatch.setattr("envs.datasets.observed_shapes", lambda env: (0, (1, 64, 64, 3)))
    arrays = {"images": pictures(1, 2, 7), "next_images": pictures(2, 3, 8), "terminals": np.zeros(3)}
    arrays |= {"actions": np.zeros((3, 2)), "rewards": np.zeros(3)}
    dataset = load_images(tmp_path, SPOT, **arrays)
    assert dataset["observations"].shape == (5, 0)
    np.testing.assert_array_equal(dataset["images"], pictures(1, 2, 3, 7, 8))
    np.testing.assert_array_equal(dataset["terminals"], [0, 0, 1, 0, 1])


def test_an_environment_without_images_needs_none(tmp_path):
    """A file that also has images serves a task that sees the state alone."""
    dataset = load(tmp_path, observations=states(1, 2), images=pictures(1, 2), terminals=np.array([0, 1]), **rows(2))
    assert "images" not in dataset


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (SPOT, {"images": None}, "lacks the array 'images'"),
        (SPOT, {"images": pictures(1, 2)[:, :, :32]}, r"the environment gives \[1, 64, 64, 3\] per step"),
        (SPOT, {"images": pictures(1, 2) / 255}, "holds float64; images must be uint8"),
        (SPOT, {"images": pictures(1, 2)[:, 0]}, r"must be \[N, cameras, height, width, 3\]"),
        (SPOT, {"images": pictures(1)}, "differ in length"),
        (ROBOT, {"next_observations": states(2, 3)[:, :2]}, "give both or none"),
    ],
)
def test_wrong_images(tmp_path, task, changes, message):
    arrays = {"observations": states(1, 2)[:, :2], "images": pictures(1, 2), "terminals": np.array([0, 1])}
    arrays |= {"actions": np.zeros((2, 2)), "rewards": np.zeros(2)} | changes
    with pytest.raises(UserError, match=message) as caught:
        load_images(tmp_path, task, **{k: v for k, v in arrays.items() if v is not None})
    assert "\n" not in str(caught.value)


def test_too_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("envs.npz.free_memory", lambda: 20_000)
    arrays = {"observations": states(1, 2), "images": pictures(1, 2), "terminals": np.array([0, 1])}
    with pytest.raises(UserError, match=r"'images' in .* GiB of memory.*shards"):
        load_images(tmp_path, **arrays, **rows(2))


def test_a_constructor_that_hangs_and_a_reset_that_is_not_needed(monkeypatch, tmp_path):
    """Spaces are all that data need of an environment; it is asked for them within a time limit."""

    class Deaf(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (2,))
        action_space = gymnasium.spaces.Box(-1, 1, (1,))

        def __init__(self, hangs=False):
            if hangs:
                time.sleep(100)

        def reset(self, **_):
            raise AssertionError("reset")

    gymnasium.register("Deaf-v0", entry_point=Deaf)
    gymnasium.register("DeafHangs-v0", entry_point=Deaf, kwargs={"hangs": True})
    path = tmp_path / "deaf.npz"
    np.savez(path, observations=np.eye(2), actions=np.zeros((2, 1)), rewards=np.arange(2), terminals=[0, 1])
    assert datasets.load_file(parse_task("gym:Deaf-v0"), path)["rewards"].sum() == 1
    monkeypatch.setattr(datasets, "DEFAULT_TIMEOUT", 1)
    monkeypatch.setattr(datasets, "START_SECONDS", 0)
    with pytest.raises(UserError, match="gym:DeafHangs-v0: its constructor has not returned after 1 s"):
        datasets.load_file(parse_task("gym:DeafHangs-v0"), path)


def test_an_environment_without_spaces(tmp_path):
    class Bare(gymnasium.Env):
        pass

    gymnasium.register("Bare-v0", entry_point=Bare)
    with pytest.raises(UserError, match=r"Bare-v0.*no attribute.*_space.*; it must have an observation_space and"):
        datasets.load_file(parse_task("gym:Bare-v0"), tmp_path / "any.npz")
