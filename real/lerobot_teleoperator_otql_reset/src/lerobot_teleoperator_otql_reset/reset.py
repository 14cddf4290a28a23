"""`otql_reset`: the teleoperator for recording policies, used only during resets.

Without a teleoperator, LeRobot 0.4's loop never leaves the reset after a policy's episode. This one needs no hardware:
it asks at the terminal whether the episode succeeded (`r`: discard it and record it again), holds the arm until Enter
confirms the reset, and ends the phase. Ctrl-C or Ctrl-D at a question saves the episode and ends the recording. Robots
that reset themselves (`otql_sim`) need no confirmation. The answers are stored in `labels.jsonl` in the dataset's
folder.
"""

import contextlib
import dataclasses
import sys
from typing import Any

from lerobot.teleoperators import Teleoperator, TeleoperatorConfig

from lerobot_teleoperator_otql_reset import labels
from lerobot_teleoperator_otql_reset.recording import Recording, current, fail


@TeleoperatorConfig.register_subclass("otql_reset")
@dataclasses.dataclass
class OtqlResetConfig(TeleoperatorConfig):
    """Settings.

    Attributes:
        ask: whether to ask for the success of each episode; otherwise the import asks.
        hold: action that keeps the robot still; default: its observed position, if actions are positions.
    """

    ask: bool = True
    hold: dict[str, float] | None = None


class OtqlReset(Teleoperator):
    """Teleoperator for resets; see the module's docstring."""

    config_class, name = OtqlResetConfig, "otql_reset"
    action_features: dict = {}
    feedback_features: dict = {}
    is_calibrated = True
    is_connected = False

    def __init__(self, config: OtqlResetConfig):
        super().__init__(config)
        self.config = config
        self._labelled = 0  # Number of labelled episodes.

    def connect(self, calibrate: bool = True) -> None:
        """Checks that the recording is supported, before it starts."""
        recording = current()
        if recording is None:
            fail("otql_reset serves lerobot-record of LeRobot 0.4 only; choose another teleoperator")
        if not recording.has_policy:
            fail("otql_reset only resets; name a policy by --policy.path, or choose another teleoperator")
        self._labelled = recording.saved
        if not _resets_itself(recording):
            if not sys.stdin.isatty():
                fail("otql_reset asks at the terminal, and there is none; run lerobot-record in a terminal")
            self._still(recording)
        self.is_connected = True

    def get_action(self) -> dict[str, float]:
        """Waits for the reset of the scene, ends the phase, and returns an action that keeps the robot still."""
        recording = current()
        assert recording is not None  # `connect` rejects any other use.
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
        except (KeyboardInterrupt, EOFError):  # Not raised again: LeRobot would lose the unsaved episode.
            recording.events["stop_recording"] = True
        recording.end_phase(again)
        if recording.events["rerecord_episode"]:  # By `r`, or by the key ←, possibly after the answer.
            labels.keep(recording.dataset.root, index)
            self._labelled = index
        return self._still(recording)

    def _still(self, recording: Recording) -> dict[str, float]:
        """Returns an action that keeps the robot still."""
        robot = recording.robot
        action = self.config.hold or robot.get_observation()
        missing = [key for key in robot.action_features if key not in action]
        if missing:
            fail(f"no known action keeps {robot.name} still ('{missing[0]}' is not observed); set --teleop.hold")
        return {key: action[key] for key in robot.action_features}

    def disconnect(self) -> None:
        """Asks for the success of the last episode, which no reset follows."""
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
        """Does nothing."""

    def configure(self) -> None:
        """Does nothing."""

    def send_feedback(self, feedback: dict[str, Any]) -> None:
        """Does nothing."""


def _resets_itself(recording: Recording) -> bool:
    """True if the robot resets its own scene."""
    return getattr(recording.robot, "resets_itself", False)


def _ask(question: str, answers: str = "") -> str:
    """Asks until the answer starts with one of the letters; without letters, accepts any answer."""
    while True:
        answer = input(f"\n{question}").strip().lower()[:1]
        if not answers or (answer and answer in answers):
            return answer
