"""Figures of the study on where the flow starts, from the CSV files of docs/results.

    python -m experiments.start_figure --output=docs/curves

Draws start_updates.png, success over updates on one task, and start_nfe.png, success of the final weights against NFE
on each task; means over seeds with 95 % bootstrap intervals.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from utils.output.intervals import bootstrap, mean_over_runs
from utils.output.loggers import SUCCESS
from utils.output.plotting import STYLE, captioned_png, height_for, label_axes, label_ends
from utils.system.cli import parse_arguments
from utils.system.entry_point import run_main
from utils.system.files import ROOT, atomic_write_bytes

RESULTS = ROOT / "docs" / "results"
RUNS, EVALUATIONS = RESULTS / "source_runs.csv", RESULTS / "source_evaluations.csv"
# Arm → its name at a line's end, and its colour.
ARMS = {
    "action": ("fitted start", "#0077BB"),
    "action_plan": ("fitted start, plan", "#1B9AAA"),
    "independent": ("N(0, I)", "#D55E00"),
    "plan": ("N(0, I), plan (the paper)", "#7A7A7A"),
}
TASK = "scene-play-singletask-task1-v0"

FLAGS = flags.FlagValues()
flags.DEFINE_string("output", None, "Directory of the figures.", required=True, flag_values=FLAGS)

Curves = dict[tuple[str, str], dict[int, list[float]]]


def read_curves(path: Path, column: str) -> tuple[Curves, str]:
    """Reads the rows of ARMS.

    Returns:
        (arm, task) → value of `column` → success of each seed; and a caption on updates, seeds and episodes.
    """
    curves: Curves = {}
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] in ARMS]
    for row in rows:
        curve = curves.setdefault((row["arm"], row["task"]), {})
        curve.setdefault(int(row[column]), []).append(float(row["success_rate"]))
    (episodes,) = {float(row["episodes"]) for row in rows}
    updates, seeds = max(int(row["step"]) for row in rows), len({row["seed"] for row in rows})
    caption = f"OTQL, {updates} updates, best of 5. Plan: pairs by optimal transport, else independent pairs. "
    return curves, caption + f"Mean of {seeds} seeds, {episodes:g} episodes each; band: 95 % bootstrap."


def draw_arms(axes: Axes, curves: Curves, task: str, left: float, right: float | None = None) -> None:
    """Draws the arms of a task with their intervals, and their names at the ends; x from `left` to `right`."""
    ends = []
    for arm, (name, colour) in ARMS.items():
        if curve := curves.get((arm, task)):
            steps = sorted(curve)
            means = [float(np.mean(curve[step])) for step in steps]
            axes.plot(steps, means, marker="o", color=colour, clip_on=False, zorder=3)
            bands = [bootstrap([np.array(curve[step])], mean_over_runs) for step in steps]
            if all(bands):
                axes.fill_between(steps, *np.array(bands, float).T, color=colour, alpha=0.15, linewidth=0)
            ends.append((name, float(steps[-1]), means[-1], colour))
    axes.set_xlim(left, right)
    label_ends(axes, ends)


def updates_figure() -> bytes:
    """Returns success over updates on TASK as PNG."""
    curves, caption = read_curves(RUNS, "step")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, height_for(len(ARMS))), layout="constrained")
        axes = figure.add_subplot()
        label_axes(axes, SUCCESS, "Updates")
        axes.set_title(f"{TASK}, NFE 2")
        draw_arms(axes, curves, TASK, 0)
        return captioned_png(figure, caption)


def nfe_figure() -> bytes:
    """Returns success against NFE, a panel for each task, as PNG."""
    curves, caption = read_curves(EVALUATIONS, "flow_steps")
    tasks = sorted({task for _, task in curves}, reverse=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.9 * len(tasks), height_for(len(ARMS))), layout="constrained")
        for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
            label_axes(axes, SUCCESS, "NFE: Euler steps of the flow")
            axes.xaxis.set_major_locator(FixedLocator([1, 2, 3]))
            axes.set_title(task)
            draw_arms(axes, curves, task, 0.8, 3.1)
        return captioned_png(figure, f"{caption} A fitted start costs one small network more.")


def main(argv: Sequence[str]) -> None:
    """Draws both figures and prints their paths."""
    parse_arguments(argv, FLAGS)
    for name, draw in (("start_updates", updates_figure), ("start_nfe", nfe_figure)):
        path = Path(FLAGS.output) / f"{name}.png"
        atomic_write_bytes(path, draw())
        print(path)


if __name__ == "__main__":
    run_main(main)
