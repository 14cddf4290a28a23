"""`otql_expert`: the scripted expert of a simulated task as a teleoperator, for demonstrations without a person."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from lerobot.teleoperators import Teleoperator, TeleoperatorConfig
from lerobot_teleoperator_otql_reset.recording import current, fail

from lerobot_robot_otql_sim.robot import ACTIONS


@TeleoperatorConfig.register_subclass("otql_expert")
@dataclasses.dataclass
class OtqlExpertConfig(TeleoperatorConfig):
    """Settings; variation between episodes is drawn from the robot's seed.

    Attributes:
        expert_noise: scale of the noise on the expert's hand; 1 is a practised person's.
        tremor: former name of `expert_noise`.
    """

    expert_noise: float = 1.0
    tremor: float | None = None


class OtqlExpert(Teleoperator):
    """Teleoperator that acts on `otql_sim` in lerobot-record, with access to the simulation."""

    config_class, name = OtqlExpertConfig, "otql_expert"
    action_features = dict.fromkeys(ACTIONS, float)
    feedback_features: dict = {}
    is_calibrated = True
    is_connected = False

    def __init__(self, config: OtqlExpertConfig):
        super().__init__(config)
        self._noise = config.expert_noise if config.tremor is None else config.tremor
        if not self._noise >= 0:
            fail("--teleop.expert_noise must be at least 0")
        self._episode: tuple[int, int] | None = None
        self._actions: Iterator[np.ndarray] = iter(())

    def connect(self, calibrate: bool = True) -> None:
        """Checks that lerobot-record runs with `otql_sim`."""
        recording = current()
        if recording is None or recording.robot.name != "otql_sim":
            fail("otql_expert acts in lerobot-record on --robot.type=otql_sim only")
        self.is_connected = True

    def get_action(self) -> dict[str, float]:
        """Returns the expert's next action, or zeros during a reset."""
        recording = current()
        assert recording is not None  # `connect` rejects any other use.
        if recording.resetting:
            return dict.fromkeys(ACTIONS, 0.0)
        if recording.robot.episode != self._episode:
            self._episode, self._actions = recording.robot.episode, recording.robot.expert_actions(self._noise)
        # Rounded as it is executed and recorded.
        return dict(zip(ACTIONS, next(self._actions).astype(np.float32).tolist(), strict=True))

    def disconnect(self) -> None:
        """Disconnects."""
        self.is_connected = False

    def calibrate(self) -> None:
        """Does nothing."""

    def configure(self) -> None:
        """Does nothing."""

    def send_feedback(self, feedback: dict[str, Any]) -> None:
        """Does nothing."""
