"""Aggregate over tasks, as rliable has it: interquartile mean, mean rank and performance profile of each method."""

from dataclasses import dataclass

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import rankdata

from experiments.report.curves import Palette, episodes_of
from experiments.report.groups import Group, show_steps, span
from experiments.report.tables import SINGLE_TASKS, Cell, Score, Table, compared, labels_of, marked
from utils.output.intervals import Statistic, bootstrap, iqm, scalar_bootstrap
from utils.output.plotting import GREY, MOST, STYLE, Drawing, counted, height_for, render

THRESHOLDS = np.linspace(0, 1, 51)


@dataclass(frozen=True)
class Aggregate:
    """The scores over which methods are aggregated.

    Attributes:
        tasks: those that all compared methods with success rates have.
        groups: method → its groups, one a task; empty without such tasks.
    """

    tasks: list[str]
    groups: dict[str, list[Group]]

    @classmethod
    def of(cls, groups: list[Group]) -> "Aggregate":
        """Returns the aggregate of the groups that are compared."""
        rated = [group for group in groups if group.condition.metric == "success_rate"]
        labels, environments = list(labels_of(rated)), compared(rated)
        tasks = [name for name, shown in sorted(environments.items()) if set(shown) == set(labels)]
        return cls(tasks, {label: [environments[name][label] for name in tasks] for label in labels if tasks})

    def strata(self, label: str) -> list[Float[np.ndarray, " seeds"]]:
        """Returns a method's scores, one array a task."""
        return [group.scores for group in self.groups[label]]

    def iqms(self) -> dict[str, Score]:
        """Returns the interquartile mean of each method over runs and tasks."""
        strata = {label: self.strata(label) for label in self.groups}
        return {k: Score(float(iqm(np.concatenate(own))), scalar_bootstrap(own, iqm)) for k, own in strata.items()}

    def ranks(self) -> dict[str, tuple[float, tuple[float, float] | None]]:
        """Returns each method's mean rank over tasks, 1 being best and ties sharing theirs, and its interval."""
        labels = list(self.groups)
        strata = [group.scores for label in labels for group in self.groups[label]]
        statistic = _mean_ranks([len(stratum) for stratum in strata], len(labels))
        means = statistic(np.concatenate(strata))
        ends = bootstrap(strata, statistic)
        intervals = list(zip(*map(np.asarray, ends), strict=True)) if ends else [None] * len(labels)
        return {k: (float(mean), own) for k, mean, own in zip(labels, means, intervals, strict=True)}


def _mean_ranks(sizes: list[int], methods: int) -> Statistic:
    """Returns the mean rank over tasks of each method as a statistic, [methods, …].

    Args:
        sizes: number of runs of each stratum: the tasks of the first method, then those of the next.
    """
    cuts = np.cumsum(sizes)[:-1]

    def statistic(samples: Float[np.ndarray, "*s runs"]) -> Float[np.ndarray, " methods *s"]:
        means = np.stack([part.mean(axis=-1) for part in np.split(samples, cuts, axis=-1)])
        means = means.reshape(methods, -1, *means.shape[1:])
        # Rounded: equal scores may differ in their last bits.
        return rankdata(-means.round(9), axis=0).mean(axis=1)

    return statistic


def task_ranks(groups: list[Group]) -> dict[str, float]:
    """Returns each compared method's mean rank over the tasks that it has, whatever the others have."""
    found: dict[str, list[float]] = {}
    for shown in compared(groups).values():
        for label, rank in zip(shown, rankdata([-group.mean for group in shown.values()]), strict=True):
            found.setdefault(label, []).append(float(rank))
    return {label: float(np.mean(ranks)) for label, ranks in found.items()}


