"""`--robot.type=otql_sim`: the tasks of envs/panda as a robot, to try everything without hardware.

It has no clock: an action is 0.1 s of simulated time, so a dataset has 10 frames a second (`--dataset.fps`); `--fps` is
how fast it is driven. It ends an episode when the task is solved or the step limit is reached, and knows its success,
so otql-rollout asks for nothing. In other programs of LeRobot the next episode starts with the first observation after
the end.
"""

import collections
from dataclasses import dataclass
from typing import Any

import numpy as np
from lerobot.robots import Robot, RobotConfig

from lerobot_env_otql.tasks import ACTIONS, ARM, CAMERAS, STATES, check, fail, make


@RobotConfig.register_subclass("otql_sim")
@dataclass
class OtqlSimConfig(RobotConfig):
    """Settings: those of `OtqlEnv`, and the seed of the initial states of episodes."""

    task: str = "OpenMicrowave-v0"
    seed: int = 0
    max_steps: int | None = None
    image_size: int = 0


class OtqlSim(Robot):
    """Simulated robot; see the module's docstring.

    Attributes:
        env: the environment.
        success: of the episode that has ended; None while one runs.
        expert_seed: of the scripted expert in this episode.
    """

    config_class, name = OtqlSimConfig, "otql_sim"
    is_calibrated = True

    def __init__(self, config: OtqlSimConfig):
        super().__init__(config)
        check(config.task, config.max_steps, config.image_size)
        if config.seed < 0:
            fail("--robot.seed must be at least 0")
        self.config = config
        self.cameras = CAMERAS if config.image_size else ()
        self._states = ARM if config.image_size else STATES[config.task]
        self.env: Any = None
        self.success: bool | None = None
        self.expert_seed, self._episode = 0, 0
        self._observation: Any = None
        self._attempts: collections.Counter[int] = collections.Counter()

    @property
    def observation_features(self) -> dict[str, Any]:
        """Returns the names of the state dimensions, and the shapes of the cameras."""
        shape = (self.config.image_size, self.config.image_size, 3)
        return dict.fromkeys(self._states, float) | dict.fromkeys(self.cameras, shape)

    @property
    def action_features(self) -> dict[str, type]:
        """Returns the names of the action dimensions, each in [-1, 1]."""
        return dict.fromkeys(ACTIONS, float)

    @property
    def is_connected(self) -> bool:
        """True if the simulation runs."""
        return self.env is not None

    def connect(self, calibrate: bool = True) -> None:
        """Starts the simulation and a first episode."""
        self.env = make(self.config.task, self.config.max_steps, self.config.image_size)
        self.reset(0)
        self._attempts.clear()

    def reset(self, episode: int) -> None:
        """Starts an episode: number and attempt decide on its start, as in `envs.panda.demonstrate`."""
        self._episode, key = episode, (episode, self._attempts[episode])
        self._attempts[episode] += 1
        words = np.random.SeedSequence(entropy=self.config.seed, spawn_key=key).generate_state(2)
        self.expert_seed = int(words[1])
        self._observation, _ = self.env.reset(seed=int(words[0]))
        self.success = None

    def get_observation(self) -> dict[str, Any]:
        """Returns state and images; starts an episode if the last one has ended."""
        if self.success is not None:
            self.reset(self._episode + 1)
        state, images = self._observation, ()
        if self.cameras:
            state, images = state["state"], state["images"]
        return dict(zip((*self._states, *self.cameras), (*state.tolist(), *images), strict=True))

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        """Executes an action clipped to [-1, 1], none after the end of an episode; returns the clipped action."""
        sent = np.clip([action[name] for name in ACTIONS], -1, 1).astype(np.float32)
        if self.success is None:
            self._observation, _, success, truncated, _ = self.env.step(sent)
            self.success = success if success or truncated else None
        return dict(zip(ACTIONS, sent.tolist(), strict=True))

    def disconnect(self) -> None:
        """Ends the simulation."""
        self.env.close()
        self.env = None

    def calibrate(self) -> None:
        """Does nothing."""

    def configure(self) -> None:
        """Does nothing."""
