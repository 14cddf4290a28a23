"""Runs as their directories tell them, also while they are still being trained."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Real

from experiments.report import published
from utils.errors import UserError
from utils.output.loggers import read_csv
from utils.system.files import read_json

# What flags.json must hold for a run to be placed.
SETTINGS = {"env_name": str, "agent": str, "seed": int, "config": dict, "flags": dict}


@dataclass(frozen=True)
class Run:
    """One run as its directory tells it.

    Attributes:
        settings: flags.json. planned: updates it is to go to. finished: it went there and was evaluated there.
        diverged: where and how training diverged, '' if it did not. reached: updates that are logged.
        metric: 'success_rate', or 'return_mean' where success is not known.
        steps, values, episodes: the evaluations.
        rate: median updates/s. milliseconds: time of one action at acting; NaN where not recorded, as for `rate`.
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
        """Network evaluations per candidate; runs from before it was recorded tell it where it is `flow_steps`."""
        known = self.settings["agent"] in ("otql", "bc")
        return self.settings.get("nfe", self.settings["config"].get("flow_steps") if known else None)

    @property
    def rollout_steps(self) -> int | None:
        """Of a run of online_main.py, whose steps are the environment's: those before which the base was evaluated."""
        return self.settings["flags"].get("rollout_steps")

    @property
    def lanes(self) -> int:
        """Runs trained side by side in one program, which `rate` is the speed of."""
        flags = self.settings["flags"]
        seeds, varied = flags.get("num_seeds"), str(flags.get("vary") or "")
        return (seeds if isinstance(seeds, int) else 1) * (varied.count(",") + 1)


def find_runs(directories: Iterable[Path], step: int | None = None) -> tuple[list[Run], list[str]]:
    """Reads the runs in and below `directories`, up to `step`: the runs, and a line for each one that is damaged.

    Raises:
        UserError: a directory is missing, or there is no run that can be read.
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
    """Reads a run's files, also while it is still being trained; with `step`, as if it ended there.

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
    # Looked at as if it ended earlier, a run was sound there.
    broke = "diverged" in summary and summary["step"] <= planned
    diverged = f"step {summary['step']} ({summary['diverged']})" if broke else ""
    metric = "success_rate" if np.isfinite(table.get("success_rate", np.nan)).any() else "return_mean"
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
    """`runs.read_json` of a file that may also be no object or unreadable."""
    try:
        content = read_json(path)
    except OSError as error:
        raise UserError(f"{error.strerror}: cannot read {path}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (no JSON object)")
    return content


def _read_table(path: Path) -> dict[str, np.ndarray]:
    """`read_csv` of a file that may not be there yet, with steps that go up."""
    table = read_csv(path) if path.exists() else {}
    if table and not ("step" in table and np.all(np.diff(table["step"], prepend=-1) > 0)):
        raise UserError(f"{path} is damaged (its column 'step' does not go up)")
    return table


def _cut(table: dict[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
    """The rows up to `step`."""
    return {name: column[table["step"] <= step] for name, column in table.items()}


def update_rate(timing: dict[str, np.ndarray]) -> float:
    """Median updates/s of the rows of timing.csv."""
    if "seconds" not in timing:
        return np.nan
    updates = timing.get("updates", np.diff(timing["step"], prepend=0))
    timed = timing["seconds"] > 0
    return float(np.median(updates[timed] / timing["seconds"][timed])) if timed.any() else np.nan


def show(value: Any) -> str:
    """A setting as it is written on the command line."""
    if isinstance(value, list | tuple):
        return f"({','.join(map(str, value))})"
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
