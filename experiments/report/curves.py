"""Learning curves of a report: mean and interval over seeds of each method, with published curves dashed."""

from collections.abc import Iterable
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.report import published
from experiments.report.groups import Group
from utils.output.intervals import bootstrap, mean_over_runs
from utils.output.plotting import STYLE, label_axes, mark_online, to_png
from utils.run.loading import online_from

# Published curves get a panel of their own if the runs end before this share of them.
SHARE = 0.25
GREY = "#9a9a9a"
# Fourteen methods: Okabe and Ito's colours, those of Tol's muted ones that differ from them most, and two more.
COLOURS = [
    *STYLE["axes.prop_cycle"].by_key()["color"],
    *("#882255", "#999933", "#332288", "#44AA99", "#DDCC77", "#8B5A2B", "#B7E08A"),
]


def method_styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns method → colour and marker, for all figures of a report; methods beyond the colours change the marker."""
    pairs = [(colour, marker) for marker in "os^D" for colour in COLOURS]
    return {name: {"color": c, "marker": m} for name, (c, m) in zip(methods, cycle(pairs), strict=False)}


def draw_curves(env_name: str, groups: list[Group], styles: dict[str, dict[str, Any]]) -> bytes | None:
    """Draws the groups of one task as PNG; the same data give the same bytes.

    Groups that are not compared because of their length alone are dotted, all others left out. Published curves of
    methods that were not run are grey.

    Args:
        styles: colour and marker by label for compared groups, by method for all others.

    Returns:
        the PNG, or None without evaluations.
    """
    drawn = [group for group in groups if len(group.curve()[0]) and _only_length(group.apart)]
    drawn.sort(key=lambda group: bool(group.apart))
    if not drawn:
        return None
    # The compared groups, which come first, determine the metric.
    metric = drawn[0].condition.metric
    drawn = [group for group in drawn if group.condition.metric == metric]
    curves = published.curves().get(env_name, {}) if metric == "success_rate" else {}
    end = max(group.curve()[0][-1] for group in drawn)
    split = bool(curves) and bool(end < SHARE * published.STEPS)
    with matplotlib.rc_context(STYLE | {"figure.dpi": 200, "savefig.dpi": 200}):
        figure = Figure(figsize=(7.2 if split else 5.2, 2.6), layout="constrained")
        panels = figure.subplots(1, 2 if split else 1, sharey=True, squeeze=False)[0]
        for group in drawn:
            _draw_group(panels[0], group, styles.get(group.label) or styles[group.method])
        for method, curve in curves.items():
            _draw_published(panels[-1], method, curve, drawn, styles)
        starts = {online_from(group.runs[0].settings) for group in drawn}
        if len(starts) == 1 and (step := starts.pop()):
            mark_online(panels[0], step)
        online = all(group.runs[0].rollout_steps is not None for group in drawn)
        _label_axes(panels, env_name, metric, split, "Environment steps" if online else "Training steps")
        figure.legend(handles=_legend(panels[0], bool(curves), drawn, curves), loc="outside right upper")
        return to_png(figure)


def _only_length(reasons: list[str]) -> bool:
    """True if a group is compared, or is not because of its number of updates alone."""
    return all(reason.startswith(("unfinished:", "diverged:", "other updates:")) for reason in reasons)


def _draw_group(axes: Axes, group: Group, style: dict[str, Any]) -> None:
    """Draws the mean over seeds, and its interval as a band."""
    steps, values = group.curve()
    reason = f"{group.apart[0].split(':')[0]}, " if group.apart else ""
    look: dict[str, Any] = {"linestyle": ":", "markerfacecolor": "none", "linewidth": 0.9} if group.apart else {}
    label = f"{group.label} ({reason}{group.seeds})"
    # Not clipped, so that markers at 0 and 1 are drawn whole.
    axes.plot(steps, values.mean(axis=0), label=label, clip_on=False, zorder=3, **style, **look)
    if band := bootstrap([values], mean_over_runs):
        axes.fill_between(steps, *band, color=style["color"], alpha=0.15, linewidth=0)


def _draw_published(
    axes: Axes, method: str, curve: published.Curve, drawn: list[Group], styles: dict[str, dict[str, Any]]
) -> None:
    """Draws a published curve dashed, in the method's colour if it was run, else in grey."""
    own = next((styles.get(g.label) or styles[g.method] for g in drawn if g.algorithm == method), None)
    colour, width, order = (own["color"], 1.1, 2.5) if own else (GREY, 0.6, 1)
    axes.plot(curve.steps, curve.mean, "--", color=colour, linewidth=width, zorder=order, clip_on=False)


def _label_axes(panels: np.ndarray, env_name: str, metric: str, split: bool, steps: str) -> None:
    """Sets titles, limits and labels."""
    for axes in panels:
        label_axes(axes, metric == "success_rate", steps)
        axes.set_xlim(left=0)
    panels[0].set_title(env_name if not split else "These runs")
    if split:
        panels[1].set(title="Published", ylabel="")
        # On the left, so that a wide legend does not overlap it.
        panels[0].figure.suptitle(env_name, fontsize=8, x=0.06, horizontalalignment="left")


def _legend(axes: Axes, dashed: bool, drawn: list[Group], curves: dict[str, published.Curve]) -> list[Line2D]:
    """Returns a handle for each group and for the published curves."""
    handles = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    names = {group.algorithm for group in drawn}
    if dashed and names & curves.keys():
        handles.append(Line2D([], [], color="black", linestyle="--", linewidth=1.1, label="published, same colour"))
    if dashed and curves.keys() - names:
        handles.append(Line2D([], [], color=GREY, linestyle="--", linewidth=0.6, label="published, not run here"))
    return handles
