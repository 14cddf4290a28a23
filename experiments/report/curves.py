"""Learning curves of a report: mean and interval over seeds of each method, beside the published curves."""

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report import published
from experiments.report.groups import Group
from utils.output.intervals import bootstrap, mean_over_runs
from utils.output.loggers import MEASURES, SUCCESS
from utils.output.plotting import (
    GREY,
    MOST,
    STYLE,
    Drawing,
    coloured,
    counted,
    grey_style,
    height_for,
    label_axes,
    label_ends,
    mark_online,
    method_styles,
    render,
    width_for,
)
from utils.run.loading import online_from


class Palette:
    """The looks of a report's methods, the same in all its figures.

    Args:
        methods: name in the report → published name of the method.
        scores: name → rank-like score, higher is better; the best names are coloured, all others grey.
    """

    def __init__(self, methods: Mapping[str, str], scores: Mapping[str, float]):
        self._styles = method_styles(methods)
        self._methods = methods
        self.bright = coloured({name: scores.get(name, np.nan) for name in methods})

    def style(self, name: str) -> dict[str, Any]:
        """Returns the style of the lines of a method."""
        own = self._styles[name]
        return {"zorder": 3, **own} if name in self.bright else grey_style(own)

    def published(self, method: str) -> str:
        """Returns the colour of a published method: that of its runs if they are coloured, else grey."""
        return next(
            (self._styles[n]["color"] for n in self._styles if n in self.bright and self._methods[n] == method), GREY
        )


def draw_curves(env_name: str, groups: list[Group], palette: Palette) -> Drawing | None:
    """Draws the groups of one task; the same data give the same bytes.

    Groups that are not compared because of their length alone are dotted, all others left out.

    Returns:
        the figure, or None without evaluations.
    """
    drawn = [group for group in groups if len(group.curve()[0]) and _only_length(group.apart)]
    drawn.sort(key=lambda group: (bool(group.apart), group.label not in palette.bright))
    if not drawn:
        return None
    # The compared groups, which come first, determine the metric.
    metric = drawn[0].condition.metric
    drawn = [group for group in drawn if group.condition.metric == metric]
    curves = published.curves().get(env_name, {}) if metric == SUCCESS else {}
    with matplotlib.rc_context(STYLE):
        size = (7.2 if curves else 4.6) + width_for(map(line_name, drawn)), height_for(max(len(drawn), len(curves)))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, 2 if curves else 1, sharey=True, squeeze=False)[0]
        online = all(group.runs[0].rollout_steps is not None for group in drawn)
        for axes in panels:
            label_axes(axes, metric, "Environment steps" if online else "Updates")
        starts = {online_from(group.runs[0].settings) for group in drawn}
        if len(starts) == 1 and (step := starts.pop()):
            mark_online(panels[0], step)
        ends = [_draw_group(panels[0], group, palette, index) for index, group in enumerate(drawn)]
        panels[0].set_xlim(left=0)
        panels[0].set_title(env_name if not curves else f"{env_name}: these runs")
        label_ends(panels[0], ends)
        if curves:
            panels[1].set(title=f"Published, {published.SEEDS} seeds", ylabel="", xlim=(0, published.STEPS))
            label_ends(panels[1], [_draw_published(panels[1], name, own, palette) for name, own in curves.items()])
        return render(figure, _caption(drawn, metric, bool(curves)))


def _only_length(reasons: list[str]) -> bool:
    """True if a group is compared, or is not because of its number of updates alone."""
    return all(reason.startswith(("unfinished:", "diverged:", "other updates:")) for reason in reasons)


def line_name(group: Group) -> str:
    """Returns the name at a line's end: the label, and why the group is not compared, if it is not."""
    return f"{group.label} ({group.apart[0].split(':')[0]})" if group.apart else group.label


def _draw_group(axes: Axes, group: Group, palette: Palette, index: int) -> tuple[str, float, float, str]:
    """Draws the mean over seeds, and its interval as a band; returns name, last x and y, and colour."""
    steps, values = group.curve()
    means, style = values.mean(axis=0), palette.style(group.label)
    style = grey_style(style) if index >= MOST else style
    style |= {"linestyle": ":", "markerfacecolor": "none", "linewidth": 0.9} if group.apart else {}
    # Not clipped, so that markers at 0 and 1 are drawn whole.
    axes.plot(steps, means, label=line_name(group), clip_on=False, **style)
    if style["color"] != GREY and (band := bootstrap([values], mean_over_runs)):
        axes.fill_between(steps, *band, color=style["color"], alpha=0.15, linewidth=0)
    return line_name(group), float(steps[-1]), float(means[-1]), style["color"]


def _draw_published(axes: Axes, method: str, curve: published.Curve, palette: Palette) -> tuple[str, float, float, str]:
    """Draws a published curve dashed; returns as `_draw_group`."""
    colour = palette.published(method)
    width, order = (0.7, 1.5) if colour == GREY else (1.1, 2.5)
    axes.plot(curve.steps, curve.mean, "--", color=colour, linewidth=width, zorder=order, clip_on=False, label=method)
    return method, float(curve.steps[-1]), float(curve.mean[-1]), colour


def _caption(groups: list[Group], metric: str, curves: bool) -> str:
    """Returns the caption of a task's learning curves."""
    seeds = counted({line_name(group): len(group.runs) for group in groups}, "seed")
    band = "; band: 95 % bootstrap interval over seeds" if any(len(group.runs) > 1 for group in groups) else ""
    parts = [f"Mean {MEASURES[metric]} over {seeds}; {episodes_of(groups)} per evaluation{band}."]
    if len(groups) > MOST:
        parts.append(f"Grey, without band: all but OTQL and the best {MOST - 1} others.")
    if any(group.apart for group in groups):
        parts.append("Dotted: unfinished, diverged, or of another number of updates.")
    if curves:
        parts.append("Published: QAM's released data, 4×512 networks; methods that were run here in their colour.")
    return " ".join(parts)


def episodes_of(groups: list[Group]) -> str:
    """Returns the number of episodes of the groups' evaluations, as '25 or 50 episodes'."""
    counts = {int(n) for group in groups for run in group.runs for n in run.episodes if np.isfinite(n)}
    return f"{' or '.join(map(str, sorted(counts))) or 'unrecorded'} episodes"
