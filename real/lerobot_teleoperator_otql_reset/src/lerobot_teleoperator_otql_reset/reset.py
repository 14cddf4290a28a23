"""`otql_reset`: the teleoperator of policy runs, called only while the scene is reset.

Without a teleoperator, LeRobot 0.4's loop never leaves the reset that follows a policy's episode. This one needs no
hardware: at the terminal it asks whether the episode succeeded (`r`: throw it away and record it again), keeps the
arm where it is until Enter says that the scene is reset, and ends the phase. Ctrl-C or Ctrl-D at a question saves the
episode and ends the recording. A robot that resets itself (`otql_sim`) is not waited for. The answers go to
`labels.jsonl` in the dataset's folder.
"""

import contextlib
import dataclasses
import sys
from typing import Any

from lerobot.teleoperators import Teleoperator, TeleoperatorConfig

from lerobot_teleoperator_otql_reset import labels
from lerobot_teleoperator_otql_reset.recording import Recording, current, refuse


@TeleoperatorConfig.register_subclass("otql_reset")
@dataclasses.dataclass
class OtqlResetConfig(TeleoperatorConfig):
    """Settings.

    Attributes:
        ask: ask for the success of each episode; without, the import asks.
        hold: action that keeps the robot still; default: its position as observed, where actions are positions.
    """

    ask: bool = True
    hold: dict[str, float] | None = None


class OtqlReset(Teleoperator):
    """See the module's docstring."""

    config_class, name = OtqlResetConfig, "otql_reset"
    action_features: dict = {}
    feedback_features: dict = {}
    is_calibrated = True
    is_connected = False

    def __init__(self, config: OtqlResetConfig):
        super().__init__(config)
        self.config = config
        self._labelled = 0  # Episodes that need no answer any more.

    def connect(self, calibrate: bool = True) -> None:
        """Checks, before anything is recorded, that it can do its work."""
        recording = current()
        if recording is None:
            refuse("otql_reset serves lerobot-record of LeRobot 0.4 only; choose another teleoperator")
        if not recording.has_policy:
            refuse("otql_reset only resets; name what acts by --policy.path, or choose another teleoperator")
        self._labelled = recording.saved
        if not _resets_itself(recording):
            if not sys.stdin.isatty():
                refuse("otql_reset asks at the terminal, and there is none; start lerobot-record from a terminal")
            self._still(recording)
        self.is_connected = True

    def get_action(self) -> dict[str, float]:
        """Waits until the scene is reset, then ends the phase; returns an action that keeps the robot still."""
        recording = current()
        assert recording is not None  # `connect` refuses any other use.
        if _resets_itself(recording):
            return dict.fromkeys(recording.robot.action_features, 0.0)
        index, again = recording.saved, False
        try:
            if self.config.ask and not recording.events["rerecord_episode"]:
                answer = _ask(f"Episode {index}: success? [y]es, [n]o, [r]ecord it again: ", "ynr")
                again = answer == "r"
                if not again:
                    labels.write(recording.dataset.root, index, answer == "y", recording.frames)
                    self._labelled = index + 1
            _ask("Reset the scene, then press Enter: ")
        except (KeyboardInterrupt, EOFError):  # Raised further, the episode would be lost: LeRobot has not saved it.
            recording.events["stop_recording"] = True
        recording.end_phase(again)
        if recording.events["rerecord_episode"]:  # By `r`, or by ←, maybe after the answer.
            labels.keep(recording.dataset.root, index)
            self._labelled = index
        return self._still(recording)

    def _still(self, recording: Recording) -> dict[str, float]:
        """An action that keeps the robot where it is."""
        robot = recording.robot
        action = self.config.hold or robot.get_observation()
        missing = [key for key in robot.action_features if key not in action]
        if missing:
            refuse(f"no known action keeps {robot.name} still ('{missing[0]}' is not observed); set --teleop.hold")
        return {key: action[key] for key in robot.action_features}

    def disconnect(self) -> None:
        """Asks for the last episode, which no reset follows."""
        recording = current()
        self.is_connected = False
        if recording is None or _resets_itself(recording):
            return
        index = recording.saved - 1
        if self.config.ask and index >= self._labelled:
            with contextlib.suppress(KeyboardInterrupt, EOFError):  # The import asks again.
                answer = _ask(f"Episode {index}: success? [y]es, [n]o: ", "yn")
                labels.write(recording.dataset.root, index, answer == "y")
        labels.keep(recording.dataset.root, recording.saved)

    def calibrate(self) -> None:
        """There is nothing to calibrate."""

    def configure(self) -> None:
        """There is nothing to configure."""

    def send_feedback(self, feedback: dict[str, Any]) -> None:
        """There is nothing to feel."""


def _resets_itself(recording: Recording) -> bool:
    """Whether the robot needs nobody to reset its scene."""
    return getattr(recording.robot, "resets_itself", False)


def _ask(question: str, answers: str = "") -> str:
    """Asks until the answer begins with one of the letters; with none, takes any."""
    while True:
        answer = input(f"\n{question}").strip().lower()[:1]
        if not answers or (answer and answer in answers):
            return answer
