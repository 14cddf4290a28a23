"""Units of actions: those of the environment are recognised and rescaled as the environment is."""

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box

from envs import datasets
from envs.datasets import load_dataset, load_validation
from envs.tasks import make_env, parse_task
from utils.errors import UserError

pytestmark = pytest.mark.check

BOUNDS = {
    "small": ([-0.4], [0.4]),
    "positive": ([0.0], [1.0]),
    "wide": ([-2.0], [2.0]),
    "asymmetric": ([-0.2], [3.0]),
    "mixed": ([-0.5, 0.0, -2.0], [0.5, 10.0, 2.0]),
    "unit": ([-1.0, -1.0], [1.0, 1.0]),
}


class Push(gymnasium.Env):
    """The position is the sum of the actions, in their own units."""

    def __init__(self, low, high, dtype=np.float32):
        self.action_space = Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)
        self.observation_space = Box(-np.inf, np.inf, self.action_space.shape, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = np.zeros(self.action_space.shape)
        return self.position.astype(np.float32), {}

    def step(self, action):
        self.position = self.position + action
        return self.position.astype(np.float32), float(self.position[0]), False, False, {}


for name, (low, high) in BOUNDS.items():
    gymnasium.register(f"Push/{name}-v0", Push, kwargs={"low": low, "high": high}, max_episode_steps=30)


@pytest.fixture(autouse=True)
def fresh_environment():
    datasets.sized_env.cache_clear()


def write(path, actions, rewards=None):
    """Writes an episode in which the environment was pushed by `actions`, in its own units."""
    actions = np.asarray(actions, np.float64)
    actions = actions[:, None] if actions.ndim == 1 else actions
    positions = np.concatenate([0 * actions[:1], np.cumsum(actions, axis=0)])
    np.savez(
        path,
        observations=positions[:-1],
        next_observations=positions[1:],
        actions=actions,
        rewards=positions[1:, 0] if rewards is None else rewards,
        terminals=np.arange(len(actions)) == len(actions) - 1,
    )
    return path


def load(path, name, units="auto"):
    dataset, _, info = load_dataset(parse_task(f"gym:Push/{name}-v0"), dataset_path=path, actions=units)
    return dataset["actions"][:-1], info.card


def between(name, share, count=50, seed=0):
    """Actions, uniform in the given share of the bounds around their middle."""
    low, high = np.array(BOUNDS[name])
    return (low + high) / 2 + share * np.random.default_rng(seed).uniform(-1, 1, (count, len(low))) * (high - low) / 2


@pytest.mark.parametrize("name", BOUNDS)
def test_raw_actions_do_in_the_rescaled_environment_what_they_did(name, tmp_path):
    raw = between(name, 1.0)
    actions, card = load(write(tmp_path / "d.npz", raw), name)
    env = make_env(f"gym:Push/{name}-v0")
    env.reset(seed=0)
    for action, position in zip(actions[:29], np.cumsum(raw, axis=0), strict=False):
        observation, *_ = env.step(action)
        np.testing.assert_allclose(observation, position, atol=1e-3)
    assert card.units == ("scaled" if name == "unit" else "raw")
    bounds = [line for line in card.lines() if "rescaled to [-1, 1]" in line]
    assert len(bounds) == (name != "unit") and all("file are raw" in line for line in bounds)


def test_a_perfect_expert_in_raw_units_stays_one(tmp_path):
    for name in ("positive", "small", "wide"):
        best = np.full(20, BOUNDS[name][1][0])
        actions, card = load(write(tmp_path / f"{name}.npz", best), name)
        assert card.units == "raw" and (actions == datasets.np.float32(datasets.ACTION_LIMIT)).all()


@pytest.mark.parametrize("name", ["small", "positive", "wide", "asymmetric", "mixed"])
def test_scaled_actions_stay_as_they_are(name, tmp_path):
    width = len(BOUNDS[name][0])
    scaled = np.random.default_rng(0).uniform(-1, 1, (200, width))
    actions, card = load(write(tmp_path / "d.npz", scaled), name)
    assert card.units == "scaled" and "already scaled" in "".join(card.lines())
    np.testing.assert_allclose(actions, scaled, atol=1e-4)


@pytest.mark.parametrize(("name", "raw"), [("wide", [[0.3], [-0.2]]), ("asymmetric", [[0.1], [0.6]])])
def test_what_fits_both_units_is_asked(name, raw, tmp_path):
    path = write(tmp_path / "d.npz", raw)
    with pytest.raises(UserError, match=r"--dataset_actions=raw.*--dataset_actions=scaled") as caught:
        load(path, name)
    assert "\n" not in str(caught.value)
    np.testing.assert_allclose(load(path, name, "scaled")[0], raw, atol=1e-6)
    low, high = np.array(BOUNDS[name])
    np.testing.assert_allclose(load(path, name, "raw")[0], 2 * (np.array(raw) - low) / (high - low) - 1, atol=1e-6)
    assert load(path, name, "raw")[1].units == "raw"


@pytest.mark.parametrize(
    ("name", "units", "action", "hint"),
    [
        ("small", "auto", 1.2, r"action of 1\.2 .*beyond .*\[-0\.4, 0\.4\]"),
        ("wide", "auto", 2.5, r"action of 2\.5 .*beyond .*\[-2, 2\]"),
        ("wide", "scaled", 1.5, r"up to 1\.5 .*\[-1, 1\]"),
        ("small", "raw", 0.5, r"action of 0\.5 .*row 1, dimension 0.*beyond .*\[-0\.4, 0\.4\]"),
        ("positive", "raw", -0.5, r"action of -0\.5 .*beyond .*\[0, 1\]"),
    ],
)
def test_actions_out_of_bounds(name, units, action, hint, tmp_path):
    with pytest.raises(UserError, match=hint) as caught:
        load(write(tmp_path / "d.npz", [0.1, action]), name, units)
    assert "\n" not in str(caught.value)


def test_one_dimension_tells_for_all(tmp_path):
    raw = between("mixed", 0.1)
    raw[3, 1] = 9.0
    assert load(write(tmp_path / "d.npz", raw), "mixed")[1].units == "raw"
    scaled = between("mixed", 0.1) * 0
    scaled[3, 0] = -0.9
    assert load(write(tmp_path / "d.npz", scaled), "mixed")[1].units == "scaled"


def test_far_inside_the_bounds(tmp_path):
    _, card = load(write(tmp_path / "d.npz", between("small", 0.05)), "small")
    assert card.units == "raw" and "exceeds 0" in "".join(card.warnings)


def test_validation_is_in_the_units_of_training(tmp_path):
    """Though its own actions could be of either."""
    write(tmp_path / "d.npz", between("wide", 1.0))
    write(tmp_path / "d-val.npz", [0.5, -0.5])
    task = parse_task("gym:Push/wide-v0")
    _, val, _ = load_dataset(task, dataset_path=tmp_path / "d.npz")
    np.testing.assert_allclose(val["actions"][:2, 0], [0.25, -0.25])
    with pytest.raises(UserError, match="--dataset_actions"):
        load_validation(task, tmp_path / "d.npz")


def test_a_robot_has_no_units_of_its_own(tmp_path):
    with pytest.raises(UserError, match="environment's bounds"):
        load_dataset(parse_task("robot:arm"), dataset_path=write(tmp_path / "d.npz", [0.5, -0.5]), actions="raw")


def test_no_actions_at_all(tmp_path):
    with pytest.raises(UserError, match="no columns"):
        load_dataset(parse_task("robot:arm"), dataset_path=write(tmp_path / "d.npz", np.zeros((2, 0)), np.ones(2)))


@pytest.mark.parametrize(
    ("low", "high", "dtype", "hint"),
    [
        ([-1, -np.inf], [1, 1], np.float32, r"unbounded actions \(dimension 1 is in \[-inf, 1\]\)"),
        ([0, -1], [0, 1], np.float32, r"without a range \(dimension 0 is in \[0, 0\]\)"),
        ([0], [10], np.int32, "actions of int32"),
    ],
)
def test_bounds_that_cannot_be_rescaled(low, high, dtype, hint):
    gymnasium.register("Push/odd-v0", Push, kwargs={"low": low, "high": high, "dtype": dtype})
    try:
        with pytest.raises(UserError, match=hint) as caught:
            make_env("gym:Push/odd-v0")
        assert "\n" not in str(caught.value)
    finally:
        del gymnasium.registry["Push/odd-v0"]
