"""Ablation studies of OTQL's settings.

    python -m experiments.ablate --study=lam --scale=laptop [status | report]

A study varies one setting; 'coupling' pairs noise and actions by optimal transport or at random, for several numbers of
Euler steps. The runs are a sweep and accept the flags of python -m experiments.sweep; rerun the same command to resume.
Values of a real-valued setting are trained in one program.

Written to <save_dir>/ablate-<scale>-<study>/report, by the action `report` also during training:

    ablation.png   learning curves, and the score over the setting
    ablation.md    the scores as a table, also printed
    curves.csv     every evaluation of every seed, with the settings

A score is a seed's mean over its last three evaluations (all if there are fewer); intervals are 95 % bootstrap
intervals over seeds.
"""

import functools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from experiments.report.curves import episodes_of
from experiments.report.groups import Group, differences, group_runs, span
from experiments.report.runs import find_runs, show
from experiments.sweep import command as sweep
from experiments.sweep.grids import COLLECTED, CPU, NOISY, PLAN, STANDARD, Grid
from utils.errors import UserError
from utils.output.plotting import STYLE, captioned_png, counted, height_for, label_axes, label_ends
from utils.output.tables import csv_text, markdown_table
from utils.system.cli import define_flag, parse_arguments
from utils.system.entry_point import run_main
from utils.system.files import atomic_write_bytes, atomic_write_text

# Study → setting → its values. The last setting is the x axis of the figure; a setting before it distinguishes lines.
STUDIES: dict[str, dict[str, tuple[Any, ...]]] = {
    "lam": {"lam": (0.1, 0.4, 1.0, 1.5, 4.0)},
    "best_of_n": {"best_of_n": (1, 5, 32)},
    "nfe": {"flow_steps": (1, 2, 3, 10)},
    "alpha": {"alpha": (0.0, 0.1, 0.3, 1.0, 3.0)},
    "epsilon": {"epsilon": (0.1, 0.2, 0.5, 1.0, 2.0)},
    "value_samples": {"value_samples": (1, 2, 4, 8)},
    "source_conditions": {"source_conditions": ("iid", "systematic", "resampled", "weighted")},
    "coupling": {"coupling": ("ot", "independent"), "flow_steps": (1, 2, 3, 10)},
}
LABELS = {
    **{"lam": "λ", "best_of_n": "N", "flow_steps": "NFE", "alpha": "α", "epsilon": "ε"},
    **{"value_samples": "k, value samples", "source_conditions": "source conditions"},
}
# Colours of the score's lines.
SCORES = ("#0077BB", "#D55E00", "#009E73", "#CC79A7")
# Scale → task, seeds and flags; settings that a study does not vary are the preset's.
SCALES = {
    "laptop": Grid(
        ("otql",),
        ("scene-play-singletask-task1-v0",),
        seeds=3,
        flags=("--offline_steps=12000", PLAN, STANDARD, *COLLECTED, *CPU),
    ),
    "laptop_online": Grid(("otql",), ("OpenMicrowave-v0",), seeds=3, program="online_main.py", flags=NOISY),
    "paper": Grid(("otql",), ("cube-double-play-singletask-task2-v0",), seeds=4),
    "online": Grid(
        ("otql",), ("OpenMicrowave-v0",), seeds=5, program="online_main.py", flags=("--base_group=ablate-base",)
    ),
}

FLAGS = flags.FlagValues()
FLAGS.append_flag_values(sweep.FLAGS)
del FLAGS.grid, FLAGS.agents
_flag = functools.partial(define_flag, FLAGS)
_flag("enum", "study", None, "Setting to vary.", enum_values=list(STUDIES))
_flag("enum", "scale", "laptop", "Task, seeds and length of the runs.", enum_values=list(SCALES))


@dataclass(frozen=True)
class Point:
    """The runs of one combination of a study's values."""

    values: tuple[Any, ...]
    group: Group


def make_grid(study: str, scale: str) -> Grid:
    """Returns the grid of a study's runs."""
    *others, (axis, values) = STUDIES[study].items()
    choices: dict[str, tuple[str, ...]] = {"": ()}
    for name, own in others:
        choices = {f"{c}{v}-": (*f, f"--agent.{name}={v}") for c, f in choices.items() for v in own}
    if isinstance(values[0], float):
        vary = f"--vary=agent.{axis}={','.join(map(show, values))}"
        settings = {choice.rstrip("-"): (*own, vary) for choice, own in choices.items()}
    else:
        settings = {f"{c}{axis}{v}": (*own, f"--agent.{axis}={v}") for c, own in choices.items() for v in values}
    return replace(SCALES[scale], settings=settings)


