"""The data card: a summary of a dataset, printed and stored with a run."""

import dataclasses
import sys
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from envs.action_units import ranges
from envs.minari_store import normalized_score
from envs.npz import Arrays

_OF_SUCCESS = ((-1.0, 0.0), (0.0, 1.0))  # Sparse rewards, each without and with success.


@dataclasses.dataclass(frozen=True)
class DataCard:
    """Summary of a dataset.

    Attributes:
        episodes: number of episodes.
        transitions: number of transitions.
        lengths: minimum, median and maximum over episodes.
        returns: minimum, mean and maximum over episodes.
        solved: number of episodes with a solved state; None: rewards do not tell.
        action_low: minimum of each dimension, as trained on.
        action_high: maximum of each dimension, as trained on.
        ends: kind of end → number of episodes.
        unused: number of steps without a recorded next observation, which cannot be used.
        unused_reward: sum of their rewards.
        units: of the file's actions, 'scaled' or 'raw'.
        bounds: text of the environment's action bounds if it is rescaled, else ''.
        warnings: possible faults, one line each.
        observed: parts of the observations in their order, where a dataset names several.
        reference: returns that are scored as 0 and 1, where a dataset has them.
    """

    episodes: int
    transitions: int
    lengths: tuple[int, float, int]
    returns: tuple[float, float, float]
    solved: int | None
    action_low: Float[np.ndarray, " A"]
    action_high: Float[np.ndarray, " A"]
    ends: dict[str, int]
    unused: int
    unused_reward: float
    units: str
    bounds: str
    warnings: tuple[str, ...] = ()
    observed: str = ""
    reference: tuple[float, float] | None = None

    def lines(self) -> list[str]:
        """Returns the aligned lines of the card."""
        solved = "unknown: rewards do not tell" if self.solved is None else f"{self.solved} of {self.episodes} episodes"
        if self.solved == 0:
            solved += ": no example of success"
        rows = {
            "episodes": f"{self.episodes} with {self.transitions} transitions",
            "length": "min {:g}, median {:g}, max {:g}".format(*self.lengths),
            "return": "min {:.4g}, mean {:.4g}, max {:.4g}".format(*self.returns),
            "solved": solved,
            "actions": f"{len(self.action_low)} in {ranges(self.action_low, self.action_high)}",
            "ends": ", ".join(f"{count} {kind}" for kind, count in self.ends.items() if count),
        }
        if self.reference:
            rows["score"] = "min {:.3f}, mean {:.3f}, max {:.3f}".format(*self.scores())
            rows["score"] += " (0: return {:.4g}, 1: return {:.4g})".format(*self.reference)
        if self.observed:
            rows["observed"] = self.observed
        if self.bounds:
            told = "raw, rescaled the same way" if self.units == "raw" else "already scaled"
            rows["bounds"] = f"{self.bounds} in the environment, rescaled to [-1, 1]; actions of the file are {told}"
        if self.unused:
            lost = f" (sum of their rewards {self.unused_reward:.4g})" if self.unused_reward else ""
            rows["unused"] = f"{self.unused} transitions: no next observation recorded{lost}"
        return [f"  {name:9}{text}" for name, text in rows.items()]

    def scores(self) -> list[float]:
        """Returns minimum, mean and maximum of the normalised score; needs `reference`."""
        assert self.reference
        return [normalized_score(self.reference, value) for value in self.returns]

    def show(self) -> None:
        """Prints the card to stdout and its warnings to stderr."""
        print("\n".join(self.lines()), flush=True)
        self.warn()

    def warn(self) -> None:
        """Prints the warnings to stderr."""
        for warning in self.warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)

    def record(self) -> dict[str, Any]:
        """Returns the JSON values of the card that flags.json stores."""
        content = dataclasses.asdict(self)
        for name in ("lengths", "returns", "action_low", "action_high"):
            content[name] = [float(f"{value:.6g}") for value in content[name]]
        return content | {"unused_reward": float(f"{self.unused_reward:.6g}"), "warnings": list(self.warnings)}


def make_card(dataset: Arrays, masks_tell: bool, **of_the_file: Any) -> DataCard:
    """Returns the card of a dataset in the compact layout.

    Args:
        dataset: see envs/datasets.py.
        masks_tell: whether masks are 0 in solved states and only there, as OGBench's are.
        of_the_file: the attributes of `DataCard` that do not follow from the arrays.
    """
    followed = dataset["terminals"] == 0
    last = np.flatnonzero(~followed)
    first = np.append(0, last[:-1] + 1)
    # The last row of an episode is a state without a step.
    returns = np.add.reduceat(np.where(followed, dataset["rewards"], 0).astype(np.float64), first)
    lengths = last - first
    actions = dataset["actions"][followed] if followed.any() else dataset["actions"]
    solved = _solved(dataset, followed, masks_tell)
    return DataCard(
        episodes=len(last),
        transitions=int(followed.sum()),
        lengths=(int(lengths.min()), float(np.median(lengths)), int(lengths.max())),
        returns=(float(returns.min()), float(returns.mean()), float(returns.max())),
        solved=None if solved is None else int(np.maximum.reduceat(solved, first).sum()),
        action_low=actions.min(axis=0),
        action_high=actions.max(axis=0),
        **of_the_file,
    )


def _solved(dataset: Arrays, followed: Bool[np.ndarray, " N"], masks_tell: bool) -> Bool[np.ndarray, " N"] | None:
    """Returns the solved rows, or None if neither masks nor rewards tell."""
    masked = dataset["masks"] == 0
    if masks_tell:
        return masked
    kinds = np.unique(dataset["rewards"][followed])
    for without, solved in _OF_SUCCESS:
        if not kinds.size or not np.isin(kinds, (without, solved)).all():
            continue
        reached = followed & (dataset["rewards"] == solved)
        # A value of most rows is the absence of a penalty, or a reward for each step.
        if without in kinds and solved in kinds and reached.sum() <= followed.sum() / 2:
            return reached
    return masked if np.array_equal(kinds, [-1]) else None
