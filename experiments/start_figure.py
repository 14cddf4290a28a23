"""Figures of the study on where the flow starts, from the CSV files of docs/results.

    python -m experiments.start_figure --output=docs/curves

Draws start_updates.png, success over updates on one task, and start_nfe.png, success of the final weights against NFE
on each task; means over seeds with 95 % bootstrap intervals.
"""

import csv
from collections.abc import Iterable, Sequence
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
PLAN = "plan: pairs by optimal transport, else independent pairs"
NFE_EPISODES, UPDATES_EPISODES = 50, 25

FLAGS = flags.FlagValues()
flags.DEFINE_string("output", None, "Directory of the figures.", required=True, flag_values=FLAGS)

Curve = dict[int, list[float]]


def read_curves(path: Path, column: str) -> dict[tuple[str, str], Curve]:
    """Returns (arm, task) → value of `column` → success of each seed."""
    curves: dict[tuple[str, str], Curve] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            curve = curves.setdefault((row["arm"], row["task"]), {})
            curve.setdefault(int(row[column]), []).append(float(row["success_rate"]))
    return curves


def draw_arms(
    axes: Axes, curves: dict[tuple[str, str], Curve], task: str, left: float, right: float | None = None
) -> None:
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


def updates_figure(curves: dict[tuple[str, str], Curve]) -> bytes:
    """Returns success over updates on TASK as PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, height_for(len(ARMS))), layout="constrained")
        axes = figure.add_subplot()
        label_axes(axes, SUCCESS, "Updates")
        axes.set_title(f"{TASK}, NFE 2")
        draw_arms(axes, curves, TASK, 0)
        return captioned_png(
            figure, caption("plan: pairs by optimal transport, else independent pairs", UPDATES_EPISODES)
        )


def nfe_figure(curves: dict[tuple[str, str], Curve]) -> bytes:
    """Returns success against NFE, a panel for each task, as PNG."""
    tasks = sorted({task for _, task in curves}, reverse=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.9 * len(tasks), height_for(len(ARMS))), layout="constrained")
        for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
            label_axes(axes, SUCCESS, "NFE: Euler steps of the flow")
            axes.xaxis.set_major_locator(FixedLocator([1, 2, 3]))
            axes.set_title(task)
            draw_arms(axes, curves, task, 0.8, 3.1)
        return captioned_png(figure, caption(f"{PLAN}; a fitted start costs one small network more", NFE_EPISODES))


def caption(text: str, episodes: int) -> str:
    """Returns a figure's caption."""
    return f"OTQL, 9k updates, best of 5; {text}. Mean of five seeds, {episodes} episodes each; band: 95 % bootstrap."


def write_figures(output: Path, figures: Iterable[tuple[str, bytes]]) -> None:
    """Writes figures as <name>.png and prints their paths."""
    for name, png in figures:
        atomic_write_bytes(output / f"{name}.png", png)
        print(output / f"{name}.png")


def main(argv: Sequence[str]) -> None:
    """Draws both figures."""
    parse_arguments(argv, FLAGS)
    updates, nfe = read_curves(RUNS, "step"), read_curves(EVALUATIONS, "flow_steps")
    write_figures(Path(FLAGS.output), [("start_updates", updates_figure(updates)), ("start_nfe", nfe_figure(nfe))])


if __name__ == "__main__":
    run_main(main)
