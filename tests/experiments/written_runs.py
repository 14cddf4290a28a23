"""Directories of runs as main.py leaves them, written by hand, and what tests of reports read from tables."""

import json
from pathlib import Path

from experiments.report.groups import Group, group_runs
from experiments.report.runs import find_runs

SCENE = "scene-play-singletask-task1-v0"
DATA = {"file": "scene-play-v0-200ep.npz", "episodes": 200, "transitions": 200_000, "checksum": 1}
STEPS = (6_000, 12_000, 18_000, 24_000)


def write_run(
    root: Path,
    values,
    *,
    env: str = SCENE,
    agent: str = "otql",
    seed: int = 0,
    steps=STEPS,
    finished: bool = True,
    planned: int | None = None,
    config: dict | None = None,
    flags: dict | None = None,
    summary: dict | None = None,
    metric: str = "success_rate",
    episodes: int = 25,
    seconds: float = 10.0,
    total: int | None = None,
    **settings,
) -> Path:
    """Writes the directory of a run whose evaluations at `steps` are `values`."""
    directory = root / env.replace(":", "_") / agent / f"sd{seed}"
    directory.mkdir(parents=True)
    planned = planned or (steps[-1] if finished else steps[-1] + 6_000)
    content = {"env_name": env, "agent": agent, "agent_module": f"agents.{agent}", "seed": seed, "varied": {}}
    content |= {"dataset": DATA, "sparse": True, "preset": "preset cpu", "domain": "scene"}
    content["config"] = {"flow_steps": 2, "best_of_n": 5, "lam": 1.0} | (config or {})
    content["flags"] = {"offline_steps": planned, "eval_interval": 6_000, "num_seeds": 1, "vary": None} | (flags or {})
    content |= {} if total is None else {"steps": total}
    (directory / "flags.json").write_text(json.dumps(content | settings))
    rows = [f"{step},{episodes}.0,{value}" for step, value in zip(steps, values, strict=True)]
    (directory / "eval.csv").write_text("\n".join([f"step,episodes,{metric}", *rows]) + "\n")
    (directory / "timing.csv").write_text(
        "\n".join(["step,seconds", *(f"{step},{seconds}" for step in range(1_000, steps[-1] + 1, 1_000))]) + "\n"
    )
    if finished:
        (directory / "summary.json").write_text(json.dumps({"step": planned} | (summary or {})))
    return directory


def groups_of(*directories: Path, last: int = 3) -> list[Group]:
    return group_runs(find_runs(directories)[0], last)


def row_of(table, start: str) -> dict[str, str]:
    """Column → text of the row whose first cell starts with `start`."""
    (row,) = [row for row in table.rows if row[0].text.startswith(start)]
    return {name: cell.text + cell.rest for name, cell in zip(table.header, row, strict=True)}
