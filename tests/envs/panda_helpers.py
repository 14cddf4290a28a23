"""What the tests of the Panda tasks share."""

import importlib.util

import gymnasium
import numpy as np
import pytest

import envs.panda  # noqa: F401  registers the tasks

needs_model = pytest.mark.skipif(importlib.util.find_spec("gym_hil") is None, reason="gym-hil is not installed")


def make(name, **kwargs):
    """A task's environment, unwrapped."""
    return gymnasium.make(name, **kwargs).unwrapped


def run(env, actions):
    """What is observed after each action."""
    return np.stack([env.step(np.asarray(action))[0] for action in actions])
