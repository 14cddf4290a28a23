"""Success against the number of network evaluations, from evaluations in training and from `experiments.evaluate`."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.report import evaluations
from experiments.report.curves import Palette
from experiments.report.groups import Group, span
from experiments.report.runs import Run
from utils.errors import UserError
from utils.output.intervals import mean_over_runs, scalar_bootstrap, wilson_interval
from utils.output.loggers import SUCCESS
from utils.output.plotting import (
    GREY,
    MOST,
    STYLE,
    Drawing,
    counted,
    grey_style,
    height_for,
    label_axes,
    label_ends,
    render,
    width_for,
)

MARKERS = "os^DvPX"  # Of N, from the smallest.


@dataclass(frozen=True)
class Point:
    """A method's success with a number of network evaluations and of candidates.

    Attributes:
        nfe: network evaluations per candidate. best_of_n: candidates.
        scores: of each seed.
        episodes: of each seed.
        training: whether the scores are those of the tables, from evaluations in training.
    """

    label: str
    nfe: int
    best_of_n: int
    scores: Float[np.ndarray, " seeds"]
    episodes: int
    training: bool

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval: bootstrap over seeds, or Wilson's over episodes for a single seed."""
        ends = scalar_bootstrap([self.scores], mean_over_runs)
        if ends:
            return ends
        lower, upper = wilson_interval(float(self.scores[0]), self.episodes)
        return float(lower), float(upper)


def find_points(groups: Iterable[Group]) -> tuple[list[Point], list[str]]:
    """Returns the points of the compared groups of a task, and a line for each damaged evaluations.csv."""
    points, damaged = [], []
    for group in groups:
        if group.apart or group.condition.metric != "success_rate":
            continue
        found: dict[tuple[int, int], list[tuple[float, int]]] = {}
        for run in group.runs:
            try:
                own = _evaluated(run, group.condition.steps[-1])
            except UserError as error:
                damaged.append(str(error))
                continue
            for key, value in own.items():
                found.setdefault(key, []).append(value)
        trained = _trained(group)
        for (nfe, best_of_n), values in found.items():
            scores = np.array([score for score, _ in values])
            points.append(Point(group.label, nfe, best_of_n, scores, min(count for _, count in values), False))
        if trained and (trained.nfe, trained.best_of_n) not in found:
            points.append(trained)
    return points, damaged


def _trained(group: Group) -> Point | None:
    """Returns the point of a group's evaluations in training, None if its NFE is not recorded."""
    run, steps = group.runs[0], len(group.condition.steps)
    episodes = [run.episodes[-steps:].sum() for run in group.runs]
    best_of_n = run.settings["config"].get("best_of_n", 1)
    if run.nfe is None or not isinstance(best_of_n, int) or not np.isfinite(episodes).all():
        return None
    return Point(group.label, run.nfe, best_of_n, group.scores, int(min(episodes)), True)


def _evaluated(run: Run, step: int) -> dict[tuple[int, int], tuple[float, int]]:
    """Returns (NFE, N) → success rate and episodes of a run's evaluations.csv, at a step and as trained otherwise.

    Evaluations with several seeds of the initial states are pooled; of one seed the last counts.

    Raises:
        UserError: the file is damaged.
    """
    config = run.settings["config"]
    found: dict[tuple[int, int], dict[str, tuple[float, int]]] = {}
    for row in evaluations.read_rows(run.directory):
        try:
            others = {k: v for k, v in evaluations.settings_of(row).items() if k not in ("flow_steps", "best_of_n")}
            as_trained = all(evaluations.same(text, config.get(name)) for name, text in others.items())
            if int(row["step"]) != step or not as_trained:
                continue
            trained = config.get("flow_steps")
            nfe = (run.nfe or 0) + (int(row["flow_steps"]) - trained if "flow_steps" in row else 0)
            key = nfe, int(row.get("best_of_n") or config.get("best_of_n", 1))
            if row["success_rate"] and run.nfe is not None:
                found.setdefault(key, {})[row["seed"]] = float(row["success_rate"]), int(row["episodes"])
        except (KeyError, TypeError, ValueError) as error:
            path = run.directory / evaluations.FILE
            raise UserError(f"{path} is damaged ({error!r}); correct it or move it elsewhere") from error
    pooled = {}
    for key, results in found.items():
        rates, counts = zip(*results.values(), strict=True)
        pooled[key] = float(np.average(rates, weights=counts)), sum(counts)
    return pooled


