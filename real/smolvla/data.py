"""Windows of recordings: the concatenated states, actions and successes of datasets.

A frame holds an observation and the action taken in it. A successful episode ends with the action that solved the task;
in any other, the last frame serves as the successor of the one before. Rewards are −1 per step, and 0 for the last step
of a successful episode, which terminates.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from real.episode_labels import LABELS, Lengths, label_files, successes
from real.lerobot_dataset import Recording, read_recording
from real.statistics import resting, scale_of_resting
from utils.errors import UserError

STATE, ACTION = "observation.state", "action"


@dataclasses.dataclass(frozen=True)
class Rows:
    """N frames of all datasets, normalised.

    Attributes:
        states: [N, o].
        actions: [N, A].
        frames: [N, 2] int64, index of the dataset and of its frame.
        ends: [N] int64, the row after the episode's last.
        solved: [N] bool, True in successful episodes.
        demonstrated: [N] bool, True in demonstrations.
    """

    states: Tensor
    actions: Tensor
    frames: Tensor
    ends: Tensor
    solved: Tensor
    demonstrated: Tensor

    def starts(self, horizon: int) -> Tensor:
        """Returns rows [S] with a valid window of `horizon` steps: it ends within the episode, or with its success."""
        rows = torch.arange(len(self.states))
        return rows[self.solved | (rows + horizon < self.ends)]

    def windows(self, start: Tensor, horizon: int, chunk: int, discount: float) -> dict[str, Tensor]:
        """Returns windows that start at rows `start` [m].

        The rewards of a window with a success are summed up to it, without a bootstrap. Actions beyond the end of an
        episode repeat its last one, and are masked out.

        Returns:
            Rewards R = Σ_{i<H} γ^i r_{t+i} [m], masks [m] (0: no bootstrap), next [m] (the row t + H), actions
            [m, chunk, A], action_mask [m, chunk].
        """
        left = self.ends[start] - start
        terminal = self.solved[start] & (left <= horizon)
        steps = torch.arange(max(horizon, chunk))
        unpaid = (steps[:horizon] < left[:, None]) & ~(terminal[:, None] & (steps[:horizon] == left[:, None] - 1))
        held = start[:, None] + torch.minimum(steps[:chunk], left[:, None] - 1)
        return {
            "rewards": -(unpaid * discount ** steps[:horizon]).sum(dim=1),
            "masks": 1.0 - terminal.float(),
            "next": torch.minimum(start + horizon, self.ends[start] - 1),
            "actions": self.actions[held],
            "action_mask": (steps[:chunk] < left[:, None]).float(),
        }


def scales_at_rest(stats: dict[str, dict[str, Any]], demos: list[Path]) -> dict[str, dict[str, Any]]:
    """Returns LeRobot's statistics of demonstrations, with adjusted deviations of resting joints.

    The import adjusts them alike; see real/statistics.py.
    """
    recordings, stats = [read_recording(root, [STATE], ACTION) for root in demos], dict(stats)
    episodes = [episode for recording in recordings for episode in recording.episodes]
    lengths = [len(episode.actions) for episode in episodes]
    for name, part in ((STATE, "states"), (ACTION, "actions")):
        values = np.concatenate([getattr(episode, part) for episode in episodes]).astype(np.float64)
        deviation = np.asarray(stats[name]["std"])
        stats[name] = stats[name] | {"std": scale_of_resting(deviation, resting(values, lengths, deviation))}
    return stats


def read_rows(
    demos: list[Path],
    rollouts: list[Path],
    labels: list[Path],
    normalise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Rows:
    """Reads datasets.

    Args:
        demos: folders of demonstrations; those without any record of success are successes.
        rollouts: folders of rollouts.
        labels: files of labels, one for each of the rollouts, or none: see `real.episode_labels.successes`.
        normalise: converts recorded states [N, o] and actions [N, A] to those of the policy.

    Raises:
        UserError: a dataset or its labels are invalid, or the datasets are of different robots.
    """
    files = [None] * len(demos) + label_files(rollouts, labels)
    recordings = [read_recording(root, [STATE], ACTION) for root in [*demos, *rollouts]]
    first = recordings[0]
    for other in recordings[1:]:
        for what in ("fps", "state_names", "action_names"):
            if getattr(other, what) != getattr(first, what):
                raise UserError(f"{first.root} and {other.root} differ in {what}; use datasets of one robot")
    parts: list[dict[str, Any]] = []
    for number, (recording, file) in enumerate(zip(recordings, files, strict=True)):
        demonstrated, at = number < len(demos), 0
        for episode, (success, length) in zip(
            recording.episodes, _episode_success(recording, demonstrated, file), strict=True
        ):
            parts.append(
                {
                    "states": episode.states[:length],
                    "actions": episode.actions[:length],
                    "frames": np.stack([np.full(length, number), at + np.arange(length)], axis=1),
                    "ends": np.full(length, length),
                    "solved": np.full(length, success),
                    "demonstrated": np.full(length, demonstrated),
                }
            )
            at += len(episode.actions)
    columns = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
    lengths = torch.tensor([len(part["ends"]) for part in parts])
    columns["ends"] = torch.repeat_interleave(lengths.cumsum(0), lengths)
    columns["states"], columns["actions"] = normalise(columns["states"], columns["actions"])
    return Rows(**columns)


def _episode_success(recording: Recording, demonstrated: bool, labels: Path | None) -> Lengths:
    """Returns `successes`, where demonstrations without any record of success are successes."""
    silent = not (recording.root / LABELS).exists() and not any(episode.outcomes for episode in recording.episodes)
    if demonstrated and silent:
        return [(True, len(episode.actions)) for episode in recording.episodes]
    return successes(recording, labels)
