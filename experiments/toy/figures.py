"""Tables and figures of the toy study."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch

from utils.output.intervals import t_interval
from utils.output.plotting import STYLE, to_png
from utils.output.tables import csv_text, markdown_table

Result = dict[str, np.ndarray]
Measures = dict[tuple[str, float, float], Float[np.ndarray, "seeds 3"]]  # of (method, α, ε)
NFES = (1, 2, 3, 5, 10, 100)
METRICS = ("wanted_share", "distance", "straightness", "gap")
DIAGNOSTICS = ("condition_match", "transport_cost", "marginal_error", "capped", "iterations")
COLOURS = STYLE["axes.prop_cycle"].by_key()["color"]
GREY, UNWANTED = "#8c8c8c", "#dedede"
LABELS = {"ewfm": "EWFM", "wcot": "wCOT (ours)", "true": "true samples"}
TITLES = {
    "wanted_share": "Share of samples wanted",
    "distance": "Distance to the target",
    "straightness": "Path length / displacement",
}
STAR: dict[str, Any] = {"marker": "*", "markersize": 7, "markeredgecolor": "black", "markeredgewidth": 0.5}
CROSS: dict[str, Any] = {"marker": "x", "markersize": 4}
BEND = "Bend:\nextra path length, %"


@dataclass(frozen=True, order=True)
class Job:
    """The settings of one training.

    Attributes:
        condition: 'moon' or 'rotation'.
        energy: where it is 1, 'inside' or 'outside' the circles.
        method: 'wcot', 'ewfm', or 'true' for true samples without a flow.
    """

    condition: str
    energy: str
    method: str
    updates: int = 0
    alpha: float = 0.0
    epsilon: float = 0.0
    seed: int = 0


def by_setting(results: dict[Job, Result]) -> dict[Job, Result]:
    """Stacks the results of all seeds of a setting.

    Returns:
        setting (a job with seed 0) → metrics [seeds, len(NFES)], diagnostics [seeds], and paths of the first seed.
    """
    groups: dict[Job, list[Result]] = {}
    for job in sorted(results, key=lambda job: replace(job, method=str(list(LABELS).index(job.method)))):
        groups.setdefault(replace(job, seed=0), []).append(results[job])
    return {
        setting: {
            name: value if name.startswith("path") else np.stack([result[name] for result in found])
            for name, value in found[0].items()
        }
        for setting, found in groups.items()
    }


def runs_table(results: dict[Job, Result]) -> str:
    """Returns CSV with one row for each training and NFE."""
    rows = [
        _described(job)
        | {"nfe": nfe}
        | {name: _number(result[name][i]) for name in METRICS}
        | {name: _number(result.get(name)) for name in DIAGNOSTICS}
        for job, result in sorted(results.items())
        for i, nfe in enumerate(NFES)
    ]
    return csv_text([rows[0], *(row.values() for row in rows)])


def means_table(results: dict[Job, Result]) -> str:
    """Returns CSV with one row for each setting and NFE: mean and 95 % t-interval of each metric over seeds."""
    rows = []
    for setting, data in by_setting(results).items():
        seeds = len(data[METRICS[0]])
        for i, nfe in enumerate(NFES):
            row = {k: v for k, v in _described(setting).items() if k != "seed"} | {"seeds": seeds, "nfe": nfe}
            for name in METRICS:
                mean, half = t_interval(data[name][:, i])
                row |= {name: _number(mean), f"{name}_low": _number(mean - half), f"{name}_high": _number(mean + half)}
            rows.append(row | {name: _number(data[name].mean() if name in data else None) for name in DIAGNOSTICS})
    return csv_text([rows[0], *(row.values() for row in rows)])


def metrics_table(results: dict[Job, Result]) -> str:
    """Returns the numbers of figure1.png and nfe.png in Markdown: metrics by NFE, mean ± half the interval."""
    rows, groups = [], by_setting(results)
    for metric in METRICS:
        for setting, data in groups.items():
            if np.isfinite(data[metric]).all():
                cells = [_plus_minus(*t_interval(data[metric][:, i])) for i in range(len(NFES))]
                cells = cells[:1] + [""] * (len(NFES) - 1) if setting.method == "true" else cells
                rows.append([f"{setting.energy} the circles", metric.replace("_", " "), LABELS[setting.method], *cells])
    return markdown_table(["energy is 1", "metric", "method", *(f"NFE {nfe}" for nfe in NFES)], rows)


def _described(job: Job) -> dict[str, Any]:
    settings = asdict(job)
    return settings if job.method == "wcot" else settings | {"alpha": "", "epsilon": ""}


def _number(value: Any) -> str:
    return "" if value is None or not np.isfinite(value) else f"{float(value):.4f}"


def _plus_minus(mean: Float[np.ndarray, ""], half: Float[np.ndarray, ""]) -> str:
    return f"{mean:.3f} ± {half:.3f}" if np.isfinite(half) else f"{mean:.3f}"


def draw_samples(results: dict[Job, Result], centres: Float[np.ndarray, "circles 2"], radius: float) -> bytes:
    """Draws Fig. 1: samples and paths of the first seed with 100 and 2 steps; the numbers are means over seeds."""
    groups = {(setting.energy, setting.method): data for setting, data in by_setting(results).items()}
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(7.2, 4.6))
        # A narrow empty column between the two energies.
        widths, frame = (1, 1, 0.06, 1, 1), {"left": 0.025, "right": 0.997, "bottom": 0.105, "top": 0.91}
        grid = figure.add_gridspec(2, 5, width_ratios=widths, wspace=0.04, hspace=0.17, **frame)
        for left, energy, other in ((0, "inside", "outside"), (3, "outside", "inside")):
            for column, method in enumerate(("ewfm", "wcot")):
                for row, nfe in enumerate((100, 2)):
                    axes = figure.add_subplot(grid[row, left + column])
                    _draw_panel(axes, groups[energy, method], nfe, energy, centres, radius)
                    if row == 0:
                        axes.set_title(LABELS[method], weight="bold" if method == "wcot" else "normal", pad=3)
                    if left == column == 0:
                        axes.set_ylabel(f"{nfe} Euler steps", labelpad=3)
            middle = (grid[0, left].get_position(figure).x0 + grid[0, left + 1].get_position(figure).x1) / 2
            figure.text(middle, 0.965, f"Energy 1 {energy} the circles, 0 {other}", ha="center", fontsize=9)
        names = {GREY: "noise", COLOURS[0]: "samples, c = lower moon", COLOURS[1]: "samples, c = upper moon"}
        handles: list[Artist] = [
            Line2D([], [], color=colour, label=name, linestyle="", marker="o", markersize=4)
            for colour, name in names.items()
        ]
        handles.append(Patch(facecolor=UNWANTED, edgecolor="#505050", linewidth=0.6, label="energy 1"))
        figure.legend(handles=handles, loc="lower center", ncols=4, borderaxespad=0.1)
        return to_png(figure)


def _draw_panel(
    axes: Axes, data: Result, nfe: int, energy: str, centres: Float[np.ndarray, "circles 2"], radius: float
) -> None:
    """Draws one method with one number of steps on a background that is grey where the energy is 1."""
    axes.set(aspect="equal", xlim=(-1.72, 1.72), ylim=(-1.72, 1.72), xticks=[], yticks=[])
    axes.spines[:].set_visible(True)
    axes.spines[:].set_linewidth(0.4)
    inside, around = (UNWANTED, "white") if energy == "inside" else ("white", UNWANTED)
    axes.set_facecolor(around)
    for centre in centres:
        axes.add_patch(Circle(centre, radius, facecolor=inside, edgecolor="#505050", linewidth=0.6, zorder=0))
    paths = data[f"path_{nfe}"]
    axes.plot(*paths[0].reshape(-1, 2).T, ".", color=GREY, markersize=1.2, markeredgewidth=0, zorder=1)
    for half, colour in enumerate(COLOURS[:2]):
        axes.plot(*np.moveaxis(paths[:, half, :80], -1, 0), color=colour, linewidth=0.3, alpha=0.4, zorder=2)
        axes.plot(*paths[-1, half].T, ".", color=colour, markersize=2.0, markeredgewidth=0, alpha=0.8, zorder=3)
    row = NFES.index(nfe)
    share, distance, straightness = (data[name][:, row].mean() for name in METRICS[:3])
    numbers = f"distance {distance:.3f}, length × {straightness:.3f}"
    axes.set_xlabel(f"{100 * share:.0f} % wanted\n{numbers}", fontsize=6.5, labelpad=2)


def draw_nfe(results: dict[Job, Result]) -> bytes:
    """Draws metrics over the number of Euler steps; bands are 95 % t-intervals over seeds."""
    groups = by_setting(results)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.5), layout="constrained")
        panels = figure.subplots(2, 3, sharex=True, sharey="col")
        for row, energy in zip(panels, ("inside", "outside"), strict=True):
            for axes, (metric, title) in zip(row, TITLES.items(), strict=True):
                for setting, data in groups.items():
                    if setting.energy == energy:
                        _draw_metric(axes, setting.method, data[metric])
                axes.set_xscale("log")
                axes.set_xticks(NFES, [str(nfe) for nfe in NFES], minor=False)
                axes.set_xticks([], minor=True)
                if energy == "inside":
                    axes.set_title(title)
                else:
                    axes.set_xlabel("Euler steps (NFE)")
            row[0].set_ylabel(f"energy 1 {energy}")
            row[0].set_ylim(0, 1)
            row[1].set_ylim(bottom=0)
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return to_png(figure)


def _draw_metric(axes: Axes, method: str, values: Float[np.ndarray, "seeds NFEs"]) -> None:
    if method == "true":
        axes.axhline(values[:, 0].mean(), color=GREY, linestyle=":", linewidth=1, label=LABELS[method])
    else:
        colour = COLOURS[0] if method == "wcot" else COLOURS[1]
        _draw_band(axes, NFES, values, color=colour, label=LABELS[method], clip_on=False)


def _draw_band(
    axes: Axes, x: Sequence[float] | np.ndarray, values: Float[np.ndarray, "seeds points"], **style: Any
) -> None:
    """Draws a line of means over seeds with a band, their 95 % t-intervals."""
    mean, half = t_interval(values)
    axes.plot(x, mean, marker="o", zorder=3, **style)
    axes.fill_between(x, mean - half, mean + half, color=style["color"], alpha=0.2, linewidth=0)


def draw_sweep(results: dict[Job, Result], chosen: tuple[float, float]) -> bytes:
    """Draws bias, straightness, both, and one against the other, over α and ε; rows are kinds of condition.

    Args:
        chosen: (α, ε) of figure1.png, marked by a star if the sweep has it.
    """
    groups = by_setting(results)
    rows = {"moon": "c: which moon\n(2 values)", "rotation": "c: angle\n(a continuum)"}
    epsilons = sorted({setting.epsilon for setting in groups if setting.method == "wcot"})
    shades = dict(zip(epsilons, matplotlib.colormaps["viridis"](np.linspace(0.0, 0.8, len(epsilons))), strict=True))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.9), layout="constrained")
        panels = figure.subplots(2, 4)
        for row, (condition, label) in zip(panels, rows.items(), strict=True):
            own = {
                (s.method, s.alpha, s.epsilon): _measures(data)
                for s, data in groups.items()
                if s.condition == condition
            }
            _draw_measures(row[:3], own, shades, chosen if condition == "moon" else None)
            _draw_trade(row[3], own, shades, chosen if condition == "moon" else None)
            row[0].set_ylabel(label)
        titles = ("Bias:\ndistance, 100 steps", BEND, "Both:\ndistance, 2 steps", "The trade:\nbias over bend")
        for axes, title in zip(panels[0], titles, strict=True):
            axes.set_title(title)
        for axes, label in zip(panels[1], ("α", "α", "α", BEND.split("\n")[1]), strict=True):
            axes.set_xlabel(label)
        handles = [Line2D([], [], color=c, marker="o", label=f"wCOT, ε = {epsilon:g}") for epsilon, c in shades.items()]
        handles.append(Line2D([], [], color="black", linestyle="--", linewidth=0.9, **CROSS, label="EWFM"))
        handles.append(Line2D([], [], color=GREY, linestyle=":", linewidth=1, label="true samples"))
        if ("wcot", *chosen) in own:
            handles.append(Line2D([], [], color="white", **STAR, label="figure 1"))
        figure.legend(handles=handles, loc="outside lower center", ncols=7)
        return to_png(figure)


def _measures(data: Result) -> Float[np.ndarray, "seeds 3"]:
    """Returns bias, bend and both: distance and extra path length in % at 100 steps, and distance at 2 steps."""
    two, most = NFES.index(2), NFES.index(100)
    distance = data["distance"]
    return np.stack([distance[:, most], 100 * (data["straightness"][:, most] - 1), distance[:, two]], axis=1)


def _draw_measures(
    row: Iterable[Axes], own: Measures, shades: dict[float, Any], chosen: tuple[float, float] | None
) -> None:
    """Draws a panel for each measure: a line over α for each ε, with 95 % t-intervals over seeds."""
    alphas = sorted({alpha for method, alpha, _ in own if method == "wcot"})
    places = np.arange(len(alphas))
    for i, axes in enumerate(row):
        for epsilon, colour in shades.items():
            values = np.stack([own["wcot", alpha, epsilon][:, i] for alpha in alphas], axis=1)
            _draw_band(axes, places, values, color=colour)
            if chosen and chosen[0] in alphas and chosen[1] == epsilon:
                place = alphas.index(chosen[0])
                axes.plot(place, values[:, place].mean(), color=colour, zorder=5, **STAR)
        axes.axhline(own["ewfm", 0.0, 0.0][:, i].mean(), color="black", linestyle="--", linewidth=0.9)
        axes.set_xticks(places, [f"{alpha:g}" for alpha in alphas])
        if i == 1:
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis)
        else:
            axes.axhline(own["true", 0.0, 0.0][:, 0].mean(), color=GREY, linestyle=":", linewidth=1)
            axes.set_ylim(bottom=0)


def _draw_trade(axes: Axes, own: Measures, shades: dict[float, Any], chosen: tuple[float, float] | None) -> None:
    """Draws bias over bend: a line for each ε, along which α increases; see `_draw_measures`."""
    alphas = sorted({alpha for method, alpha, _ in own if method == "wcot"})
    for epsilon, colour in shades.items():
        bias, bend = np.stack([own["wcot", alpha, epsilon].mean(axis=0)[:2] for alpha in alphas], axis=1)
        axes.plot(bend, bias, marker="o", color=colour, zorder=3)
        labels: dict[tuple[float, float], list[str]] = {}
        for alpha, x, y in zip(alphas, bend, bias, strict=True):
            if (alpha, epsilon) == chosen:
                axes.plot(x, y, color=colour, zorder=5, **STAR)
            near = [p for p in labels if abs(np.log(p[0] / x)) < 0.2 and abs(p[1] - y) < 0.05 * bias.max()]
            labels.setdefault(near[0] if near else (x, y), []).append(f"{alpha:g}")
        for place, names in labels.items():
            text = f"α {', '.join(names)}"
            axes.annotate(text, place, xytext=(3, 3), textcoords="offset points", fontsize=5.5, color=colour)
    bias, bend, _ = own["ewfm", 0.0, 0.0].mean(axis=0)
    axes.plot(bend, bias, color="black", **CROSS)
    axes.axhline(own["true", 0.0, 0.0][:, 0].mean(), color=GREY, linestyle=":", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    _plain_numbers(axes.xaxis)


def _plain_numbers(axis: Axis) -> None:
    """Labels a logarithmic axis as 0.1, 1, 10."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")
