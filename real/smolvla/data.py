"""Recordings as rows that windows are cut from: the states, actions and outcomes of datasets, in one line.

A frame holds an observation and the action taken in it. An episode that solved the task ends with the action that did;
in any other, the last frame serves as the state that the one before led to. Rewards are −1 a step, and 0 for a solved
episode's last one, which terminates.
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
        states: [N, o]. actions: [N, A].
        frames: [N, 2] int64: which dataset, and which of its frames.
        ends: [N] int64, the row after the episode's last.
        solved: [N] bool, whether the episode solved the task.
        demonstrated: [N] bool, whether the frame is of a demonstration.
    """

    states: Tensor
    actions: Tensor
    frames: Tensor
    ends: Tensor
    solved: Tensor
    demonstrated: Tensor

    def starts(self, horizon: int) -> Tensor:
        """Rows [S] at which a window of `horizon` steps is a sample: it ends in the episode, or with its success."""
        rows = torch.arange(len(self.states))
        return rows[self.solved | (rows + horizon < self.ends)]

    def windows(self, start: Tensor, horizon: int, chunk: int, discount: float) -> dict[str, Tensor]:
        """Windows that begin at rows `start` [m].

        A window that meets a success is summed to it and has no bootstrap. Actions beyond an episode's end repeat its
        last one, and are masked out.

        Returns:
            rewards R = Σ_{i<H} γ^i r_{t+i} [m], masks [m] (0: no bootstrap), next [m] (the row t + H), actions
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
    """Returns LeRobot's statistics of demonstrations, with no joint's deviation that of its jitter at rest.

    As for the import; see real/statistics.py.
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
        demos: folders of demonstrations; those that say nothing of success are successes.
        rollouts: folders of rollouts.
        labels: files of labels, one for each of the rollouts, or none: see `real.episode_labels.successes`.
        normalise: states [N, o] and actions [N, A] as recorded → as the policy has them.

    Raises:
        UserError: a dataset or its labels are faulty, or datasets are not of one robot.
    """
    files = [None] * len(demos) + label_files(rollouts, labels)
    recordings = [read_recording(root, [STATE], ACTION) for root in [*demos, *rollouts]]
    first = recordings[0]
    for other in recordings[1:]:
        for what in ("fps", "state_names", "action_names"):
            if getattr(other, what) != getattr(first, what):
                raise UserError(f"{first.root} and {other.root} differ in {what}: they do not go together")
    parts: list[dict[str, Any]] = []
    for number, (recording, file) in enumerate(zip(recordings, files, strict=True)):
        demonstrated, at = number < len(demos), 0
        for episode, (success, length) in zip(
            recording.episodes, _outcomes(recording, demonstrated, file), strict=True
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


def _outcomes(recording: Recording, demonstrated: bool, labels: Path | None) -> Lengths:
    """`successes`, but demonstrations that say nothing of it are some."""
    silent = not (recording.root / LABELS).exists() and not any(episode.outcomes for episode in recording.episodes)
    if demonstrated and silent:
        return [(True, len(episode.actions)) for episode in recording.episodes]
    return successes(recording, labels)
