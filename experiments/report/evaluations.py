"""evaluations.csv, to which `experiments.evaluate` appends a row for each evaluation of a run."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError

FILE = "evaluations.csv"
KEYS = ("step", "seed", "episodes")
RESULTS = ("success_rate", "low", "high", "return_mean", "length_mean", "milliseconds_per_action")
SCORE = "normalized_score"  # of datasets of Minari that have reference scores


def read_rows(directory: Path) -> list[dict[str, str]]:
    """Returns the rows of a run's evaluations, none if there is no file.

    Raises:
        UserError: it cannot be read.
    """
    path = directory / FILE
    try:
        return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def settings_of(row: Mapping[str, str]) -> dict[str, str]:
    """Returns the settings that a row was acted with."""
    return {name: text for name, text in row.items() if name not in (*KEYS, *RESULTS, SCORE)}


def same(text: str | None, value: Any) -> bool:
    """True if a cell has a setting's value."""
    try:
        return math.isclose(float(text or "nan"), float(value), rel_tol=1e-5)
    except (TypeError, ValueError):
        return text == str(value)