def draw_nfe(env_name: str, points: list[Point], palette: Palette) -> Drawing | None:
    """Draws success against NFE, a line for each method and N with N's marker; None with fewer than two points."""
    if len(points) < 2:
        return None
    lines: dict[tuple[str, int], list[Point]] = {}
    for point in sorted(points, key=lambda point: point.nfe):
        lines.setdefault((point.label, point.best_of_n), []).append(point)
    best = {key: max(point.scores.mean() for point in own) for key, own in lines.items()}
    order = sorted(lines, key=lambda key: (key[0] not in palette.bright, not key[0].startswith("OTQL"), -best[key]))
    counts = sorted({point.best_of_n for point in points})
    markers = {count: MARKERS[min(index, len(MARKERS) - 1)] for index, count in enumerate(counts)}
    # Points with the same NFE stand beside each other.
    beside = {nfe: [key for key in order if nfe in {p.nfe for p in lines[key]}] for nfe in {p.nfe for p in points}}
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(4.6 + width_for(label for label, _ in lines), height_for(len(lines))), layout="constrained"
        )
        axes = figure.add_subplot()
        axes.set_xscale("log")
        ends = []
        for index, key in enumerate(order):
            style = palette.style(key[0]) if index < MOST else grey_style(palette.style(key[0]))
            name = f"{key[0]}, N {key[1]}" if len(counts) > 1 else key[0]
            places = [(beside[p.nfe].index(key) - (len(beside[p.nfe]) - 1) / 2) for p in lines[key]]
            nfes = [p.nfe * 1.03**place for p, place in zip(lines[key], places, strict=True)]
            ends.append((name, *_draw_line(axes, nfes, lines[key], style | {"marker": markers[key[1]]})))
        label_axes(axes, SUCCESS, "NFE: network evaluations per candidate")
        nfe_values = sorted(beside)
        ticks = [nfe for nfe, before in zip(nfe_values, [0, *nfe_values], strict=False) if nfe >= 1.2 * before]
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(nfe_values[0] / 1.3, nfe_values[-1] * 1.3)
        axes.set_title(env_name)
        label_ends(axes, ends)
        return render(figure, _caption(points, len(lines)))


def _draw_line(axes: Axes, nfes: list[float], points: list[Point], style: dict[str, Any]) -> tuple[float, float, str]:
    """Draws a method's points for one N, filled if `experiments.evaluate` measured them; returns end and colour."""
    means = np.array([point.scores.mean() for point in points])
    order, size = style["zorder"], 3 if style["color"] == GREY else 4.5
    axes.plot(nfes, means, color=style["color"], linewidth=style.get("linewidth", 1.2), zorder=order)
    axes.vlines(
        nfes, *np.array([point.interval for point in points]).T, color=style["color"], linewidth=0.8, zorder=order
    )
    for x, y, point in zip(nfes, means, points, strict=True):
        fill: dict[str, Any] = {"markerfacecolor": "none"} if point.training else {}
        axes.plot(
            x, y, style["marker"], color=style["color"], markersize=size, clip_on=False, zorder=order + 0.1, **fill
        )
    return float(nfes[-1]), float(means[-1]), style["color"]


def _caption(points: list[Point], lines: int) -> str:
    """Returns the caption of the figure."""
    names = {point.label for point in points}
    seeds = counted({name: min(len(p.scores) for p in points if p.label == name) for name in sorted(names)}, "seed")
    episodes = span((point.episodes for point in points), "episode")
    parts = [
        f"Mean over {seeds}; {episodes} per point and seed; bars: 95 % bootstrap interval over seeds, for a "
        "single seed Wilson's over episodes. N: candidates, of which the critic's best is executed (a marker each)."
    ]
    if any(point.training for point in points):
        parts.append("Open markers: evaluations in training; filled: python -m experiments.evaluate after it.")
    if lines > MOST:
        parts.append("Grey: all but OTQL and the best others.")
    return " ".join(parts)
