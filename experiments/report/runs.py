"""Runs as read from their directories, finished or still in training."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Real

from experiments.report import published
from utils.errors import UserError
from utils.output.loggers import measure_of, read_csv
from utils.system.files import read_json

# Required keys of flags.json and their types.
SETTINGS = {"env_name": str, "agent": str, "seed": int, "config": dict, "flags": dict}


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        directory: of the run.
        settings: content of flags.json.
        planned: last step.
        finished: whether the run reached its last step and was evaluated there.
        diverged: where and how training diverged, '' if it did not.
        reached: last logged step.
        metric: 'success_rate'; if success is unknown 'normalized_score', else 'return_mean'.
        steps, values, episodes: of the evaluations.
        rate: median updates/s, NaN if not recorded.
        milliseconds: time to decide on one action, NaN if not recorded.
    """

    directory: Path
    settings: dict[str, Any]
    planned: int
    finished: bool
    diverged: str
    reached: int
    metric: str
    steps: Real[np.ndarray, " evaluations"]
    values: Real[np.ndarray, " evaluations"]
    episodes: Real[np.ndarray, " evaluations"]
    rate: float
    milliseconds: float

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.settings["seed"]

    @property
    def algorithm(self) -> str:
        """The published name of the agent."""
        return published.method_name(self.settings["agent"], self.settings["config"])

    @property
    def method(self) -> str:
        """The algorithm, and the value of a varied setting."""
        varied = self.settings.get("varied") or {}
        return self.algorithm + "".join(f" {name}={show(value)}" for name, value in varied.items())

    @property
    def nfe(self) -> int | None:
        """Network evaluations per candidate; from `flow_steps` in runs of OTQL and BC that did not record it."""
        known = self.settings["agent"] in ("otql", "bc")
        return self.settings.get("nfe", self.settings["config"].get("flow_steps") if known else None)

    @property
    def rollout_steps(self) -> int | None:
        """Environment steps with the base policy in a run of online_main.py, None in others (steps are updates)."""
        return self.settings["flags"].get("rollout_steps")

    @property
    def runs_per_program(self) -> int:
        """Number of runs trained in parallel in the program whose speed is `rate`."""
        flags = self.settings["flags"]
        seeds, varied = flags.get("num_seeds"), str(flags.get("vary") or "")
        return (seeds if isinstance(seeds, int) else 1) * (varied.count(",") + 1)


def find_runs(directories: Iterable[Path], step: int | None = None) -> tuple[list[Run], list[str]]:
    """Reads the runs in and below `directories`, up to `step`.

    Returns:
        the runs, and one line for each damaged one.

    Raises:
        UserError: a directory does not exist, or no run can be read.
    """
    found: dict[Path, None] = {}
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"there is no directory {directory}; give directories of runs, such as exp/debug")
        found |= {path.parent.resolve(): None for path in sorted(directory.rglob("flags.json"))}
    good, damaged = [], []
    for directory in found:
        try:
            good.append(read_run(directory, step))
        except UserError as error:
            damaged.append(" ".join(str(error).split()))
    if not good:
        where = ", ".join(map(str, directories))
        reason = f"the runs in {where} cannot be read, the first: {damaged[0]}" if damaged else f"no runs in {where}"
        raise UserError(f"{reason}; give directories of runs, such as exp/debug")
    return good, damaged


def read_run(directory: Path, step: int | None = None) -> Run:
    """Reads the files of a run, which may still be in training; with `step`, as if it ended there.

    Raises:
        UserError: a file is damaged.
    """
    settings = _read_json(directory / "flags.json")
    missing = [name for name, kind in SETTINGS.items() if not isinstance(settings.get(name), kind)]
    planned = None if missing else settings.get("steps", settings["flags"].get("offline_steps"))
    if not isinstance(planned, int):
        raise UserError(f"{directory / 'flags.json'} is damaged (no usable {', '.join(missing) or 'steps'})")
    table, timing = (_read_table(directory / f"{name}.csv") for name in ("eval", "timing"))
    if step is not None and step < planned:
        planned, table, timing = step, *(_cut(rows, step) for rows in (table, timing))
    summary = _read_json(directory / "summary.json") if (directory / "summary.json").exists() else {}
    # A run that diverged after `step` had not diverged yet.
    broke = "diverged" in summary and summary["step"] <= planned
    diverged = f"step {summary['step']} ({summary['diverged']})" if broke else ""
    metric = measure_of(table)
    values = table.get(metric, np.empty(0))
    shown = np.isfinite(values)
    steps = table.get("step", np.empty(0))[shown]
    last = int(steps[-1]) if len(steps) else 0
    milliseconds = summary.get("milliseconds_per_action")
    return Run(
        directory=directory,
        settings=settings,
        planned=planned,
        finished=last >= planned and (step is not None or summary.get("step", -1) >= planned) and not diverged,
        diverged=diverged,
        reached=int(max(last, *timing.get("step", ()))) if len(timing.get("step", ())) else last,
        metric=metric,
        steps=steps,
        values=values[shown],
        episodes=table.get("episodes", np.full(len(shown), np.nan))[shown],
        rate=update_rate(timing),
        milliseconds=float(milliseconds) if isinstance(milliseconds, int | float) else np.nan,
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file, with a `UserError` also if it is unreadable."""
    try:
        return read_json(path)
    except OSError as error:
        raise UserError(f"{error.strerror}: cannot read {path}") from error


def _read_table(path: Path) -> dict[str, np.ndarray]:
    """Reads a CSV file that may not exist yet, and checks that its steps increase."""
    table = read_csv(path) if path.exists() else {}
    if table and not ("step" in table and np.all(np.diff(table["step"], prepend=-1) > 0)):
        raise UserError(f"{path} is damaged (its column 'step' does not increase)")
    return table


def _cut(table: dict[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
    return {name: column[table["step"] <= step] for name, column in table.items()}


def update_rate(timing: dict[str, np.ndarray]) -> float:
    """Returns the median updates/s of the rows of timing.csv, NaN without any."""
    if "seconds" not in timing:
        return np.nan
    updates = timing.get("updates", np.diff(timing["step"], prepend=0))
    timed = timing["seconds"] > 0
    return float(np.median(updates[timed] / timing["seconds"][timed])) if timed.any() else np.nan


def show(value: Any) -> str:
    """Formats a setting as on the command line, None as '–'."""
    if isinstance(value, list | tuple):
        return f"({','.join(map(str, value))})"
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
