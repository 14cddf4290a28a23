"""Environments of a user's own that do not keep to Gymnasium's interface."""

import re
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict

from envs.tasks import make_env
from envs.wrappers import Checked
from utils.errors import UserError

STATE, ACTION = np.zeros(2, np.float32), np.zeros(1, np.float32)
GOOD = (STATE, 0.5, False, True, {"success": True})


class Odd(gymnasium.Env):
    """Gives what it is told to give."""

    observation_space, action_space = Box(-1, 1, (2,)), Box(-1, 1, (1,))

    def __init__(self, first=(STATE, {}), step=GOOD, picture=None):
        self.first, self.outcome, self.picture = first, step, picture

    def reset(self, *, seed=None, options=None):
        return self.first

    def step(self, action):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def render(self):
        return self.picture.shape


class NoSeed(Odd):
    def reset(self):
        return self.first


class NoOptions(Odd):
    def reset(self, seed=None):
        return self.first


class Pictures(Odd):
    observation_space = Dict({"state": Box(-1, 1, (2,)), "images": Box(0, 255, (1, 4, 4, 3), np.uint8)})


def line_of(function):
    code = function.__code__
    return f"{code.co_filename}, line {code.co_firstlineno}: "


def rejected(call, *arguments):
    """The one line that a call ends in."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.check
@pytest.mark.parametrize("first", [STATE, [0.0, 0.0], None, (STATE, None), (STATE, {}, {}), (1.0, 2.0)])
def test_resets_of_another_interface(first):
    line = rejected(Checked(Odd(first)).reset)
    assert line.startswith(f"reset failed at {line_of(Odd.reset)}")
    assert "reset(*, seed=None, options=None) must return (observation, info)" in line


@pytest.mark.check
@pytest.mark.parametrize(("kind", "name"), [(NoSeed, "seed"), (NoOptions, "options")])
def test_resets_without_a_parameter(kind, name):
    line = rejected(Checked(kind()).reset)
    assert line.startswith(f"reset failed at {line_of(kind.reset)}") and f"'{name}'; reset(*, seed=None" in line


@pytest.mark.check
@pytest.mark.parametrize(
    ("place", "value", "hint"),
    [
        (0, np.zeros(3), "shape [3]; the observation space says [2]"),
        (0, np.zeros((1, 2)), "shape [1, 2]"),
        (0, None, "the observation is None"),
        (0, [[0.0], [0.0, 1.0]], "an array of numbers [2]"),
        (0, ["0", "1"], "an array of numbers [2]"),
        (1, None, "reward is None; it must be a number"),
        (1, "1", "reward is '1'"),
        (1, np.zeros(2), "reward is an array of float64, shape [2]"),
        (1, [], "reward is []"),
        (2, None, "terminated is None; it must be True or False"),
        (3, "no", "truncated is 'no'"),
        (4, None, "must return (observation, reward, terminated, truncated, info)"),
    ],
)
def test_steps_that_give_something_else(place, value, hint):
    outcome = (*GOOD[:place], value, *GOOD[place + 1 :])
    line = rejected(Checked(Odd(step=outcome)).step, ACTION)
    assert line.startswith(f"step failed at {line_of(Odd.step)}") and hint in line


@pytest.mark.check
@pytest.mark.parametrize("limit", [None, 5])
def test_a_step_of_four_values(limit):
    """Gym 0.21's, with and without the time limit that Gymnasium adds, in whose code it fails."""
    env = Odd(step=(STATE, 0.0, False, {}))
    env = Checked(gymnasium.wrappers.TimeLimit(env, limit) if limit else env)
    env.reset(seed=0)
    line = rejected(env.step, ACTION)
    assert line.startswith(f"step failed at {line_of(Odd.step)}") and "terminated, truncated, info)" in line


@pytest.mark.check
def test_numbers_in_other_clothes_are_taken_silently(recwarn):
    steps = [
        (np.zeros(2), np.array([0.5]), np.array([False]), np.array([[True]]), {}),
        ([0.0, 0.0], np.float32(0.5), 0, 1, {}),
        ((0, 0), np.array(0.5), np.False_, np.int64(1), {}),
        (np.zeros(2, int), [0.5], False, True, {}),
    ]
    for step in steps:
        observation, *numbers, info = Checked(Odd(step=step)).step(ACTION)
        assert isinstance(observation, np.ndarray) and observation.shape == (2,)
        assert numbers == [0.5, False, True] and list(map(type, numbers)) == [float, bool, bool] and info == {}
    assert not recwarn.list


@pytest.mark.check
def test_an_exception_is_in_a_file_that_the_line_names():
    line = rejected(Checked(Odd(step=KeyError("joint_7"))).step, ACTION)
    raising = line_of(Odd.step).rpartition(" ")[0].rpartition("line ")[2].rstrip(":")
    assert re.match(rf"step failed at {re.escape(__file__)}, line {int(raising) + 2}: KeyError: 'joint_7'; ", line)
    path = Path(line.rpartition("(traceback: ")[2].removesuffix(")"))
    assert "Traceback" in path.read_text()
    path.unlink()
    assert rejected(Checked(Odd()).render).startswith(f"render failed at {__file__}, line")


@pytest.mark.check
@pytest.mark.parametrize(
    ("observation", "hint"),
    [
        ({"state": STATE}, "the observation space has ['images', 'state']"),
        (STATE, "the observation space has"),
        ({"state": STATE, "images": np.zeros((4, 4, 3), np.uint8)}, "'images' has shape [4, 4, 3]"),
        ({"state": STATE, "images": np.zeros((1, 4, 4, 3))}, "'images' is float64; its space says uint8"),
    ],
)
def test_pictures_are_checked_too(observation, hint):
    assert hint in rejected(Checked(Pictures((observation, {}))).reset)
    good = {"state": STATE, "images": np.zeros((1, 4, 4, 3), np.uint8)}
    assert Checked(Pictures((good, {}))).reset()[0] is good


class Refuses(Odd):
    def __init__(self, error):
        raise error


@pytest.mark.check
@pytest.mark.parametrize("error", [AssertionError(["human"]), TypeError("no robot"), OSError("no port"), KeyError("x")])
def test_constructors_that_fail(error):
    gymnasium.register("Refuses-v0", entry_point=Refuses, kwargs={"error": error})
    try:
        line = rejected(make_env, "gym:Refuses-v0")
    finally:
        gymnasium.registry.pop("Refuses-v0")
    assert "cannot make the gymnasium environment 'Refuses-v0': it failed at " + __file__ in line
    assert type(error).__name__ in line
    Path(line.rpartition("(traceback: ")[2].removesuffix(")")).unlink()


@pytest.mark.check
def test_own_environments_are_checked_and_the_projects_are_not():
    assert isinstance(make_env("gym:Pendulum-v1").env, Checked)
    env = make_env("pointmaze-medium-navigate-singletask-task1-v0")
    while isinstance(env, gymnasium.Wrapper):
        assert not isinstance(env, Checked)
        env = env.env
