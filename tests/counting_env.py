"""A small environment whose outcome shows which actions it got, in which order, and every source of randomness."""

import os
import signal
import sys

import gymnasium
import numpy as np


class CountingEnv(gymnasium.Env):
    """Episodes of 1 to 40 steps; the short ones succeed, so that a bias to short episodes would show.

    Observation: [step, draw of the seeded generator, of NumPy's global one, of the action space]. `fault` is what
    happens in step 3 of an episode longer than 10: 'raise' or 'die'.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,))

    def __init__(self, fault=None, success=True, render_mode="rgb_array"):
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,))
        self.fault, self.success, self.render_mode = fault, success, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.state = 0, 0.0
        self.length = int(self.np_random.integers(1, 41))
        self.draws = [self.np_random.random(), np.random.random(), self.action_space.sample()[0]]
        return self._observation(), {}

    def step(self, action):
        assert np.abs(action).max() <= 1 and action.shape == (2,)
        self.steps += 1
        if self.steps == 3 and self.length > 10 and self.fault:
            if self.fault == "raise":
                raise ValueError("the gripper fell off")
            os.kill(os.getpid(), signal.SIGKILL)
        # The order of the actions and the global generator's draws in a step both show in the return.
        self.state = 0.5 * self.state + float(action @ [1.0, 0.3]) + 0.1 * np.random.random()
        info = {"success": self.length <= 20} if self.success else {}
        return self._observation(), self.state, self.steps == self.length, False, info

    def render(self):
        return None if self.render_mode is None else np.full((21, 30, 3), 5 * self.steps, np.uint8)

    def _observation(self):
        return np.array([self.steps, *self.draws])


def make_in_worker(**kwargs):
    """Makes the environment in a process that must know neither JAX and its types nor the agents."""
    assert not {"jax", "jaxtyping", "agents"} & set(sys.modules)
    return CountingEnv(**kwargs)
