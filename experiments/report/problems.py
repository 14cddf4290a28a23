"""Runs of a report that are not compared: missing, failed, diverged, unfinished, damaged or unlike the others."""

from collections.abc import Iterable
from pathlib import Path

from experiments.report.groups import Group
from experiments.report.tables import Cell, Table
from utils.errors import UserError
from utils.system.files import read_json

INTERRUPTED = (130, 143, -2, -15, -9)  # Exit codes of jobs that were stopped, which are no failures.


def failed_jobs(directories: Iterable[Path]) -> list[tuple[str, str]]:
    """Returns name and last line of each job of a sweep in or below the directories that ended with an error."""
    found = {}
    for path in sorted({path for directory in directories for path in directory.rglob(".sweep/*.json")}):
        try:
            outcome = read_json(path)
        except (OSError, UserError):
            continue  # Half written by a job that ends now.
        if isinstance(outcome.get("code"), int) and outcome["code"] not in (0, *INTERRUPTED):
            found[path.stem] = f"exit code {outcome['code']}: {outcome.get('line')}"
    return list(found.items())


def missing(groups: list[Group]) -> list[tuple[str, str, str]]:
    """Returns task, method and seeds of runs that others of the task or of the method have, in any state."""
    tasks = list(dict.fromkeys(group.env_name for group in groups))
    names = list(dict.fromkeys(group.label for group in groups if not group.apart))
    found = []
    for task in tasks:
        own = [group for group in groups if group.env_name == task]
        seeds = {run.seed for group in own for run in group.runs}
        for name in names:
            have = {run.seed for group in own if name in (group.label, group.method) for run in group.runs}
            # Runs of a variant that are unfinished have the method's name alone.
            method = next(group.method for group in groups if group.label == name)
            have |= {run.seed for group in own if group.apart and group.method == method for run in group.runs}
            if lacking := sorted(seeds - have):
                found.append((task, name, ", ".join(map(str, lacking)) if have else "all"))
    return found


def problems_table(groups: list[Group], damaged: Iterable[str], failed: Iterable[tuple[str, str]]) -> Table:
    """Returns a row for each run or group of runs that is not compared, and for each that is missing.

    Args:
        damaged: one line per damaged run.
        failed: name and last line of each failed job.
    """
    table = Table("Missing, failed and diverged runs", ["state", "environment", "method", "seeds", "reason"])
    rows = [("failed", "", name, "", line) for name, line in failed]
    rows += [("damaged", "", "", "", line) for line in damaged]
    for group in groups:
        if group.apart:
            state = group.apart[0].split(":")[0]
            state = state if state in ("diverged", "unfinished", "no evaluations") else "not compared"
            seeds = ", ".join(str(run.seed) for run in group.runs)
            rows.append((state, group.env_name, group.label, seeds, "; ".join(group.apart)))
    rows += [
        ("missing", task, name, seeds, "other methods have these seeds" if seeds != "all" else "other tasks have runs")
        for task, name, seeds in missing(groups)
    ]
    order = ["failed", "diverged", "damaged", "missing", "unfinished", "no evaluations", "not compared"]
    rows.sort(key=lambda row: order.index(row[0]))
    table.rows = [[Cell(text) for text in row] for row in rows]
    if not rows:
        table.notes.append("None: all runs finished, and all methods have the same seeds and tasks.")
    return table
