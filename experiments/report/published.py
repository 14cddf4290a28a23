"""Published results that reports show beside this project's; docs/published_*.csv name their sources."""

import csv
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Real

from envs.tasks import TABLE1_TASKS
from utils.system.files import ROOT

# Agent file → its name in Table 1 and the papers.
NAMES = {
    "bc": "BC",
    "cgql": "CGQL",
    "dsrl": "DSRL",
    "ewfm": "EWFM",
    "fawac": "FAWAC",
    "fedit": "FEdit",
    "fql": "FQL",
    "gfp": "GFP",
    "lps": "LPS",
    "meanflowql": "MeanFlowQL",
    "optiflow": "OptiFlow",
    "ifql": "IFQL",
    "otql": "OTQL",
    "qam": "QAM",
    "qam_e": "QAM-E",
    "qam_f": "QAM-F",
    "qc": "QC",
    "qsm": "QSM",
}
STEPS = 1_000_000  # updates of Table 1
TASKS = 5  # tasks of a domain
SEEDS = 12  # of the released curves


@dataclass(frozen=True)
class Curve:
    """A curve of success rates over updates.

    Attributes:
        steps: updates.
        mean, std: mean and population standard deviation over 12 seeds.
    """

    steps: Real[np.ndarray, " points"]
    mean: Float[np.ndarray, " points"]
    std: Float[np.ndarray, " points"]

    def at(self, steps: tuple[int, ...]) -> float | None:
        """Returns the mean success at `steps`, by linear interpolation; None if one is outside the curve's range."""
        if not steps or min(steps) < self.steps[0] or max(steps) > self.steps[-1]:
            return None
        return float(np.interp(steps, self.steps, self.mean).mean())


def method_name(agent: str, config: dict[str, Any]) -> str:
    """Returns the published name of an agent with these settings, or the name of its file."""
    # agents/qam.py is three methods of the QAM paper.
    if agent == "qam" and _positive(config.get("fql_alpha")):
        return "QAM-F"
    if agent == "qam" and _positive(config.get("edit_scale")):
        return "QAM-E"
    return NAMES.get(agent, agent)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def method_order(name: str) -> tuple[int, str]:
    """Returns the sort key of a method: methods that Table 1 lacks come first, then Table 1's order."""
    columns, algorithm = list(next(iter(table1().values()))), name.split(" ")[0]
    return columns.index(algorithm) if algorithm in columns else -1, name.lower()


@functools.cache
def table1() -> dict[str, dict[str, float]]:
    """Reads Table 1 of the paper: domain → method → success rate at 10⁶ updates, mean of the domain's five tasks."""
    header, *rows = _rows("published_table1.csv")
    return {row[0]: dict(zip(header[1:], map(float, row[1:]), strict=True)) for row in rows}


@functools.cache
def curves() -> dict[str, dict[str, Curve]]:
    """Reads QAM's released learning curves: environment → method → curve."""
    header, *rows = _rows("published_curves.csv")
    steps = np.array(header[3:], float)
    numbers = {tuple(row[:3]): np.array(row[3:], float) for row in rows}
    result: dict[str, dict[str, Curve]] = {}
    for env_name, method, statistic in numbers:
        if statistic == "mean":
            std = numbers[env_name, method, "std"]
            result.setdefault(env_name, {})[method] = Curve(steps, numbers[env_name, method, "mean"], std)
    return result


def domain_of(env_name: str) -> str | None:
    """Returns the domain of Table 1 that has this environment among its five tasks, or None."""
    return next((d for d in table1() if env_name in TABLE1_TASKS and env_name.startswith(f"{d}-")), None)


def _rows(name: str) -> list[list[str]]:
    """Reads the rows of a CSV file in docs/, without the comments at its top."""
    lines = (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()
    return list(csv.reader(line for line in lines if not line.startswith("#")))
