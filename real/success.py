"""Which recorded episodes solved the task: from labels, from what was recorded, or from a person at the terminal.

Labels are JSON lines (`{"episode_index": 0, "success": true, "steps": 87}`; `steps`, the number of frames, may be
missing and is checked if there) or, if the name ends in .csv, a table with these columns.
"""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from real.lerobot_files import Episode, Recording, videos_of
from utils.errors import UserError
from utils.files import atomic_write_text

LABELS = "labels.jsonl"  # In a dataset's folder; written by the plugins and by `_ask`.
_WORDS = {"true": True, "1": True, "yes": True, "y": True, "success": True}
_WORDS |= {"false": False, "0": False, "no": False, "n": False, "failure": False}

Lengths = list[tuple[bool, int]]


def label_files(roots: Sequence[str | Path], labels: Sequence[str | Path]) -> list[Path | None]:
    """The file of labels that was given for each dataset: one of `labels` for each of `roots`, or none at all.

    Raises:
        UserError: their numbers differ.
    """
    if labels and len(labels) != len(roots):
        datasets = ", ".join(map(str, roots)) or "no dataset"
        raise UserError(f"there are {len(labels)} files of --labels for {datasets}; give one for each")
    return [Path(file).expanduser() for file in labels] or [None] * len(roots)


def successes(recording: Recording, labels: Path | None) -> Lengths:
    """For each episode, whether it solved the task, and how many of its frames count: those up to the first success.

    The first of these that there is decides: `labels`; `labels.jsonl` in the dataset's folder; 'next.success';
    'next.reward', if it is sparse (0 and 1, or −1 and 0); the person at the terminal, whose answers are kept in
    `labels.jsonl`.

    Raises:
        UserError: labels that do not fit, or none and nobody to ask.
    """
    episodes = recording.episodes
    if labels is not None or (recording.root / LABELS).exists():
        path = labels or recording.root / LABELS
        known = read_labels(path, [len(episode.actions) for episode in episodes])
        if labels is not None and (missing := [i for i in range(len(episodes)) if i not in known]):
            raise UserError(f"{path} has no label for episode {missing[0]} of {recording.root}; add it")
    elif any(episode.outcomes for episode in episodes):
        return [_recorded(recording, episode) for episode in episodes]
    else:
        known = {}
    known = _ask(recording, known)
    return [(known[i], len(episode.actions)) for i, episode in enumerate(episodes)]


def _recorded(recording: Recording, episode: Episode) -> tuple[bool, int]:
    """Success and frames of an episode from what was recorded at each step."""
    if "next.success" in episode.outcomes:
        solved = episode.outcomes["next.success"] > 0
    else:
        kinds = set(np.unique(np.concatenate([one.outcomes["next.reward"] for one in recording.episodes])).tolist())
        if not (kinds <= {0.0, 1.0} or kinds <= {-1.0, 0.0}):
            raise UserError(f"'next.reward' in {recording.root} is not sparse (0 and 1, or -1 and 0); give --labels")
        solved = episode.outcomes["next.reward"] == (0.0 if -1.0 in kinds else 1.0)
    return (True, int(solved.argmax()) + 1) if solved.any() else (False, len(solved))


def read_labels(path: Path, lengths: list[int]) -> dict[int, bool]:
    """Reads a file of labels.

    Args:
        path: the file.
        lengths: number of frames of each episode of the dataset.

    Raises:
        UserError: no such file, or a line that is none, is unknown, or does not fit the dataset.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the labels {path}: {getattr(error, 'strerror', None) or error}") from error
    known: dict[int, bool] = {}
    for number, label in _lines(path, text):
        place = f"line {number} of {path}"
        try:
            episode, steps = int(label["episode_index"]), int(label.get("steps") or 0)
            success = _WORDS.get(str(label["success"]).strip().lower())
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{place} is no label; write an episode_index and a success") from None
        if success is None:
            raise UserError(f"{place} says success '{label['success']}'; write true or false")
        if not 0 <= episode < len(lengths):
            raise UserError(f"{place} is about episode {episode}; the dataset has 0 to {len(lengths) - 1}")
        if episode in known:
            raise UserError(f"{place} is a second label for episode {episode}; remove one")
        if steps not in (0, lengths[episode]):
            raise UserError(f"{place} says {steps} steps, the episode has {lengths[episode]}; give its own labels")
        known[episode] = success
    return known


def _lines(path: Path, text: str) -> list[tuple[int, Any]]:
    """Line numbers and what stands there, as far as it can be read."""
    if path.suffix == ".csv":
        return list(enumerate(csv.DictReader(text.splitlines()), 2))
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            lines.append((number, json.loads(line) if line.strip() else None))
        except ValueError:
            lines.append((number, {}))
    return [(number, label) for number, label in lines if label is not None]


def _ask(recording: Recording, known: dict[int, bool]) -> dict[int, bool]:
    """Asks for the episodes without a label, and keeps each answer at once."""
    known, root = dict(known), recording.root
    for i, episode in enumerate(recording.episodes):
        if i in known:
            continue
        if not sys.stdin.isatty():
            raise UserError(f"success of episode {i} of {root} is unknown; give --labels, or start this at a terminal")
        seen = "".join(f"\n  {video}" for video in videos_of(root, i))
        answer = ""
        question = f"Episode {i} of {root}, {len(episode.actions)} frames.{seen}\n  success? [y/n] "
        while answer not in ("y", "n"):
            try:
                answer = input(question).lower()[:1]
            except EOFError:
                raise UserError(f"success of episode {i} of {root} is unknown; answer, or give --labels") from None
        known[i] = answer == "y"
        lengths = {j: len(recording.episodes[j].actions) for j in sorted(known)}
        labels = [{"episode_index": j, "success": known[j], "steps": steps} for j, steps in lengths.items()]
        atomic_write_text(root / LABELS, "".join(json.dumps(label) + "\n" for label in labels))
    return known
