"""Scales of recorded numbers: a joint that rests has none of its own jitter, one that moves little has its own."""

import json
from pathlib import Path

import numpy as np
import pytest

from real import import_rollouts as program
from real.dataset import Episode, Recording
from real.import_rollouts import import_rollouts
from real.statistics import offset_and_scale
from utils.errors import UserError

pytestmark = pytest.mark.check

LENGTHS = [150] * 6
TIME = np.concatenate([np.arange(length) for length in LENGTHS]) / 30
RANDOM = np.random.default_rng(7)


def swing(size: float, rate: float = 0.4) -> np.ndarray:
    """Smooth motion [N] of this standard deviation."""
    return size * 2**0.5 * np.sin(2 * np.pi * rate * TIME + RANDOM.uniform(0, 6))


def jitter(size: float) -> np.ndarray:
    return RANDOM.normal(0, size, len(TIME))


def columns(*numbers: np.ndarray) -> np.ndarray:
    return np.stack(numbers, axis=1).astype(np.float32)


def scales(values: np.ndarray, norm: str = "mean_std") -> np.ndarray:
    return offset_and_scale(values, LENGTHS, norm)[1]


@pytest.mark.parametrize("norm", ["mean_std", "min_max"])
@pytest.mark.parametrize(
    ("others", "still"),
    [
        ((0.4, 0.6), jitter(7e-5) + 1.2),  # Radians.
        ((0.4, 0.6), jitter(7e-6) - 0.3),
        ((0.4, 0.6), np.round(jitter(1e-3) / 1.5e-3) * 1.5e-3),  # A tick of an encoder of 12 bits.
        ((0.4, 0.6), swing(7e-5, 0.1)),  # A drift.
        ((0.4, 0.6), np.repeat(jitter(1e-3)[: len(LENGTHS)], LENGTHS) + jitter(1e-4)),  # Rests elsewhere each time.
        ((15, 25), np.round(jitter(0.05) / 0.088) * 0.088 + 40),  # Degrees.
        ((15, 25), np.full(len(TIME), 40.3)),  # Never changes.
    ],
)
def test_a_joint_that_rests_has_the_scale_of_those_that_move(others, still, norm):
    values = columns(swing(others[0]), still, swing(others[1]))
    own = scales(values, norm)
    np.testing.assert_allclose(own[1], (own[0] + own[2]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(own[[0, 2]], scales(values[:, [0, 2]], norm))


@pytest.mark.parametrize(
    ("others", "moves"),
    [
        ((0.4, 0.6), 0.02 + np.clip(swing(0.05), -0.02, 0.02)),  # A gripper in metres, 0 to 0.04.
        ((15, 25), 0.02 + np.clip(swing(0.05), -0.02, 0.02)),  # The same beside degrees.
        ((15, 25), (np.sin(2 * TIME) > 0) * 0.04),  # Open or closed.
        ((2, 2), RANDOM.uniform(0, 0.04, len(TIME))),  # No motion, but not small enough to be left out.
        ((0.002, 0.003), swing(0.001)),  # All of them small.
        ((0.002, 0.003), jitter(0.001)),
    ],
)
def test_what_moves_little_keeps_its_own_scale(others, moves):
    values = columns(swing(others[0]), moves, swing(others[1]))
    np.testing.assert_allclose(scales(values)[1], values[:, 1].std(), rtol=1e-3)


def test_thresholds_from_both_sides():
    """A share of what moves most, for what jitters; for what moves smoothly, a fine absolute one as well."""
    unit = jitter(1)
    unit = (unit - unit.mean()) / unit.std()
    for share, rests in ((0.99 * 5e-3, True), (1.01 * 5e-3, False)):
        values = columns(swing(1), swing(2), unit)
        values[:, 2] *= share * values[:, 1].std()
        assert (scales(values)[2] > 0.5) == rests
    for size, rests in ((1.9e-4, True), (2.1e-4, False)):
        assert (scales(columns(swing(1), swing(2), swing(size)))[2] > 0.5) == rests
    # Of a switch that stays for k frames, the mean square of the change is 4/k of the variance.
    for frames, rests in ((7, True), (9, False)):
        switch = 1e-3 * (np.arange(len(TIME)) // frames % 2)
        assert (scales(columns(swing(0.4), swing(0.5), switch))[2] > 0.1) == rests


def test_episodes_begin_anew():
    """The jump from one episode's end to the start of the next is no jitter."""
    ramp = np.tile(np.linspace(0, 1e-3, 10), len(TIME) // 10)
    scale = offset_and_scale(columns(swing(0.4), swing(0.5), ramp), [10] * (len(TIME) // 10), "mean_std")[1]
    np.testing.assert_allclose(scale[2], ramp.std(), rtol=1e-3)


def test_nothing_moves():
    """Scale 1: what never changes by more than rounding has no other."""
    for values in (np.tile(np.float32([7, 0.1]), (len(TIME), 1)), columns(jitter(1e-7), jitter(1e-8))):
        for norm in ("mean_std", "min_max"):
            np.testing.assert_array_equal(scales(values, norm), 1)
    np.testing.assert_allclose(scales(columns(jitter(2e-6), jitter(3e-6))), [2e-6, 3e-6], rtol=0.1)


def test_most_joints_rest():
    own = scales(columns(swing(0.5), *(jitter(7e-5) for _ in range(5))))
    np.testing.assert_allclose(own, own[0])


def recording(root: str, states: np.ndarray, actions: np.ndarray) -> Recording:
    """A recording of successes, as `read_recording` gives it."""
    parts = [slice(150 * i, 150 * (i + 1)) for i in range(len(LENGTHS))]
    outcomes = {"next.success": (np.arange(150) == 149).astype(np.float32)}
    episodes = [Episode(states[part], actions[part], outcomes) for part in parts]
    names = [f"{name}.pos" for name in "abc"[: states.shape[1]]]
    return Recording(Path(root), 30.0, {"observation.state": len(names)}, [], names, names, episodes)


@pytest.fixture
def recordings(monkeypatch):
    """Two recordings: joint b rests in 'first' and moves by 2 rad in 'second'."""
    moving = swing(0.4), swing(0.5)
    first, second = columns(moving[0], jitter(7e-5), moving[1]), columns(moving[0], swing(0.7), moving[1])
    known = {"first": recording("first", first, first), "second": recording("second", second, second)}
    monkeypatch.setattr(program, "read_recording", lambda root, features, action="action": known[str(root)])
    return known


def test_a_joint_that_moves_in_a_later_recording(recordings, tmp_path, capsys):
    """Its state stays of the size of the others', nothing is clipped, and what was recorded can be had back."""
    import_rollouts(["first"], tmp_path / "first.npz")
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == ["state b.pos rests", "action b.pos rests"]
    about = json.loads((tmp_path / "first.json").read_text())
    assert about["state_resting"] == about["action_resting"] == ["b.pos"]
    import_rollouts(["second"], tmp_path / "second.npz", stats=tmp_path / "first.npz")
    assert "scales from" not in capsys.readouterr().err
    about = json.loads((tmp_path / "first.normalisation.json").read_text())["stats"]
    for name in recordings:
        with np.load(tmp_path / f"{name}.npz") as file:
            data = dict(file)
        assert np.abs(data["observations"]).max() < 5
        recorded = np.concatenate([episode.states for episode in recordings[name].episodes])
        back = data["observations"] * data["state_scale"] + data["state_offset"]
        np.testing.assert_allclose(back, recorded, atol=1e-6)
        # The export's numbers are the same ones.
        np.testing.assert_array_equal(np.float32(about["observation.state"]["std"]), data["state_scale"])
        np.testing.assert_array_equal(np.float32(about["action"]["std"]), data["action_scale"])


def test_states_far_beyond_the_statistics_are_said(recordings, tmp_path, capsys):
    """Degrees after radians, or a file imported with the scale of a jitter."""
    import_rollouts(["second"], tmp_path / "first.npz")
    states = np.concatenate([episode.states for episode in recordings["first"].episodes])
    recordings["degrees"] = recording("degrees", states * 180, states)
    capsys.readouterr()
    import_rollouts(["degrees"], tmp_path / "b.npz", stats=tmp_path / "first.npz")
    (line,) = capsys.readouterr().err.splitlines()
    assert "were these recordings made in other units?" in line and "first.npz" in line


def test_a_file_that_was_not_imported_is_left_as_it_is(recordings, tmp_path):
    """An import may be made anew, another file is not written over."""
    (tmp_path / "data.npz").write_bytes(b"the user's")
    with pytest.raises(UserError, match=r"exists and was not imported .*; name another --output"):
        import_rollouts(["first"], tmp_path / "data.npz")
    assert (tmp_path / "data.npz").read_bytes() == b"the user's"
    import_rollouts(["first"], tmp_path / "a.npz")
    import_rollouts(["second"], tmp_path / "a.npz")
    assert json.loads((tmp_path / "a.json").read_text())["state_resting"] == []