def find_points(study: str, directories: list[Path]) -> tuple[list[Point], list[str]]:
    """Returns the runs that can be compared, in the order of the study's values, and a line for each other group.

    Compared runs share all settings that are not varied; the values are those that most runs have.
    """
    found, left_out = find_runs(directories)
    points, fields = [], STUDIES[study]
    groups = group_runs(found, last=3)
    counts: Counter[str] = Counter()
    for group in groups:
        counts[json.dumps(_others(study, group), sort_keys=True)] += 0 if group.apart else len(group.runs)
    usual = json.loads(counts.most_common(1)[0][0])
    for group in groups:
        values = tuple(group.runs[0].settings["config"].get(name) for name in fields)
        if any(value not in own for value, own in zip(values, fields.values(), strict=True)):
            continue  # A run of an earlier version of the study.
        name = ", ".join(f"{LABELS.get(field, field)} {show(v)}" for field, v in zip(fields, values, strict=True))
        changed = [
            f"{key} {show(own)}, not {show(most)}" for key, own, most in differences(_others(study, group), usual)
        ]
        reasons = group.apart or ([f"other settings: {', '.join(changed)}"] if changed else [])
        if reasons:
            left_out.append(f"{name}, {len(group.runs)} of the seeds: {'; '.join(reasons)}")
        else:
            points.append(Point(values, group))
    points.sort(key=lambda point: [own.index(v) for own, v in zip(fields.values(), point.values, strict=True)])
    return points, left_out


def _others(study: str, group: Group) -> dict[str, Any]:
    """Returns what a study's runs must share: the settings that it does not vary, and the agent's file."""
    settings = group.runs[0].settings
    others = {name: value for name, value in settings["config"].items() if name not in STUDIES[study]}
    return others | {"agent_module": settings.get("agent_module")}


def table(study: str, points: Sequence[Point]) -> str:
    """Returns the scores in Markdown, in the study 'coupling' also the gain by the largest number of Euler steps."""
    gap, most = len(STUDIES[study]) > 1, max(point.values[-1] for point in points)
    header = [*(LABELS.get(name, name) for name in STUDIES[study]), "score", "95 % interval", "seeds"]
    rows = []
    for point in points:
        interval = point.group.interval
        scores = sorted((run.seed, score) for run, score in zip(point.group.runs, point.group.scores, strict=True))
        row = [*map(show, point.values), f"{point.group.mean:.2f}"]
        row += [f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else "one seed"]
        row += [", ".join(f"{score:.2f}" for _, score in scores)]
        if gap:
            best = [p.group.mean for p in points if p.values == (*point.values[:-1], most)]
            row.append(f"{best[0] - point.group.mean:+.2f}" if best else "–")
        rows.append(row)
    header += [f"gain by {LABELS['flow_steps']} {show(most)}"] if gap else []
    return markdown_table(header, rows, rule="| --- ")


def curves_csv(study: str, scale: str, points: Sequence[Point]) -> str:
    """Returns every evaluation as CSV, below two comments: the command, and the settings that all runs share."""
    configs = [point.group.runs[0].settings["config"] for point in points]
    shared = {k: v for k, v in configs[0].items() if all(config.get(k) == v for config in configs)}
    rows: list[list[Any]] = [["env_name", *STUDIES[study], "seed", "step", "measure", "value", "episodes"]]
    for point in points:
        for run in sorted(point.group.runs, key=lambda run: run.seed):
            for step, value, episodes in zip(run.steps, run.values, run.episodes, strict=True):
                row = [point.group.env_name, *map(show, point.values), run.seed, int(step), run.metric]
                rows.append([*row, f"{value:g}", f"{episodes:g}"])
    comments = f"# python -m experiments.ablate --study={study} --scale={scale}\n# {json.dumps(shared)}\n"
    return comments + csv_text(rows)


