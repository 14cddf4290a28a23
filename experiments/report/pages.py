"""A report as Markdown, and as an HTML page (page.html.j2) that needs no other file."""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from experiments.report.groups import Group, differences
from experiments.report.runs import show
from experiments.report.tables import NONE, Cell, Table
from utils.output.tables import markdown_table

MARKS = {"best": "**{}**", "close": "<ins>{}</ins>", "published": "*{}*"}
CURVES_NOTE = (
    "Mean over seeds with the 95 % bootstrap interval over seeds as a band (none for one seed). Dotted: runs that are "
    "unfinished or of another length; runs of other data or settings are not drawn. Dashed: QAM's released curves of "
    "the same task (4×512 networks, 12 seeds), beside the runs on a scale of their own where the runs are much shorter."
)
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def markdown(title: str, tables: list[Table], curves: dict[str, str], left_out: list[str]) -> str:
    """Returns the report as Markdown.

    Args:
        tables: the success table comes before the curves, all others after them.
        curves: environment → path of its figure, relative to the report.
        left_out: one line per damaged run.
    """
    parts = [f"# {_plain(title)}"]
    if left_out:
        parts.append("**Left out, damaged:**\n\n" + "\n".join(f"- {_plain(line)}" for line in left_out))
    success, *others = map(_section, tables)
    parts.append(success)
    if curves:
        figures = (f"![{_plain(name)}]({path})" for name, path in curves.items())
        parts += ["## Learning curves", *figures, _plain(CURVES_NOTE)]
    return "\n\n".join([*parts, *others]) + "\n"


def _section(table: Table) -> str:
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    body = [markdown_table([_plain(name) for name in table.header], rows)] if rows else []
    return "\n\n".join([f"## {_plain(table.title)}", *body, *map(_plain, table.notes)])


def _cell(cell: Cell) -> str:
    text = MARKS.get(cell.mark, "{}").format(_plain(cell.text)) if cell.text else ""
    return text + _plain(cell.rest)


def _plain(text: str) -> str:
    """Returns `text` on one line, with everything escaped that Markdown or a table would read as markup."""
    return re.sub(r"[\\`*<|&~]|(?<!\w)_|_(?!\w)|\](?=[(\[:])", r"\\\g<0>", re.sub(r"\s", " ", text))


def html_page(
    title: str,
    tables: list[Table],
    curves: dict[str, bytes],
    groups: list[Group],
    defaults: Callable[[dict[str, Any]], dict[str, Any] | None],
    left_out: list[str],
) -> str:
    """Returns the report as one HTML file that contains its figures.

    Args:
        tables, left_out: see `markdown`.
        curves: environment → PNG.
        defaults: maps a run's settings to the defaults of its agent, or to None if they are unknown.
    """
    return TEMPLATES.get_template("page.html.j2").render(
        title=title,
        tables=tables,
        figures={name: base64.b64encode(png).decode() for name, png in curves.items()},
        curves_note=CURVES_NOTE,
        settings=[_settings(group, defaults(group.runs[0].settings)) for group in groups],
        left_out=left_out,
    )


def _settings(group: Group, defaults: dict[str, Any] | None) -> dict[str, Any]:
    """Returns a group's settings for the page: those that differ from the defaults, and its runs' flags.json."""
    first = group.runs[0].settings
    changed, notes = Table("", ["setting", "here", "default"]), []
    if defaults is None:
        notes.append("The agent's defaults are not known here; all settings are below.")
    else:
        found = differences(first["config"], defaults)
        changed.rows = [[Cell(name), Cell(show(own)), Cell(show(other))] for name, own, other in found]
        notes += [] if found else ["All settings are the agent's defaults."]
    flags, data = first["flags"], first.get("dataset")
    notes += [
        f"{first.get('preset') or 'preset not recorded'}; sparse={first.get('sparse')}",
        f"data: {json.dumps(data, sort_keys=True) if data else NONE}",
        f"{flags.get('offline_steps')} updates, evaluated every {flags.get('eval_interval')}",
    ]
    apart = f" ({group.apart[0].split(':')[0]})" if group.apart else ""
    runs = [
        (f"seed {run.seed}, all settings: {run.directory}", json.dumps(run.settings, indent=2, sort_keys=True))
        for run in group.runs
    ]
    summary = f"{group.env_name}: {group.label}{apart}, {group.seeds}"
    return {"summary": summary, "changed": changed, "notes": notes, "runs": runs}
