"""Learning curves of a report: mean and interval over seeds of each method, the published curves dashed."""

from collections.abc import Iterable
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from experiments.report import published
from experiments.report.groups import Group, bootstrap
from utils.output.plotting import STYLE, mark_online, to_png
from utils.run.loading import online_from

# Runs that end before this share of the published curves would be a sliver beside them: these get a panel of their own.
SHARE = 0.25
GREY = "#9a9a9a"
# Okabe and Ito's colours, then of Tol's muted ones those that differ from them most, then two more: one for each of
# fourteen methods.
COLOURS = [
    *STYLE["axes.prop_cycle"].by_key()["color"],
    *("#882255", "#999933", "#332288", "#44AA99", "#DDCC77", "#8B5A2B", "#B7E08A"),
]


def method_styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Method → colour and marker, the same in all pictures of a report; more methods than colours change the marker."""
    pairs = [(colour, marker) for marker in "os^D" for colour in COLOURS]
    return {name: {"color": c, "marker": m} for name, (c, m) in zip(methods, cycle(pairs), strict=False)}


def draw_curves(env_name: str, groups: list[Group], styles: dict[str, dict[str, Any]]) -> bytes | None:
    """Draws the groups of one environment; None where nothing is evaluated yet. The same data give the same bytes.

    Groups that only their length sets apart are dotted, others that are not compared left out. Published curves of
    methods that are not there are grey.

    Args:
        styles: label → colour and marker, of compared groups and of the methods of all others.
    """
    drawn = [group for group in groups if len(group.curve()[0]) and _only_length(group.apart)]
    drawn.sort(key=lambda group: bool(group.apart))
    if not drawn:
        return None
    # What is compared decides the measure of the axis.
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
        begun = {online_from(group.runs[0].settings) for group in drawn}
        if len(begun) == 1 and (step := begun.pop()):
            mark_online(panels[0], step)
        online = all(group.runs[0].rollout_steps is not None for group in drawn)
        _label_axes(panels, env_name, metric, split, "Environment steps" if online else "Training steps")
        figure.legend(handles=_legend(panels[0], bool(curves), drawn, curves), loc="outside right upper")
        return to_png(figure)


def _only_length(reasons: list[str]) -> bool:
    """True if a group is compared, or would be but for the number of updates."""
    return all(reason.startswith(("unfinished:", "diverged:", "other updates:")) for reason in reasons)


def _draw_group(axes: Axes, group: Group, style: dict[str, Any]) -> None:
    """One group: mean over seeds, with the interval of several seeds as a band."""
    steps, values = group.curve()
    seeds = f"{len(values)} seed{'s' if len(values) > 1 else ''}"
    reason = f"{group.apart[0].split(':')[0]}, " if group.apart else ""
    look: dict[str, Any] = {"linestyle": ":", "markerfacecolor": "none", "linewidth": 0.9} if group.apart else {}
    # Unclipped, so that markers at 0 and 1 are whole.
    label = f"{group.label} ({reason}{seeds})"
    axes.plot(steps, values.mean(axis=0), label=label, clip_on=False, zorder=3, **style, **look)
    band = bootstrap([values], lambda samples: samples.mean(axis=1))
    if band:
        axes.fill_between(steps, *band, color=style["color"], alpha=0.15, linewidth=0)


def _draw_published(
    axes: Axes, method: str, curve: published.Curve, drawn: list[Group], styles: dict[str, dict[str, Any]]
) -> None:
    """One published curve, dashed: in the method's colour if it was run, else grey."""
    own = next((styles.get(g.label) or styles[g.method] for g in drawn if g.algorithm == method), None)
    colour, width, order = (own["color"], 1.1, 2.5) if own else (GREY, 0.6, 1)
    axes.plot(curve.steps, curve.mean, "--", color=colour, linewidth=width, zorder=order, clip_on=False)


def _label_axes(panels: np.ndarray, env_name: str, metric: str, split: bool, steps: str) -> None:
    """Titles, limits and labels."""
    success = metric == "success_rate"
    for axes in panels:
        axes.set_xlabel(steps)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if success:
            axes.set_ylim(0, 1)
    panels[0].set_ylabel("Success rate" if success else "Mean return")
    panels[0].set_title(env_name if not split else "These runs")
    if split:
        panels[1].set_title("Published")
        # On the left, where a wide legend does not reach.
        panels[0].figure.suptitle(env_name, fontsize=8, x=0.06, horizontalalignment="left")


def _legend(axes: Axes, dashed: bool, drawn: list[Group], curves: dict[str, published.Curve]) -> list[Line2D]:
    """A handle for each group, and what dashes mean."""
    handles = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    names = {group.algorithm for group in drawn}
    if dashed and names & curves.keys():
        handles.append(Line2D([], [], color="black", linestyle="--", linewidth=1.1, label="published, same colour"))
    if dashed and curves.keys() - names:
        handles.append(Line2D([], [], color=GREY, linestyle="--", linewidth=0.6, label="published, not run here"))
    return handles