def draw(study: str, points: Sequence[Point]) -> bytes:
    """Draws learning curves, a panel for each value of the setting before the x axis, and the score (right) as PNG."""
    axis, choices = list(STUDIES[study].items())[-1]
    ticks = [value for value in choices if any(point.values[-1] == value for point in points)]
    lines = {
        line: [p for p in points if p.values[:-1] == line] for line in dict.fromkeys(p.values[:-1] for p in points)
    }
    shades = dict(zip(ticks, matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(ticks))), strict=True))
    styles = dict(zip(lines, ("-", "--", ":", "-."), strict=False))
    online = points[0].group.runs[0].rollout_steps is not None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 + 2.5 * len(lines), height_for(len(ticks))), layout="constrained")
        *panels, right = figure.subplots(1, len(lines) + 1, sharey=True)
        for axes, (line, own) in zip(panels, lines.items(), strict=True):
            label_axes(axes, points[0].group.condition.metric, "Environment steps" if online else "Updates")
            axes.set_title(" ".join(map(show, line)) or points[0].group.env_name)
            ends = []
            for point in own:
                steps, values = point.group.curve()
                means, colour = values.mean(axis=0), to_hex(shades[point.values[-1]])
                axes.plot(steps, means, styles[line], marker="o", color=colour, clip_on=False, zorder=3)
                name = f"{LABELS.get(axis, axis)} {show(point.values[-1])}"
                ends.append((name, float(steps[-1]), float(means[-1]), colour))
            axes.set_xlim(left=0)
            label_ends(axes, ends)
        for axes in panels[1:]:
            axes.set_ylabel("")
        drawn = [
            _draw_scores(right, own, ticks, styles[line], index) for index, (line, own) in enumerate(lines.items())
        ]
        right.set_xticks(range(len(ticks)), list(map(show, ticks)))
        right.set_xlabel(LABELS.get(axis, axis))
        right.set_title(f"Mean of the last {span([len(points[0].group.condition.steps)], 'evaluation')}")
        if len(lines) > 1:
            label_ends(right, drawn)
        return captioned_png(figure, _caption(points))


def _draw_scores(
    axes: Axes, points: Sequence[Point], ticks: list[Any], style: str, index: int
) -> tuple[str, float, float, str]:
    """Draws one line over the setting: means, intervals, and a dot for each seed; returns name, end and colour."""
    places = [ticks.index(point.values[-1]) for point in points]
    means = np.array([point.group.mean for point in points])
    ends = np.array([point.group.interval or (point.group.mean,) * 2 for point in points])
    colour = SCORES[index % len(SCORES)]
    # No interval where there is a single seed, whose spread is unknown.
    axes.errorbar(places, means, np.abs(ends.T - means), marker="o", capsize=2, linestyle=style, color=colour, zorder=3)
    dots: dict[str, Any] = {"color": colour, "markersize": 2.5, "markeredgewidth": 0.6, "markerfacecolor": "none"}
    for place, point in zip(places, points, strict=True):
        axes.plot([place + 0.12] * len(point.group.scores), point.group.scores, "o", clip_on=False, **dots)
    return " ".join(map(show, points[0].values[:-1])), float(places[-1]), float(means[-1]), colour


def _caption(points: Sequence[Point]) -> str:
    """Returns the caption of the figure."""
    groups = [point.group for point in points]
    seeds = counted({" ".join(map(show, point.values)): len(point.group.runs) for point in points}, "seed")
    task = f"OTQL on {groups[0].env_name}. "
    bars = "" if all(len(group.runs) == 1 for group in groups) else " Bars: 95 % bootstrap interval over seeds."
    return f"{task}Means over {seeds}, {episodes_of(groups)} per evaluation.{bars} Open circles: seeds."


def report(study: str, scale: str, directories: list[Path], output: Path) -> None:
    """Writes table, curves and figure of the existing runs, and prints the table.

    Raises:
        UserError: no runs can be compared, or `output` cannot be written.
    """
    points, left_out = find_points(study, directories)
    if not points:
        raise UserError(f"none of the study's runs can be compared yet: {(left_out or ['there are none'])[0]}")
    text = "\n".join([f"## {points[0].group.env_name}, {study}", "", table(study, points), ""])
    text += "".join(f"- left out: {line}\n" for line in left_out)
    atomic_write_bytes(output / "ablation.png", draw(study, points))
    atomic_write_text(output / "curves.csv", curves_csv(study, scale, points))
    atomic_write_text(output / "ablation.md", text)
    print(text)
    print(f"{output}: ablation.png, ablation.md, curves.csv", file=sys.stderr)


def main(argv: Sequence[str]) -> None:
    """Runs the study, or the command line's action on it."""
    actions = parse_arguments(argv, FLAGS)
    # Both share their flag objects, but each keeps its own mark of being parsed.
    sweep.FLAGS.mark_as_parsed()
    if not FLAGS.study:
        raise UserError(f"--study is missing; it is one of {', '.join(STUDIES)}")
    name, grid = f"ablate-{FLAGS.scale}-{FLAGS.study}", make_grid(FLAGS.study, FLAGS.scale)
    write = functools.partial(report, FLAGS.study, FLAGS.scale)
    sweep.run_action(actions, name, grid, write)
    if actions in ([], ["start"]) and FLAGS.backend == "local" and not FLAGS.dry_run:
        sweep.run_action(["report"], name, grid, write)


if __name__ == "__main__":
    run_main(main)
