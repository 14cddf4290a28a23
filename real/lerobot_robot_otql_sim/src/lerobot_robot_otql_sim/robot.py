"""`otql_sim`: the tasks of envs/panda as a robot, to test the whole LeRobot workflow without hardware.

It has no clock: an action is 0.1 s of simulated time; `--dataset.fps` only sets the rate of actions. In lerobot-record
it ends an episode when the task is solved or the step limit is reached, writes success to `labels.jsonl` in the
dataset's folder, and resets itself, with any teleoperator or none. Episode i starts as demonstration i of
`envs.panda.demonstrate` with the same seed; recorded again, as its next attempt.
"""

import collections
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from lerobot.robots import Robot, RobotConfig
from lerobot_teleoperator_otql_reset import labels
from lerobot_teleoperator_otql_reset.recording import Recording, current, fail


def _axes(name: str, axes: str = "xyz") -> list[str]:
    return [f"{name}.{axis}" for axis in axes]


def _box(name: str) -> list[str]:
    rotation = [f"{name}_rotation.{row}{column}" for column in (1, 2) for row in (1, 2, 3)]
    vectors = [f"{name}{what}" for what in ("", "_from_hand", "_to_plane", "_velocity", "_spin")]
    position, relative, to_plane, velocity, spin = map(_axes, vectors)
    return [*position, *relative, *to_plane, *rotation, *velocity, *spin]


# Names of the state dimensions; units and meaning: envs/panda.
ARM = [
    *(f"joint{i}.pos" for i in range(1, 8)),
    *(f"joint{i}.vel" for i in range(1, 8)),
    *_axes("hand"),
    *_axes("hand_velocity"),
    *_axes("lead"),
    "gripper.pos",
    "gripper.vel",
]
_MICROWAVE = ["door.pos", "door.vel", *_axes("handle"), *_axes("handle_from_hand"), "oven.x", "oven.y", "oven.yaw"]
STATES = {
    "ArrangeBoxes-v0": [*ARM, *_box("red"), *_box("blue")],
    "OpenMicrowave-v0": [*ARM, *_MICROWAVE],
}
ACTIONS = ["hand.x", "hand.y", "hand.z", "gripper"]
CAMERAS = ("front", "wrist")  # in the order of envs.panda.arm


@RobotConfig.register_subclass("otql_sim")
@dataclasses.dataclass
class OtqlSimConfig(RobotConfig):
    """Settings.

    Attributes:
        task: 'ArrangeBoxes-v0' or 'OpenMicrowave-v0'.
        seed: of the initial states of episodes.
        max_steps: step limit; default: that of the task.
        only_successes: discard failed episodes and record them again, as for demonstrations.
        image_size: side (pixels) of the images of two cameras, `front` and `wrist`; the state is then only that of the
            arm, as for a real robot. 0: no cameras.
    """

    task: str = "OpenMicrowave-v0"
    seed: int = 0
    max_steps: int | None = None
    only_successes: bool = False
    image_size: int = 0


