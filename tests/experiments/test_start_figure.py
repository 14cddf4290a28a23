"""The figures of the study on where the flow starts."""

import csv

import numpy as np

from experiments.start_figure import ARMS, RUNS, TASK, nfe_figure, updates_figure


def test_figures_show_the_means_of_the_recorded_runs(figures):
    assert updates_figure().startswith(b"\x89PNG") and nfe_figure().startswith(b"\x89PNG")
    with RUNS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["arm"], row["task"]) == ("plan", TASK)]
    seeds: dict[str, list[float]] = {}
    for row in rows:
        seeds.setdefault(row["step"], []).append(float(row["success_rate"]))
    (axes,), panels = figures[0].axes, figures[1].axes
    lines = {line.get_color(): line.get_ydata() for line in axes.lines}
    np.testing.assert_allclose(lines[ARMS["plan"][1]], [np.mean(rates) for rates in seeds.values()])
    assert [panel.get_title() for panel in panels] == [TASK, "cube-single-play-singletask-task2-v0"]
    assert {text.get_text() for text in axes.texts} == {name for name, _ in ARMS.values()}
