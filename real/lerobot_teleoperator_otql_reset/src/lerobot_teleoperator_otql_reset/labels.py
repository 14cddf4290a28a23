"""Success of recorded episodes, which LeRobot does not record: `labels.jsonl` in the dataset's folder.

One JSON object per line and episode: {"episode_index": 0, "success": true, "steps": 87}; `steps` is optional.
"""

import json
import os
from pathlib import Path

NAME = "labels.jsonl"


def write(root: Path, episode: int, success: bool, steps: int | None = None) -> None:
    """Adds the line of an episode atomically; drops lines of this and later episodes, from earlier attempts.

    Args:
        root: the dataset's folder.
        episode: index of the episode.
        success: whether it solved the task.
        steps: number of its frames, with which readers detect labels of another recording.
    """
    label = {"episode_index": episode, "success": bool(success)} | ({} if steps is None else {"steps": steps})
    _replace(root, [*_lines(root, episode), json.dumps(label)])


def keep(root: Path, episodes: int) -> None:
    """Drops the lines of episodes that were not saved, from index `episodes` on."""
    if (root / NAME).exists():
        _replace(root, _lines(root, episodes))


def _lines(root: Path, before: int) -> list[str]:
    """Returns the lines of the episodes with an index below `before`."""
    path = root / NAME
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line.strip() and json.loads(line)["episode_index"] < before]


def _replace(root: Path, lines: list[str]) -> None:
    """Replaces the file atomically."""
    temporary = root / f".{NAME}.tmp"
    with temporary.open("w") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(root / NAME)
