"""`otql_expert`: the scripted expert of a simulated task as a teleoperator, for demonstrations without a person."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from lerobot.teleoperators import Teleoperator, TeleoperatorConfig
from lerobot_teleoperator_otql_reset.recording import current, refuse

from lerobot_robot_otql_sim.robot import ACTIONS


@TeleoperatorConfig.register_subclass("otql_expert")
@dataclasses.dataclass
class OtqlExpertConfig(TeleoperatorConfig):
    """Settings; what varies between its episodes is drawn from the robot's seed.

    Attributes:
        tremor: how unsteady its hand is; 1 is a practised person's.
    """

    tremor: float = 1.0


class OtqlExpert(Teleoperator):
    """Acts in lerobot-record on `otql_sim`, which it sees through."""

    config_class, name = OtqlExpertConfig, "otql_expert"
    action_features = dict.fromkeys(ACTIONS, float)
    feedback_features: dict = {}
    is_calibrated = True
    is_connected = False

    def __init__(self, config: OtqlExpertConfig):
        super().__init__(config)
        if not config.tremor >= 0:
            refuse("give --teleop.tremor a number of at least 0")
        self._tremor = config.tremor
        self._episode: tuple[int, int] | None = None
        self._actions: Iterator[np.ndarray] = iter(())

    def connect(self, calibrate: bool = True) -> None:
        """Checks that there is what it can act on."""
        recording = current()
        if recording is None or recording.robot.name != "otql_sim":
            refuse("otql_expert acts in lerobot-record on --robot.type=otql_sim only")
        self.is_connected = True

    def get_action(self) -> dict[str, float]:
        """The expert's next action; during a reset, none."""
        recording = current()
        assert recording is not None  # `connect` refuses any other use.
        if recording.resetting:
            return dict.fromkeys(ACTIONS, 0.0)
        if recording.robot.episode != self._episode:
            self._episode, self._actions = recording.robot.episode, recording.robot.expert_actions(self._tremor)
        # Rounded as it is executed and recorded.
        return dict(zip(ACTIONS, next(self._actions).astype(np.float32).tolist(), strict=True))

    def disconnect(self) -> None:
        """There is nothing to let go of."""
        self.is_connected = False

    def calibrate(self) -> None:
        """There is nothing to calibrate."""

    def configure(self) -> None:
        """There is nothing to configure."""

    def send_feedback(self, feedback: dict[str, Any]) -> None:
        """There is nothing to feel."""
