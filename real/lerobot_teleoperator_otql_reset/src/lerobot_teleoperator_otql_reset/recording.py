"""What a running `lerobot-record` (LeRobot 0.4) knows and tells no plugin, read from its stack frames.

Its loop calls robot and teleoperator alike whether it records an episode or lets the scene be reset, does not say which
episode that is, and ends a phase early only when `events` says so, which LeRobot sets from a keyboard listener that
needs a display. Nothing of LeRobot is replaced; what is set in `events` is what a key would set.
"""

import dataclasses
import math
import sys
import time
from types import FrameType
from typing import Any, NoReturn

_MARGIN = 1.0  # Seconds; what is left of a frame after a plugin's call takes less.


@dataclasses.dataclass(frozen=True)
class Recording:
    """One moment of a recording.

    Attributes:
        robot: LeRobot's robot.
        dataset: the LeRobotDataset that is recorded.
        events: LeRobot's flags; empty before both devices are connected.
        has_policy: whether a policy acts, and the teleoperator only while the scene is reset.
        resetting: whether the scene is being reset. The episode before is then not saved yet.
        deadline: when LeRobot's clock ends the episode or the reset, in seconds of `time.perf_counter`.
    """

    robot: Any
    dataset: Any
    events: dict[str, bool]
    has_policy: bool
    resetting: bool
    deadline: float

    @property
    def saved(self) -> int:
        """Number of saved episodes: the index of the one that is recorded, or was before the reset."""
        return self.dataset.meta.total_episodes

    @property
    def frames(self) -> int:
        """Frames of the episode that is recorded, so far."""
        return (self.dataset.episode_buffer or {"size": 0})["size"]

    def end_phase(self, again: bool = False) -> None:
        """Ends the episode or the reset; `again`: the episode is thrown away and recorded anew."""
        self.events["rerecord_episode"] |= again
        left = self.deadline - time.perf_counter()
        if left > _MARGIN:
            self.events["exit_early"] = True
        else:  # A flag that LeRobot does not read any more would end the next episode before its first frame.
            time.sleep(max(left, 0))


def current() -> Recording | None:
    """The recording that the caller is called from; None if it is another program."""
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


def refuse(message: str) -> NoReturn:
    """Ends the program over a user's mistake: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
