"""Success of recorded episodes: from the columns next.success and next.reward, or from a file of labels.

    python -m real.labels DATASET NEW --labels=FILE      (or --all=success)

copies a LeRobotDataset with both columns added, for programs that need them, such as lerobot-train; otql-rollout
records them itself.

Labels are JSON lines (`{"episode_index": 0, "success": true, "steps": 87}`; `steps`, the number of frames, is optional
and checked if given) or a table with these columns, as spreadsheets write it: cells separated by commas, semicolons or
tabs, in UTF-8 or UTF-16. Common names and words are accepted, in upper or lower case.
"""

import codecs
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from real.command_line import Parser
from real.dataset import Episode, Recording, open_dataset, read_recording
from utils.errors import UserError
from utils.system.entry_point import run_main

UNLABELLED = ("error", "success", "failure")  # What an episode without a record of success is.
_WORDS = dict.fromkeys(("true", "t", "1", "1.0", "yes", "y", "success", "successful", "succeeded", "solved"), True)
_WORDS |= dict.fromkeys(("false", "f", "0", "0.0", "no", "n", "failure", "fail", "failed", "unsolved"), False)
_NAMES = {
    "episode_index": ("episode_index", "episode", "episode_id", "index"),
    "success": ("success", "is_success", "successful", "solved", "label", "outcome"),
    "steps": ("steps", "length", "frames"),
}

Lengths = list[tuple[bool, int]]


def successes(recording: Recording, labels: Path | None = None, unlabelled: str = "error") -> Lengths:
    """Returns the success of each episode, and the number of its frames up to the first success.

    Args:
        recording: the episodes.
        labels: a file of labels; default: 'next.success', or 'next.reward' if it is sparse (0 and 1, or −1 and 0).
        unlabelled: one of UNLABELLED, for a recording without either.

    Raises:
        UserError: invalid labels, or none.
    """
    episodes = recording.episodes
    if labels is not None:
        known = read_labels(labels, [len(episode.actions) for episode in episodes])
        if missing := [i for i in range(len(episodes)) if i not in known]:
            raise UserError(f"{labels} has no label for episode {missing[0]} of {recording.root}; add it")
        return [(known[i], len(episode.actions)) for i, episode in enumerate(episodes)]
    if any(episode.outcomes for episode in episodes):
        return [_recorded(recording, episode) for episode in episodes]
    if unlabelled == "error":
        raise UserError(
            f"{recording.root} has no record of success: give --labels, or --unlabelled=success for demonstrations"
        )
    return [(unlabelled == "success", len(episode.actions)) for episode in episodes]


def _recorded(recording: Recording, episode: Episode) -> tuple[bool, int]:
    """Returns success and number of frames of an episode from the values recorded at each step."""
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
        UserError: the file does not exist, or a line is no label or does not fit the dataset.
    """
    known: dict[int, bool] = {}
    for number, row in _rows(path, _read_text(path)):
        place, label = f"line {number} of {path}", _named(row)
        try:
            episode, steps = _integer(label["episode_index"]), _integer(label.get("steps") or 0)
            said = " ".join(str(label["success"]).split())
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UserError(f"{place} is no label; write an episode_index and a success") from None
        success = _WORDS.get(said.lower())
        if success is None:
            raise UserError(f"{place} says success '{said[:60]}'; write true or false")
        if not 0 <= episode < len(lengths):
            raise UserError(f"{place} is about episode {episode}; the dataset has 0 to {len(lengths) - 1}")
        if episode in known:
            raise UserError(f"{place} is a second label for episode {episode}; keep one of them")
        if steps not in (0, lengths[episode]):
            raise UserError(f"{place} says {steps} steps, the episode has {lengths[episode]}; give its own labels")
        known[episode] = success
    return known


def _read_text(path: Path) -> str:
    """Returns the text of a file in UTF-8 or, with a byte order mark, UTF-16."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the labels {path}: {error.strerror}; check the path") from error
    try:
        return content.decode(
            "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        )
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"line {line} of {path} is not UTF-8 text; save it as CSV in UTF-8") from error


def _rows(path: Path, text: str) -> list[tuple[int, Any]]:
    """Returns line number and content of each label; the content is a dict if it could be parsed."""
    if path.suffix in (".jsonl", ".json") or text.lstrip().startswith("{"):
        return [(number, _json(line)) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    return _table(path, text)


def _json(line: str) -> Any:
    """Returns the value of a line of JSON, or None if it is invalid."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _table(path: Path, text: str) -> list[tuple[int, Any]]:
    """Returns the rows of a table, as `_rows` does."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    if first.lower().startswith("sep="):  # Excel's.
        text = text.replace(first, "", 1)
        first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise UserError(f"line {reader.line_num} of {path} is no row of a table ({error}); correct it") from error
    (number, header), *rows = [row for row in rows if any(row[1])] or [(1, [])]
    known = _named(dict.fromkeys(header))
    if not {"episode_index", "success"} <= known.keys() or len(set(filter(None, header))) < sum(map(bool, header)):
        raise UserError(
            f"line {number} of {path} must be a header with episode_index and success; it is '{first.strip()[:60]}'"
        )
    padded = [(number, cells + [""] * (len(header) - len(cells))) for number, cells in rows]
    return [
        (number, None if any(cells[len(header) :]) else dict(zip(header, cells, strict=False)))
        for number, cells in padded
    ]


def _named(row: Any) -> dict[str, Any]:
    """Returns the values of a row under the names of this module."""
    if not isinstance(row, dict):
        return {}
    plain = {str(key).strip().lower().replace(" ", "_").replace("-", "_"): value for key, value in row.items()}
    found = {name: next((one for one in others if one in plain), None) for name, others in _NAMES.items()}
    return {name: plain[other] for name, other in found.items() if other is not None}


def _integer(value: Any) -> int:
    """Returns an integer; raises ValueError or TypeError for other values."""
    number = float(value)
    if isinstance(value, bool) or number != int(number):
        raise ValueError(value)
    return int(number)


def add_columns(root: Path, output: Path, labels: Path | None, unlabelled: str) -> str:
    """Copies a dataset with success and reward added; returns a one-line summary."""
    if output.exists():
        raise UserError(f"{output} exists; name another folder")
    outcomes = successes(read_recording(root, ["observation.state"]), labels, unlabelled)
    from lerobot.datasets import add_features

    last = [np.arange(length) == length - 1 for _, length in outcomes]
    success = np.concatenate([here & solved for here, (solved, _) in zip(last, outcomes, strict=True)])
    columns = {
        "next.success": (success, {"dtype": "bool", "shape": (1,), "names": None}),
        "next.reward": (success.astype(np.float32) - 1, {"dtype": "float32", "shape": (1,), "names": None}),
    }
    add_features(open_dataset(root), columns, output, f"local/{output.name}")
    return f"{output}: {len(outcomes)} episodes, {sum(solved for solved, _ in outcomes)} solved"


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    parser = Parser("python -m real.labels", __doc__)
    parser.add_argument("root", type=Path, help="folder of the dataset")
    parser.add_argument("output", type=Path, help="folder of the copy")
    parser.add_argument("--labels", type=Path, help="file of labels")
    parser.add_argument("--all", choices=UNLABELLED[1:], default="error", help="the same label for all episodes")
    args = parser.parse_args(argv[1:])
    print(add_columns(args.root.expanduser(), args.output.expanduser(), args.labels, args.all))


if __name__ == "__main__":
    run_main(main)
