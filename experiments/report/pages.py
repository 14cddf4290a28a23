"""A report as Markdown, as LaTeX, and as an HTML page (page.html.j2) that needs no other file."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from experiments.report import settings
from experiments.report.groups import Group, show_data, show_steps, span
from experiments.report.tables import Cell, Table, runs_table
from utils.output.plotting import Drawing
from utils.output.tables import latex_escape, latex_table, markdown_table

MARKS = {"best": "**{}**", "close": "<ins>{}</ins>", "published": "*{}*"}
LATEX_MARKS = {"best": r"\textbf{{{}}}", "close": r"\underline{{{}}}", "published": r"\emph{{{}}}"}
OPEN = 6  # With more tasks, their sections are closed at first.
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Content:
    """Content of a report.

    Attributes:
        title: heading.
        lead: what was compared, in a sentence or two.
        aggregate, success, runs, problems: tables.
        overview: figure of the aggregate, None without one.
        curves, nfes: environment → figure.
        groups: all groups of runs.
        last: number of each run's last evaluations that are averaged.
    """

    title: str
    lead: str
    aggregate: Table
    success: Table
    runs: Table
    problems: Table
    overview: Drawing | None
    curves: dict[str, Drawing]
    nfes: dict[str, Drawing]
    groups: list[Group]
    last: int


def describe(groups: list[Group], last: int) -> str:
    """Returns what was compared, in a sentence or two."""
    shown = [group for group in groups if not group.apart]
    if not shown:
        return "No runs can be compared yet; the reasons are below."
    methods, tasks = {group.label for group in shown}, {group.env_name for group in shown}
    seeds = span((len(group.runs) for group in shown), "seed")
    length = span((group.condition.steps[-1] for group in shown), show=show_steps)
    data = sorted({show_data(group.condition.data) for group in shown})
    more = f" and {len(data) - 3} more" if len(data) > 3 else ""
    online = any(group.runs[0].rollout_steps is not None for group in shown)
    return (
        f"{span([len(methods)], 'method')} on {span([len(tasks)], 'task')}, {seeds} each, "
        f"{length} {'environment steps' if online else 'updates'}. A run's score is its mean over the last {last} "
        f"evaluation{'s' * (last > 1)}. Data: {'; '.join(data[:3])}{more}."
    )


def markdown(content: Content, paths: dict[str, list[str]]) -> str:
    """Returns the report as Markdown.

    Args:
        paths: environment → paths of its figures, relative to the report; those of the aggregate under ''.
    """
    parts = [f"# {_plain(content.title)}", _plain(content.lead)]
    parts += [_section(content.success), _section(content.aggregate)]
    if content.overview:
        parts += [f"![Aggregate and performance profile]({path})" for path in paths[""]]
    parts += ["## Learning curves"] if content.curves else []
    for name in content.curves:
        parts += [f"![{_plain(name)}]({path})" for path in paths[name]]
    parts += [_section(content.runs), _section(content.problems)]
    return "\n\n".join(parts) + "\n"


def _section(table: Table) -> str:
    body = [markdown_source(table)] if table.rows else []
    return "\n\n".join([f"## {_plain(table.title)}", *body, *map(_plain, table.notes)])


def markdown_source(table: Table) -> str:
    """Returns a table in Markdown."""
    return markdown_table(
        [_plain(name) for name in table.header], [[_cell(cell) for cell in row] for row in table.rows]
    )


def latex_source(table: Table) -> str:
    """Returns a table in LaTeX, for the package booktabs."""
    rows = [
        [
            (LATEX_MARKS.get(cell.mark, "{}").format(latex_escape(cell.text)) if cell.text else "")
            + latex_escape(cell.rest)
            for cell in row
        ]
        for row in table.rows
    ]
    return latex_table([latex_escape(name) for name in table.header], rows)


def _cell(cell: Cell) -> str:
    text = MARKS.get(cell.mark, "{}").format(_plain(cell.text)) if cell.text else ""
    return text + _plain(cell.rest)


def _plain(text: str) -> str:
    """Returns `text` on one line, with everything escaped that Markdown or a table would read as markup."""
    return re.sub(r"[\\`*<|&~]|(?<!\w)_|_(?!\w)|\](?=[(\[:])", r"\\\g<0>", re.sub(r"\s", " ", text))


def html_page(content: Content, defaults: Callable[[dict[str, Any]], dict[str, Any] | None]) -> str:
    """Returns the report as one HTML file that contains its figures.

    Args:
        defaults: maps a run's settings to the defaults of its agent, or to None if they are unknown.
    """
    tasks = []
    for env_name in sorted({group.env_name for group in content.groups}):
        groups = [group for group in content.groups if group.env_name == env_name]
        figures = [figures[env_name] for figures in (content.curves, content.nfes) if env_name in figures]
        tasks.append(
            {
                "name": env_name,
                "figures": figures,
                "runs": runs_table(groups, content.last).without("environment"),
                "differing": settings.differing(groups).upright(),
                "groups": [settings.of_group(group, defaults(group.runs[0].settings)) for group in groups],
            }
        )
    return TEMPLATES.get_template("page.html.j2").render(
        content=content, tasks=tasks, open=len(tasks) <= OPEN, latex=latex_source, markdown=markdown_source
    )
