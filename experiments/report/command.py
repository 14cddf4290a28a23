"""Command line of reports, which compare runs with each other and with published results.

    python -m experiments.report exp/debug [more directories]

Writes report.md (also printed), report.html (one file with everything in it), aggregate.png, curves/<environment>.png,
nfe/<environment>.png and evaluations.csv. Only finished runs that share data, rewards and number of updates are
compared, and only seeds of the same settings are averaged; all others are listed with the reason.
"""

import functools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.report.aggregate import aggregate_table, draw_aggregate, task_ranks
from experiments.report.curves import Palette, draw_curves
from experiments.report.groups import Group, group_runs
from experiments.report.nfe import draw_nfe, find_points
from experiments.report.pages import Content, describe, html_page, markdown
from experiments.report.problems import failed_jobs, problems_table
from experiments.report.runs import find_runs
from experiments.report.tables import labels_of, runs_table, success_table
from utils.errors import UserError
from utils.output.tables import csv_text
from utils.run.agent_files import load_agent
from utils.system.cli import parse_arguments
from utils.system.entry_point import run_main
from utils.system.files import ROOT, atomic_write_bytes, atomic_write_text

FLAGS = flags.FlagValues()
flags.DEFINE_string("output", None, "Output directory; default: <first directory>/report.", flag_values=FLAGS)
flags.DEFINE_integer("last", 3, "Number of last evaluations to average.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("step", None, "Treat every run as if it ended at this step.", lower_bound=1, flag_values=FLAGS)


def default_settings(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the defaults of a run's agent, or None if it is not an agent of this project.

    Files elsewhere are not executed just because a flags.json names them.
    """
    agent = settings["agent"]
    if not agent.isidentifier() or settings.get("agent_module") != f"agents.{agent}":
        return None
    return _agent_defaults(agent)


@functools.cache
def _agent_defaults(agent: str) -> dict[str, Any] | None:
    try:
        config = load_agent(str(ROOT / "agents" / f"{agent}.py")).get_config()
    except UserError:
        return None
    return json.loads(json.dumps(config.to_dict(), default=list))


def evaluations_csv(groups: list[Group]) -> str:
    """Returns every evaluation of every run as CSV; `averaged` marks those that the tables average."""
    columns = ["env_name", "method", "not_compared", "seed", "step", "measure", "value", "episodes", "averaged"]
    rows: list[list[Any]] = [[*columns, "directory"]]
    for group in groups:
        for run in group.runs:
            first = len(run.steps) - len(group.condition.steps)
            for index, (step, value, episodes) in enumerate(zip(run.steps, run.values, run.episodes, strict=True)):
                row = [group.env_name, group.label, "; ".join(group.apart), run.seed, int(step), run.metric]
                rows.append([*row, float(value), f"{episodes:g}", int(index >= first), run.directory])
    return csv_text(rows)


def write_report(directories: list[Path], output: Path, last: int, step: int | None = None) -> str:
    """Writes a report on all runs in and below `directories`, up to `step`, and returns its Markdown.

    Args:
        output: directory of the report's files.
        last: number of each run's last evaluations that are averaged.

    Raises:
        UserError: a directory does not exist, no run can be read, or `output` cannot be written.
    """
    found, damaged = find_runs(directories, step)
    groups = group_runs(found, last)
    palette = make_palette(groups)
    tasks = {
        name: [group for group in groups if group.env_name == name] for name in sorted({g.env_name for g in groups})
    }
    curves = {name: drawing for name, own in tasks.items() if (drawing := draw_curves(name, own, palette))}
    nfes = {}
    for name, own in tasks.items():
        points, lines = find_points(own)
        damaged += lines
        if drawing := draw_nfe(name, points, palette):
            nfes[name] = drawing
    title = f"Report on {', '.join(map(str, directories[:3]))}"
    title += f" and {len(directories) - 3} more" if len(directories) > 3 else ""
    content = Content(
        title=title,
        lead=describe(groups, last),
        aggregate=aggregate_table(groups),
        success=success_table(groups, last).upright(),
        runs=runs_table(groups, last),
        problems=problems_table(groups, damaged, failed_jobs([*directories, output.parent])),
        overview=draw_aggregate(groups, palette),
        curves=curves,
        nfes=nfes,
        groups=groups,
        last=last,
    )
    files = {"": {"aggregate.png": content.overview} if content.overview else {}}
    for name in curves:
        file = re.sub(r"[^\w.=+-]", "_", name)
        files[name] = {f"curves/{file}.png": curves[name]} | ({f"nfe/{file}.png": nfes[name]} if name in nfes else {})
    for path, drawing in (pair for own in files.values() for pair in own.items()):
        atomic_write_bytes(output / path, drawing.png)
    text = markdown(content, {name: list(own) for name, own in files.items()})
    atomic_write_text(output / "evaluations.csv", evaluations_csv(groups))
    atomic_write_text(output / "report.md", text)
    atomic_write_text(output / "report.html", html_page(content, default_settings))
    for line in damaged:
        print(f"left out: {line}", file=sys.stderr)
    return text


def make_palette(groups: list[Group]) -> Palette:
    """Returns the looks of the groups' methods: the best by rank are coloured."""
    methods = labels_of(groups) | {group.label: group.algorithm for group in groups}
    return Palette(methods, {label: -rank for label, rank in task_ranks(groups).items()})


def main(argv: Sequence[str]) -> None:
    """Writes and prints the report."""
    directories = [Path(argument).expanduser() for argument in parse_arguments(argv, FLAGS)]
    if not directories:
        raise UserError("give one or more directories of runs, such as exp/debug")
    output = Path(FLAGS.output).expanduser() if FLAGS.output else directories[0] / "report"
    print(write_report(directories, output, FLAGS.last, FLAGS.step))
    print(f"report: {output / 'report.html'}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