class OtqlSim(Robot):
    """Simulated robot; see the module's docstring.

    Attributes:
        episode: (index, attempt) of the current episode.
        steps: number of its actions.
        ended: whether it was solved or reached the step limit.
    """

    config_class, name = OtqlSimConfig, "otql_sim"
    is_calibrated = True
    resets_itself = True

    def __init__(self, config: OtqlSimConfig):
        super().__init__(config)
        if config.task not in STATES:
            fail(f"unknown task '{config.task}'; use --robot.task={' or '.join(STATES)}")
        if config.seed < 0 or (config.max_steps is not None and config.max_steps < 1):
            fail("--robot.seed must be at least 0 and --robot.max_steps at least 1")
        if not 0 <= config.image_size <= 1440:
            fail("--robot.image_size must be between 0 (no cameras) and 1440")
        self.config = config
        self.cameras = CAMERAS if config.image_size else ()
        self._states = ARM if config.image_size else STATES[config.task]
        self.episode, self.steps, self.ended = (0, 0), 0, False
        self._env: Any = None
        self._observation: Any = None  # the environment's
        self._expert_seed = 0
        self._attempts: collections.Counter = collections.Counter()

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
        return self._env is not None

    def connect(self, calibrate: bool = True) -> None:
        """Starts the simulation and its first episode."""
        self._env = _make_env(self.config)
        recording = current()
        self._begin(recording.saved if recording else 0)

    def _begin(self, index: int) -> None:
        """Starts an episode."""
        self.episode = index, self._attempts[index]
        self._attempts[index] += 1
        sequence = np.random.SeedSequence(entropy=self.config.seed, spawn_key=self.episode)
        env_seed, self._expert_seed = (int(word) for word in sequence.generate_state(2))
        self._observation, _ = self._env.reset(seed=env_seed)
        self.steps, self.ended = 0, False

    def get_observation(self) -> dict[str, Any]:
        """Returns state and images. During a reset, or after the end of an episode, starts a new one first."""
        recording, (index, _) = current(), self.episode
        if recording is None:
            if self.ended:
                self._begin(index + 1)
        elif recording.resetting:
            if self.steps:
                again = recording.events["rerecord_episode"]
                if not self.ended and not again:
                    self._out_of_time(recording)
                self._begin(index if again else index + 1)
            recording.end_phase()
        elif recording.frames == 0 and (self.steps or index != recording.saved):  # Without a reset.
            if not self.ended and index < recording.saved:
                self._out_of_time(recording)
            self._begin(recording.saved)
        state, images = self._observation, ()
        if self.cameras:
            state, images = state["state"], state["images"]
        return dict(zip((*self._states, *self.cameras), (*state.tolist(), *images), strict=True))

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        """Executes an action clipped to [-1, 1], except during a reset; returns the clipped action."""
        recording = current()
        sent = np.clip([action[name] for name in ACTIONS], -1, 1).astype(np.float32)
        if not self.ended and not (recording and recording.resetting):
            self._observation, _, success, truncated, _ = self._env.step(sent)
            self.steps += 1
            self.ended = success or truncated
            if self.ended and recording:
                labels.write(recording.dataset.root, self.episode[0], success, self.steps)
                recording.end_phase(again=self.config.only_successes and not success)
        return dict(zip(ACTIONS, sent.tolist(), strict=True))

    def _out_of_time(self, recording: Recording) -> None:
        """Labels an episode that LeRobot's time limit or a person ended."""
        index = self.episode[0]
        labels.write(recording.dataset.root, index, False, self.steps)
        logging.warning(f"Episode {index} was ended after {self.steps} steps: is --dataset.episode_time_s too short?")

    def expert_actions(self, expert_noise: float = 1.0) -> Iterator[np.ndarray]:
        """Returns the actions [4] of the task's scripted expert for the episode that has just started."""
        from envs.panda.experts import EXPERTS

        return EXPERTS[self.config.task](self._env, np.random.default_rng(self._expert_seed), expert_noise).actions()

    def disconnect(self) -> None:
        """Ends the simulation."""
        recording = current()
        if recording:
            if self.steps and not self.ended and recording.saved > self.episode[0]:
                self._out_of_time(recording)
            labels.keep(recording.dataset.root, recording.saved)
        self._env.close()
        self._env = None

    def calibrate(self) -> None:
        """Does nothing."""

    def configure(self) -> None:
        """Does nothing."""


def _make_env(config: OtqlSimConfig) -> Any:
    """Returns the task's environment, unwrapped."""
    try:
        import gymnasium

        import envs.panda  # noqa: F401  registers the tasks
        from utils.errors import UserError
        from utils.system.rendering import set_rendering_backend
    except ImportError as error:
        fail(f"otql_sim needs envs/panda ({error}); in the otql repository: pip install --no-deps -e .")
    settings = {"max_steps": config.max_steps, "image_size": config.image_size}
    try:
        if config.image_size:
            set_rendering_backend()
        return gymnasium.make(config.task, disable_env_checker=True, **settings).unwrapped
    except UserError as error:
        fail(str(error))
    except ImportError as error:
        fail(f"otql_sim needs mujoco ({error}): pip install mujoco")
