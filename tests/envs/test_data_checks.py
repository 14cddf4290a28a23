"""Checks of files: mistakes are told, and data that only look odd are not."""

from pathlib import Path

import numpy as np
import pytest

from envs.datasets import load_dataset
from envs.gym_dataset import read_gym_file
from envs.tasks import parse_task
from utils.errors import UserError

LENGTHS = np.tile([7, 20, 12, 20, 9], 4)


def swings(lengths=LENGTHS, seed=0):
    """Episodes of a weight on a spring, pulled by random actions, each let go near (1, 0); the last step terminates."""
    rng, rows = np.random.default_rng(seed), []
    for length in lengths:
        state = np.array([1.0, 0.0]) + 0.02 * rng.normal(size=2)
        for step in range(length):
            action = rng.uniform(-1, 1, 1)
            velocity = state[1] - 0.1 * state[0] + 0.02 * action[0]
            following = np.array([state[0] + 0.1 * velocity, velocity])
            last = step == length - 1
            rows.append((state, action, -(state[0] ** 2), following, last))
            state = following
    names = ("observations", "actions", "rewards", "next_observations", "terminals")
    return {name: np.array(column, np.float32) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def without(arrays, *names):
    return {name: array for name, array in arrays.items() if name not in names}


@pytest.fixture
def read(tmp_path):
    """Returns a function that writes arrays and reads them as a robot's."""

    def write_and_read(**arrays):
        np.savez(tmp_path / "data.npz", **arrays)
        return read_gym_file(tmp_path / "data.npz")

    return write_and_read


@pytest.fixture
def refusal(read):
    """Returns a function that gives the line in which arrays are rejected."""

    def refused(**arrays):
        with pytest.raises(UserError) as caught:
            read(**arrays)
        assert "data.npz" in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    return refused


SWINGS = swings()


@pytest.mark.check
@pytest.mark.parametrize("dropped", [(), ("next_observations",)])
def test_sound_files_pass(dropped, read):
    file = read(**without(SWINGS, *dropped))
    assert file.warnings == [] and file.ends["truly terminated"] == 20 and file.unused == 0


# ---- numbers


@pytest.mark.parametrize("name", ["observations", "next_observations", "actions", "rewards"])
@pytest.mark.parametrize(
    ("kind", "value"),
    [(np.float64, 1.8e308), (np.float64, -1e39), (np.longdouble, "1e400"), (np.float32, 3e38), (np.float64, np.nan)],
)
def test_numbers_that_float32_cannot_compute_with(name, kind, value, refusal):
    arrays = dict(SWINGS)
    arrays[name] = arrays[name].astype(kind)
    arrays[name][33] = kind(value)
    assert f"'{name}'" in (line := refusal(**arrays)) and "row 33" in line


def test_float16_and_integers(read, refusal):
    arrays = SWINGS | {"observations": np.arange(len(SWINGS["rewards"]) * 2).reshape(-1, 2) + 2**25}
    assert read(**without(arrays, "next_observations")).warnings == []
    with np.errstate(over="ignore"):
        half = SWINGS["rewards"].astype(np.float16) * np.float16(6e4) * np.float16(100)
    assert "'rewards'" in refusal(**SWINGS | {"rewards": half})
    huge = np.full(len(half), 2**62) + np.arange(len(half))
    assert "'rewards'" in (line := refusal(**SWINGS | {"rewards": huge})) and "too large" in line


def test_what_float32_cannot_tell_apart(read):
    arrays = without(SWINGS, "next_observations")
    arrays["observations"] = np.concatenate([arrays["observations"], 1.7e9 + arrays["observations"][:, :1]], axis=1)
    assert read(**arrays).warnings == []  # In float32 already.
    arrays["observations"] = arrays["observations"].astype(np.float64)
    arrays["observations"][:, 2] = 1.7e9 + SWINGS["observations"][:, 0].astype(np.float64)
    (warning,) = read(**arrays).warnings
    assert "'observations'" in warning and "column 2" in warning
    assert "'rewards'" in "".join(read(**SWINGS | {"rewards": SWINGS["rewards"] * np.float64(1e-60)}).warnings)


# ---- masks


@pytest.mark.check
@pytest.mark.parametrize("dropped", [(), ("next_observations",)])
def test_inverse_masks(dropped, read, refusal):
    arrays, ends = without(SWINGS, *dropped), SWINGS["terminals"]
    assert "inverse" in refusal(**arrays, masks=ends)
    # The ends of the second half of the file are time limits, at which the inverse of 1 is 0.
    half = np.arange(len(ends)) < len(ends) // 2
    arrays |= {"terminals": ends * half, "timeouts": ends * ~half}
    assert "inverse" in refusal(**arrays, masks=ends * half)
    assert "inverse" in refusal(**arrays, masks=ends)
    assert read(**arrays, masks=1 - ends * half).warnings == []


def test_masks_that_only_look_inverse(read):
    one_step = without(SWINGS, "terminals") | {"terminals": np.ones(len(SWINGS["rewards"]))}
    read(**one_step, masks=np.zeros(len(SWINGS["rewards"])))
    read(**one_step, masks=np.ones(len(SWINGS["rewards"])))
    # One step to a solved state, which is a row of its own.
    pairs = np.tile([0.0, 1.0], len(SWINGS["rewards"]) // 2)
    arrays = {name: SWINGS[name][: len(pairs)] for name in ("observations", "actions", "rewards")}
    assert read(**arrays, terminals=pairs, masks=pairs).ends["truly terminated"] == len(pairs) // 2


# ---- next observations


@pytest.mark.parametrize("lag", [0, 2, 3])
@pytest.mark.parametrize("marked", [True, False])
def test_next_observations_of_another_row(lag, marked, refusal):
    arrays = dict(SWINGS)
    if not marked:
        arrays["terminals"] = 0 * arrays["terminals"]
    arrays["next_observations"] = np.roll(arrays["observations"], -lag, axis=0)
    assert ("the same row" if lag == 0 else f"{lag} rows later") in refusal(**arrays)


def test_next_observations_of_the_same_row_of_a_robot_that_mostly_rests(read, refusal):
    position = np.repeat(np.arange(20.0), 20)[:, None] * np.ones(3)
    arrays = {"observations": position[:-1], "actions": np.ones((399, 1)), "rewards": np.arange(399.0)}
    arrays["terminals"] = np.arange(399) == 398
    assert read(**arrays, next_observations=position[1:]).warnings == []
    assert "the same row" in refusal(**arrays, next_observations=position[:-1])
    following = position[1:].copy()
    following[::40] = -1  # Episodes that only next observations tell of.
    assert read(**arrays, next_observations=following).ends["found where next observations break"] == 10
    assert read(**arrays | {"observations": 0 * position[1:]}, next_observations=0 * position[1:]).unused == 0


def test_episodes_of_one_step(read):
    """Whatever is observed afterwards: the same, or what the next episode begins with."""
    count = len(SWINGS["rewards"])
    for following in (SWINGS["observations"], np.roll(SWINGS["observations"], -1, axis=0)):
        file = read(**SWINGS | {"terminals": np.ones(count), "next_observations": following})
        assert file.warnings == [] and file.ends["truly terminated"] == count


def test_ends_that_only_next_observations_tell_of_are_counted(read):
    file = read(**SWINGS | {"terminals": 0 * SWINGS["terminals"]})
    assert file.ends["found where next observations break"] == 19 and file.ends["cut by the end of the file"] == 1


def test_next_observations_after_a_reset(read):
    """At time limits they matter; where an episode terminates nothing is bootstrapped from them."""
    arrays = SWINGS | {"next_observations": np.roll(SWINGS["observations"], -1, axis=0)}
    assert read(**arrays).warnings == []
    arrays |= {"terminals": 0 * SWINGS["terminals"], "timeouts": SWINGS["terminals"]}
    assert "autoreset" in "".join(read(**arrays).warnings)
    assert read(**arrays | {"next_observations": SWINGS["next_observations"]}).warnings == []
    cut = (np.arange(600) % 100 == 99) * 1.0  # An end of a file's part, at which nothing is reset.
    rows = {"observations": walk(601)[:-1], "next_observations": walk(601)[1:], "terminals": 0 * cut, "timeouts": cut}
    assert read(**rows, actions=walk(width=1) / 20, rewards=walk()[:, 0]).warnings == []


def test_shuffled_rows(read):
    order = np.random.default_rng(0).permutation(len(SWINGS["rewards"]))
    assert "shuffled" in "".join(read(**{name: array[order] for name, array in SWINGS.items()}).warnings)


def test_ends_marked_everywhere_but_at_ends(refusal):
    assert "no episode ends" in refusal(**SWINGS | {"terminals": 1 - SWINGS["terminals"]})


# ---- ends that nothing marks


def test_no_end_is_marked(read, refusal):
    arrays = without(SWINGS, "next_observations")
    for timeouts in ({}, {"timeouts": 0 * arrays["terminals"]}):
        line = refusal(**arrays | {"terminals": 0 * arrays["terminals"]} | timeouts)
        assert "19 times (first after row 6)" in line and "timeouts" in line
    first = {name: array[:7] for name, array in arrays.items()}
    assert read(**first | {"terminals": np.zeros(7)}).warnings == []


def test_time_limits_that_are_not_marked(read, refusal):
    """Episodes of 20 steps were cut off; if others are marked as cut off, these are taken to go on."""
    arrays, cut = without(SWINGS, "next_observations"), np.repeat(LENGTHS == 20, LENGTHS)
    arrays["terminals"] = SWINGS["terminals"] * ~cut
    assert "8 times (first after row 26)" in refusal(**arrays)
    timeouts = SWINGS["terminals"] * cut
    file = read(**arrays, timeouts=timeouts)
    assert file.warnings == [] and (file.unused, file.ends["cut by a time limit"]) == (8, 8)
    timeouts[26] = 0
    assert read(**arrays, timeouts=timeouts).warnings == []  # A single one may be anything.
    timeouts[:100] = 0
    assert "jump" in "".join(read(**arrays, timeouts=timeouts).warnings)


def test_resets_anywhere_at_equal_distances(refusal):
    rng = np.random.default_rng(0)
    episodes = [np.cumsum(rng.normal(size=(50, 4)), axis=0) / 50 + rng.normal(size=4) for _ in range(8)]
    rows = {"observations": np.concatenate(episodes), "actions": rng.uniform(-1, 1, (400, 1))}
    assert "equal distances" in refusal(**rows, rewards=rng.normal(size=400), terminals=np.zeros(400))


def walk(steps=600, width=4):
    return np.cumsum(np.random.default_rng(1).normal(size=(steps, width)), axis=0) / 20


def teleported(times):
    rows = walk()
    for at in times:
        rows[at:] += np.random.default_rng(at).normal(size=4) * 30
    return rows


ANGLE = np.arange(600) / 10 % (2 * np.pi)


@pytest.mark.parametrize(
    ("rows", "ends"),
    [
        (walk(), [599]),
        (teleported([200]), [599]),
        (teleported([130, 210, 450]), [99, 299, 599]),
        (np.stack([ANGLE, np.sin(ANGLE)], axis=1), [599]),
        (np.concatenate([walk(), np.arange(600)[:, None] // 70 % 2], axis=1), [599]),
        (np.ones((600, 3)), [599]),
        (np.ones((600, 3)) + walk(width=3) / 1e4, [599]),
        (np.random.default_rng(0).normal(size=(600, 3)), [599]),
        (np.zeros((600, 1)), [599]),
        (np.repeat(walk(120), 5, axis=0), [599]),
        (np.repeat(walk(200), 3, axis=0), [299, 599]),
    ],
    ids=[
        "walk",
        "teleport",
        "teleports",
        "angle",
        "switch",
        "rest",
        "jitter",
        "noise",
        "constant",
        "held",
        "held longer",
    ],
)
def test_odd_data_are_no_alarm(rows, ends, read):
    random = np.random.default_rng(2)
    file = read(
        observations=rows,
        actions=random.uniform(-1, 1, (600, 2)),
        rewards=random.normal(size=600),
        terminals=np.isin(np.arange(600), ends),
    )
    assert file.warnings == []


def test_files_of_one_row_and_of_no_state(read):
    one = {name: array[-1:] for name, array in SWINGS.items()}
    assert read(**one).ends["truly terminated"] == 1
    assert read(**without(one, "next_observations")).warnings == []
    images = np.zeros((3, 1, 8, 8, 3), np.uint8)
    rows = {"actions": np.eye(3), "rewards": np.arange(3.0), "terminals": [0, 0, 1]}
    for name in ("observations", "next_observations"):
        rows |= {name: np.zeros((3, 0)), name.replace("observations", "images"): images}
    assert read(**rows).ends["truly terminated"] == 1


def test_a_robot_that_moves_and_rests_is_no_alarm(read):
    random, way = np.random.default_rng(3), np.concatenate([np.linspace(0, 1, 12), np.linspace(1, 0, 12)])
    rows = [np.concatenate([np.zeros((30, 3)), way[:, None] * random.normal(size=3)]) for _ in range(20)]
    rows = np.concatenate(rows) + 1e-4 * random.normal(size=(1080, 3))
    actions, rewards = random.uniform(-1, 1, (1080, 2)), random.normal(size=1080)
    assert read(observations=rows, actions=actions, rewards=rewards, terminals=np.arange(1080) == 1079).warnings == []


# ---- rewards and actions


def warnings_of(tmp_path, **arrays):
    np.savez(tmp_path / "data.npz", **arrays)
    return "\n".join(load_dataset(parse_task("robot:any"), dataset_path=tmp_path / "data.npz")[2].card.warnings)


def test_rewards_and_actions_that_say_nothing(tmp_path):
    assert warnings_of(tmp_path, **SWINGS) == ""
    equal = SWINGS | {"rewards": 0 * SWINGS["rewards"] - 1}
    assert "all rewards" in (line := warnings_of(tmp_path, **equal)) and "solved" not in line
    assert "no episode is solved" in warnings_of(tmp_path, **equal, masks=np.ones(len(equal["rewards"])))
    assert "exceeds 0" in warnings_of(tmp_path, **SWINGS | {"actions": SWINGS["actions"] / 20})
    assert "recorded?" in warnings_of(tmp_path, **SWINGS | {"actions": 0 * SWINGS["actions"]})
    one_gripper = np.concatenate([SWINGS["actions"], 0 * SWINGS["actions"]], axis=1)
    assert warnings_of(tmp_path, **SWINGS | {"actions": one_gripper}) == ""
    with pytest.raises(UserError, match=r"actions up to 1\.49.*\[-1, 1\]: scale"):
        warnings_of(tmp_path, **SWINGS | {"actions": SWINGS["actions"] + np.float32(0.5)})


def test_checks_of_a_million_rows_are_quick(read):
    import time

    from envs import data_card, data_checks

    rows, marked = np.random.default_rng(0).normal(size=(1_000_000, 8)).astype(np.float32), np.zeros(1_000_000, bool)
    marked[999::1000] = True
    dataset = {"actions": rows, "rewards": rows[:, 0], "masks": rows[:, 0], "terminals": marked.astype(np.float32)}
    clock = time.process_time()
    data_checks.check_jumps(Path(), rows, marked, False)
    data_checks.check_successors(Path(), "", rows, np.roll(rows, -1, axis=0), marked, marked)
    data_checks.check_rewards(Path(), dataset)
    data_checks.check_actions(Path(), dataset)
    data_card.make_card(dataset, False, ends={}, unused=0, unused_reward=0, units="", bounds="")
    assert time.process_time() - clock < 2
