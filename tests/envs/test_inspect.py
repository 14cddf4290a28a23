"""Descriptions of datasets: sound ones have no sign of a fault, each planted fault is named with what to do."""

import dataclasses

import numpy as np
import pytest
from tiny_runs import call

import envs.inspect
from envs.datasets import load_dataset
from envs.inspect import rewards_line, table
from envs.tasks import parse_task

EPISODES, STEPS = 12, 25


def sound(seed=0):
    """Rows of a point that actions move, with dense rewards; half of the episodes terminate, the others are cut."""
    random, rows = np.random.default_rng(seed), []
    for episode in range(EPISODES):
        state = random.normal(size=3) / 10
        length = STEPS if episode % 2 else int(random.integers(10, STEPS))
        for step in range(length):
            action = random.uniform(-1, 1, 2)
            following = state + np.r_[action * 0.3, 0.05] + random.normal(size=3) / 100
            last = step == length - 1
            reward = -float(np.abs(following[:2]).sum())
            rows.append((state, action, reward, following, last and not episode % 2, last and episode % 2))
            state = following
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    return {name: np.array(column, np.float64) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def look(path, *flags):
    return call(str(path), *flags, f"--figure={path.parent}/card.png", program=envs.inspect)


def test_a_sound_file(tmp_path):
    np.savez(tmp_path / "data.npz", **sound())
    outcome = look(tmp_path / "data.npz")
    assert outcome.code == 0 and "no signs of faults" in outcome.out and outcome.err == ""
    for said in (
        "episodes 12",
        "length   min 1",
        "return   min",
        "actions  2 in [-0.99",
        "6 truly terminated, 6 cut by a",
    ):
        assert said in outcome.out, outcome.out
    assert "--reward_scale=" in outcome.out and (tmp_path / "card.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_shows_the_data(tmp_path, figures):
    arrays = sound()
    np.savez(tmp_path / "data.npz", **arrays)
    look(tmp_path / "data.npz")
    (figure,) = figures
    returns, lengths, rewards, actions, observations, sums = figure.axes
    assert sum(bar.get_height() for bar in returns.patches) == sum(bar.get_height() for bar in lengths.patches) == 12
    assert sum(bar.get_height() for bar in rewards.patches) == len(arrays["rewards"])
    assert len(actions.collections[0].get_segments()) == 2 and len(observations.collections[0].get_segments()) == 3
    assert len(sums.lines) == 12
    ends = np.flatnonzero(arrays["terminals"] + arrays["timeouts"])
    assert sums.lines[0].get_ydata()[-1] == pytest.approx(arrays["rewards"][: ends[0] + 1].sum(), rel=1e-5)


def zero_rewards(rows):
    rows["rewards"][:] = 0


def inverted_masks(rows):
    rows["masks"] = rows["terminals"]


def same_row(rows):
    rows["next_observations"] = rows["observations"]


def two_rows_later(rows):
    rows["next_observations"] = np.roll(rows["observations"], -2, axis=0)


def raw_actions(rows):
    rows["actions"] *= 40


def missing_reading(rows):
    rows["observations"][7, 1] = np.nan


def largest_double(rows):
    rows["observations"][7, 1] = rows["next_observations"][6, 1] = np.finfo(np.float64).max


def placeholder(rows):
    rows["observations"][7, 1] = rows["next_observations"][6, 1] = -99999


def reward_placeholder(rows):
    rows["rewards"][30] = 1e6


def time_limits_as_terminations(rows):
    keep = np.repeat(
        np.arange(EPISODES) % 2 == 1, np.diff(np.flatnonzero(rows["terminals"] + rows["timeouts"]), prepend=-1)
    )
    for name in rows:
        rows[name] = rows[name][keep]
    rows["terminals"] = rows.pop("timeouts")


def repeated_episode(rows):
    end = int(np.flatnonzero(rows["terminals"] + rows["timeouts"])[0]) + 1
    for name, array in rows.items():
        rows[name] = np.concatenate([array, array[:end]])


def actions_a_row_late(rows):
    rows["actions"] = np.roll(rows["actions"], 1, axis=0)


def actions_a_row_early(rows):
    rows["actions"] = np.roll(rows["actions"], -1, axis=0)


def ends_in_every_row(rows):
    del rows["next_observations"], rows["timeouts"]
    rows["terminals"][:] = 1


def unmarked_ends(rows):
    del rows["next_observations"]
    rows["observations"][:, 2] += 0.2
    rows["terminals"][:] = rows["timeouts"][:] = 0


def small_actions(rows):
    rows["actions"] /= 50


def clipped_actions(rows):
    rows["actions"] = np.clip(rows["actions"] * 1000, -1, 1)


def one_frame(rows):
    still = np.repeat(np.arange(len(rows["rewards"])) // 8, 1) * 8
    ends = np.flatnonzero(rows["terminals"] + rows["timeouts"])
    first = np.append(0, ends[:-1] + 1)[np.searchsorted(ends, np.arange(len(still)))]
    rows["observations"] = rows["observations"][np.maximum(still, first)]
    del rows["next_observations"]


def unlike_lengths(rows):
    rows["actions"] = rows["actions"][:-1]


def dark_images(rows):
    rows["images"] = np.random.default_rng(0).integers(0, 2, (len(rows["rewards"]), 1, 8, 8, 3)).astype(np.uint8)
    rows["next_images"] = np.roll(rows["images"], -1, axis=0)


def broken_camera(rows):
    rows["images"] = np.full((len(rows["rewards"]), 1, 8, 8, 3), 77, np.uint8)
    rows["next_images"] = rows["images"]


def text(rows):
    rows["rewards"] = np.array(["high"] * len(rows["rewards"]))


# Fault → exit code, and what is said of it.
FAULTS = {
    zero_rewards: (0, "are 0: there is nothing to learn from them"),
    inverted_masks: (2, "the inverse of what it must be"),
    same_row: (2, "holds the observation of the same row"),
    two_rows_later: (2, "holds the observation 2 rows later"),
    raw_actions: (2, "give --env_name=gym:<id>, if they are in the environment's units"),
    missing_reading: (2, "'observations' in"),
    largest_double: (2, "too large for float32 arithmetic"),
    placeholder: (0, "(column 1) reach -1e+05"),
    reward_placeholder: (0, "'rewards' of"),
    time_limits_as_terminations: (0, "fault: 6 of 6 episodes of"),
    repeated_episode: (0, "fault: 1 episodes of"),
    actions_a_row_late: (0, "changes with the action of the row after"),
    actions_a_row_early: (0, "changes with the action of the row before"),
    ends_in_every_row: (0, "of the episodes of"),
    unmarked_ends: (2, "marks no end where observations jump"),
    small_actions: (0, "no action of"),
    clipped_actions: (0, "are at their bounds; were they clipped"),
    one_frame: (0, "leave the observation as it is"),
    unlike_lengths: (2, "differ in length"),
    dark_images: (0, "no pixel of the images"),
    broken_camera: (0, "the images of"),
    text: (2, "not numbers"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_are_named(fault, tmp_path):
    rows, path = sound(), tmp_path / "data.npz"
    fault(rows)
    np.savez(path, **rows)
    code, said = FAULTS[fault]
    outcome = look(path)
    assert outcome.code == code, outcome
    if code:
        assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1 and said in outcome.err, outcome.err
        assert "  rewards  " in outcome.out  # The table of arrays.
    else:
        (sign,) = [line for line in outcome.out.splitlines() if line.startswith("sign ")]
        assert said in sign and str(path) in sign, outcome.out


def test_what_is_not_finite_is_counted(tmp_path):
    rows = sound()
    rows["observations"][3:5, 1] = np.inf
    np.savez(tmp_path / "data.npz", **rows)
    assert ", 2 not finite" in next(line for line in table(tmp_path / "data.npz") if "observations " in line)
    (tmp_path / "other.npz").write_bytes(b"PK\x03\x04")
    assert table(tmp_path / "other.npz") == []


def test_the_file_of_a_task(tmp_path):
    """Its environment's bounds tell that actions are in its units; a file of another task is an error."""
    random = np.random.default_rng(0)
    rows = {"observations": random.normal(size=(40, 3)), "actions": random.uniform(-2, 2, (40, 1))}
    np.savez(tmp_path / "data.npz", **rows, rewards=random.normal(size=40), terminals=np.arange(40) % 20 == 19)
    outcome = look(tmp_path / "data.npz", "--env_name=gym:Pendulum-v1")
    assert outcome.code == 0 and "[-2, 2] in the environment" in outcome.out
    assert "has actions up to" in look(tmp_path / "data.npz").err
    assert "the environment needs [N, 2]" in look(tmp_path / "data.npz", "--env_name=gym:MountainCarContinuous-v0").err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name one dataset"),
        (("a.npz", "b.npz"), "name one dataset"),
        (("no_such.npz",), "there is no file no_such.npz"),
        (("minari:door",), "does not name a dataset"),
        (("minari:a/b-v0", "--env_name=gym:Pendulum-v1"), "names its environment itself; leave out --env_name"),
        (("a.npz", "--env_name=gym:"), "'gym:' needs the id"),
        (("a.npz", "--actions=big"), "auto|scaled|raw"),
        (("a.npz", "--envname=gym:x"), "did you mean --env_name?"),
    ],
)
def test_command_lines_that_do_not_fit(arguments, said):
    outcome = call(*arguments, program=envs.inspect)
    assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1, outcome.err


def test_rewards_are_described(tmp_path):
    arrays = {"rewards": np.array([0, 0, 1, 9.0]), "terminals": np.array([0, 0, 0, 1])}
    np.savez(tmp_path / "data.npz", **sound())
    card = load_dataset(parse_task("robot:any"), dataset_path=tmp_path / "data.npz")[2].card
    card = dataclasses.replace(card, returns=(0.0, 2.0, 4.0))
    assert rewards_line(arrays, card) == "sparse: 0 in 2 steps, 1 in 1 steps"
    arrays = {"rewards": np.arange(9.0), "terminals": np.zeros(9)}
    assert rewards_line(arrays, card).endswith("--reward_scale=250")


def test_hdf5_is_described(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is an optional dependency: pip install '.[minari]'")
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for name, array in sound().items():
            file[name] = array
    outcome = look(tmp_path / "data.hdf5")
    assert outcome.code == 0 and "no signs of faults" in outcome.out
    with h5py.File(tmp_path / "data.hdf5", "a") as file:
        file["rewards"][3] = np.nan
    outcome = look(tmp_path / "data.hdf5")
    assert outcome.code == 2 and ", 1 not finite" in outcome.out and "'rewards' in" in outcome.err
