"""Steps at which a run logs, evaluates and saves."""

from dataclasses import dataclass

from utils.run.config import CommonConfig
from utils.run.update_loop import UPDATES_PER_CALL


@dataclass(frozen=True)
class Schedule:
    """Intervals of a run, in steps; 0: only at the ends of phases.

    Attributes:
        ends: steps at which a phase ends, ascending. log, evaluate, save: intervals.
    """

    ends: tuple[int, ...]
    log: int
    evaluate: int
    save: int

    @classmethod
    def from_config(cls, config: CommonConfig) -> "Schedule":
        """Returns the schedule that a config asks for."""
        return cls(config.phase_ends, config.log_interval, config.eval_interval, config.save_interval)

    def is_log(self, step: int) -> bool:
        """True if training metrics are logged at `step`."""
        return self._is_due(step, self.log)

    def is_eval(self, step: int) -> bool:
        """True if the policy is evaluated at `step`."""
        return self._is_due(step, self.evaluate)

    def is_save(self, step: int) -> bool:
        """True if a checkpoint is written at `step`."""
        return self._is_due(step, self.save)

    def next_stop(self, step: int, *intervals: int) -> int:
        """Returns the first step after `step` that training has to stop at.

        Args:
            step: of now. intervals: further ones, in steps; 0: none.
        """
        own = (UPDATES_PER_CALL, self.log, self.evaluate, self.save, *intervals)
        stops = [(step // interval + 1) * interval for interval in own if interval]
        return min(*(end for end in self.ends if end > step), *stops)

    def _is_due(self, step: int, interval: int) -> bool:
        return step in self.ends or bool(interval and step and step % interval == 0)
