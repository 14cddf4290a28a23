"""State of a running `lerobot-record` (LeRobot 0.4) that plugins are not given, read from its stack frames.

Its loop calls robot and teleoperator alike while recording an episode and during a reset, without the episode's index,
and ends a phase early only by flags in `events`, which LeRobot sets from a keyboard listener that needs a display.
Nothing of LeRobot is replaced; the flags are set as a key would set them.
"""

import dataclasses
import math
import sys
import time
from types import FrameType
from typing import Any, NoReturn

_MARGIN = 1.0  # Seconds; the rest of a frame after a plugin's call takes less.


@dataclasses.dataclass(frozen=True)
class Recording:
    """State of a recording at one moment.

    Attributes:
        robot: LeRobot's robot.
        dataset: the LeRobotDataset being recorded.
        events: LeRobot's flags; empty before both devices are connected.
        has_policy: whether a policy acts, so that the teleoperator is only used during resets.
        resetting: whether the scene is being reset. The previous episode is then not saved yet.
        deadline: time at which LeRobot ends the episode or the reset, in seconds of `time.perf_counter`.
    """

    robot: Any
    dataset: Any
    events: dict[str, bool]
    has_policy: bool
    resetting: bool
    deadline: float

    @property
    def saved(self) -> int:
        """Returns the number of saved episodes: the index of the current one, or of the one before the reset."""
        return self.dataset.meta.total_episodes

    @property
    def frames(self) -> int:
        """Returns the number of frames recorded so far in the current episode."""
        return (self.dataset.episode_buffer or {"size": 0})["size"]

    def end_phase(self, again: bool = False) -> None:
        """Ends the episode or the reset; with `again`, the episode is discarded and recorded again."""
        self.events["rerecord_episode"] |= again
        left = self.deadline - time.perf_counter()
        if left > _MARGIN:
            self.events["exit_early"] = True
        else:  # LeRobot would read the flag too late, and end the next episode before its first frame.
            time.sleep(max(left, 0))


def current() -> Recording | None:
    """Returns the recording that calls the caller; None in another program."""
    frame: FrameType | None = sys._getframe(1)
    resetting, deadline = False, math.inf
    while frame is not None:
        if frame.f_code.co_filename.endswith("lerobot_record.py"):
            found = frame.f_locals
            if frame.f_code.co_name == "record_loop":
                resetting, deadline = found["dataset"] is None, found["start_episode_t"] + found["control_time_s"]
            elif frame.f_code.co_name == "record" and found.get("dataset") is not None:
                events, has_policy = found.get("events", {}), found.get("policy") is not None
                return Recording(found["robot"], found["dataset"], events, has_policy, resetting, deadline)
        frame = frame.f_back
    return None


def fail(message: str) -> NoReturn:
    """Ends the program with a one-line error and exit code 2, after invalid input."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