def aggregate_table(groups: list[Group]) -> Table:
    """Returns each method's IQM over runs × tasks and mean rank, over the tasks that all compared methods have."""
    aggregate = Aggregate.of(groups)
    table = Table("Aggregate over tasks", ["method", "IQM of success", "mean rank", "runs × tasks"])
    if not aggregate.tasks:
        table.notes.append("There is no aggregate: no task has finished, comparable runs of all methods.")
        return table
    scores, ranks = aggregate.iqms(), aggregate.ranks()
    cells = marked(scores, SINGLE_TASKS)
    for label in sorted(scores, key=lambda name: (ranks[name][0], -scores[name].mean)):
        sizes = [len(stratum) for stratum in aggregate.strata(label)]
        counts = f"{sizes[0]} × {len(sizes)}" if len(set(sizes)) == 1 else " + ".join(map(str, sizes))
        rank, ends = ranks[label]
        interval = f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else ""
        table.rows.append([Cell(label), cells[label], Cell(f"{rank:.1f}", "", interval), Cell(counts)])
    left_out = sorted({group.env_name for group in groups} - set(aggregate.tasks))
    table.notes += [
        "Interquartile mean (a quarter of the scores cut off at each end, rounded down) and mean rank (1 is best, ties "
        "share), with 95 % percentile bootstrap intervals, seeds resampled within each task"
        + ("" if any(ends for _, ends in ranks.values()) else "; ranks have none where a method has single seeds")
        + ". Bold: best; underlined: within the interval of the best.",
        f"Over the tasks that all these methods have ({len(aggregate.tasks)}): {', '.join(aggregate.tasks)}.",
    ]
    if any(" + " in row[-1].text for row in table.rows):
        table.notes.append("A task with more seeds has more weight.")
    if left_out:
        table.notes.append(f"Not in it: {', '.join(left_out)}.")
    return table


def profile(scores: Float[np.ndarray, "*s runs"]) -> Float[np.ndarray, " thresholds *s"]:
    """Returns the share of runs with a score above each threshold, a `Statistic`."""
    return np.stack([(scores > threshold).mean(axis=-1) for threshold in THRESHOLDS])


def draw_aggregate(groups: list[Group], palette: Palette) -> Drawing | None:
    """Draws the interquartile means (left) and the performance profiles (right); None without common tasks."""
    aggregate = Aggregate.of(groups)
    if not aggregate.tasks:
        return None
    scores = aggregate.iqms()
    order = sorted(scores, key=lambda label: scores[label].mean)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, height_for(len(order))), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_means(left, {label: scores[label] for label in order}, palette)
        for label in order:
            _draw_profile(right, aggregate.strata(label), palette.style(label))
        right.set(xlabel="Success rate τ", ylabel="Share of runs with a score > τ", xlim=(0, 1), ylim=(0, 1))
        right.set_title("Performance profile")
        return render(figure, _caption(aggregate))


def _draw_means(axes: Axes, scores: dict[str, Score], palette: Palette) -> None:
    """Draws a row for each method: its interquartile mean and the interval."""
    for place, (label, score) in enumerate(scores.items()):
        style = palette.style(label)
        if score.interval:
            axes.plot(
                score.interval, [place, place], color=style["color"], linewidth=3, alpha=0.35, solid_capstyle="butt"
            )
        look = {"color": style["color"], "marker": style["marker"], "markersize": 4, "clip_on": False}
        axes.plot(score.mean, place, zorder=3, **look)
    axes.set_yticks(range(len(scores)), list(scores))
    for text, label in zip(axes.get_yticklabels(), scores, strict=True):
        text.set_color(palette.style(label)["color"])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="Interquartile mean of success", xlim=(0, 1), ylim=(-0.6, len(scores) - 0.4))
    axes.set_title("Aggregate")


def _draw_profile(axes: Axes, strata: list[np.ndarray], style: dict) -> None:
    """Draws a method's performance profile, and its interval as a band."""
    axes.plot(THRESHOLDS, profile(np.concatenate(strata)), **{**style, "markevery": (0, 5), "clip_on": False})
    if style["color"] != GREY and (band := bootstrap(strata, profile)):
        axes.fill_between(THRESHOLDS, *band, color=style["color"], alpha=0.12, linewidth=0)


def _caption(aggregate: Aggregate) -> str:
    """Returns the caption of the aggregate figure."""
    firsts = {label: groups[0] for label, groups in aggregate.groups.items()}
    runs = counted({k: sum(len(g.runs) for g in groups) for k, groups in aggregate.groups.items()}, "run")
    steps = next(iter(firsts.values())).condition.steps
    every = [group for groups in aggregate.groups.values() for group in groups]
    seeds = span((len(group.runs) for group in every), "seed")
    parts = [
        f"{span([len(aggregate.tasks)], 'task')}, {seeds} each: {runs} a method. A run's score is its mean over the "
        f"last {len(steps)} evaluations (to {show_steps(steps[-1])}) of {episodes_of(every)}. Bars and bands: 95 % "
        "bootstrap intervals, seeds resampled within tasks; none where a task has a single seed."
    ]
    if len(firsts) > MOST:
        parts.append(f"Grey: all but OTQL and the best {MOST - 1} others by rank.")
    return " ".join(parts)
