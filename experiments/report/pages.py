"""A report as text: Markdown, and an HTML page that needs no other file."""

import base64
import html
import json
import re
from string import Template
from typing import Any

from experiments.report.groups import Group, differences
from experiments.report.runs import show
from experiments.report.tables import NONE, Cell, Table

MARKDOWN_MARKS = {"best": "**{}**", "close": "<ins>{}</ins>", "published": "*{}*"}
HTML_MARKS = {"best": "<strong>{}</strong>", "close": "<u>{}</u>", "published": "<em>{}</em>"}
CURVES_NOTE = (
    "Mean over seeds with the 95 % bootstrap interval over seeds as a band (none for one seed). Dotted: runs that are "
    "unfinished or of another length; runs of other data or settings are not drawn. Dashed: QAM's released curves of "
    "the same task (4×512 networks, 12 seeds), beside the runs on a scale of their own where the runs are much shorter."
)
PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --text: #1c1c1c; --back: #fff; --soft: #6a6a6a; --line: #d8d8d8; --band: #f5f5f5; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e4; --back: #17181a; --soft: #a2a2a2; --line: #3b3d40; --band: #202225; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note { color: var(--soft); font-size: .85rem; max-width: 60rem; margin: .4rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td { white-space: nowrap; } td.long { white-space: normal; min-width: 18rem; }
thead th { border-bottom: 2px solid var(--soft); } tbody th { font-weight: 500; white-space: nowrap; }
th:first-child { position: sticky; left: 0; background: var(--back); }
em, .rest { color: var(--soft); }
figure { margin: 1rem 0; } figure img { max-width: 100%; max-height: 20rem; background: #fff; border-radius: 6px; }
details { margin: .4rem 0; } details details { margin-left: 1.2rem; } summary { cursor: pointer; }
pre { background: var(--band); padding: .7rem; overflow-x: auto; font-size: .8rem; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def markdown(title: str, tables: list[Table], curves: dict[str, str], left_out: list[str]) -> str:
    """The report as Markdown.

    Args:
        curves: environment → path of its picture, relative to the file. left_out: a line for each damaged run.
    """
    success, *others = tables
    pictures = "\n\n".join(f"![{_plain(name)}]({path})" for name, path in curves.items())
    parts = [f"# {_plain(title)}", *_markdown_left_out(left_out), _markdown_table(success)]
    if curves:
        parts.append(f"## Learning curves\n\n{pictures}\n\n{_plain(CURVES_NOTE)}")
    parts += map(_markdown_table, others)
    return "\n\n".join(parts) + "\n"


def _markdown_left_out(left_out: list[str]) -> list[str]:
    return ["**Left out, damaged:**\n\n" + "\n".join(f"- {_plain(line)}" for line in left_out)] if left_out else []


def _markdown_table(table: Table) -> str:
    rows = ["| " + " | ".join(map(_plain, table.header)) + " |", "|" + "---|" * len(table.header)]
    rows += ["| " + " | ".join(map(_markdown_cell, row)) + " |" for row in table.rows]
    body = ["\n".join(rows)] if table.rows else []
    return "\n\n".join([f"## {_plain(table.title)}", *body, *map(_plain, table.notes)])


def _markdown_cell(cell: Cell) -> str:
    text = MARKDOWN_MARKS.get(cell.mark, "{}").format(_plain(cell.text)) if cell.text else ""
    return text + _plain(cell.rest)


def _plain(text: str) -> str:
    """`text` on one line, with everything escaped that Markdown or a table would read as markup."""
    return re.sub(r"[\\`*<|&~]|(?<!\w)_|_(?!\w)|\](?=[(\[:])", r"\\\g<0>", re.sub(r"\s", " ", text))


def html_page(
    title: str, tables: list[Table], curves: dict[str, bytes], groups: list[Group], defaults: Any, left_out: list[str]
) -> str:
    """The report as one HTML file, pictures within.

    Args:
        curves: environment → PNG. defaults: function of a run's settings → defaults of its agent, None if unknown.
    """
    success, *others = tables
    parts = [f"<p><strong>Left out, damaged:</strong> {html.escape(line)}</p>" for line in left_out]
    parts.append(_html_table(success))
    if curves:
        parts += ["<h2>Learning curves</h2>", *(_html_picture(*item) for item in curves.items()), _note(CURVES_NOTE)]
    parts += map(_html_table, others)
    parts += ["<h2>Settings</h2>", *(_html_settings(group, defaults(group.runs[0].settings)) for group in groups)]
    return PAGE.substitute(title=html.escape(title), body="\n".join(parts))


def _html_table(table: Table) -> str:
    return "\n".join([f"<h2>{html.escape(table.title)}</h2>", _html_grid(table), *map(_note, table.notes)])


def _html_grid(table: Table) -> str:
    if not table.rows:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
    rows = ["<tr>" + "".join(_html_cell(cell, index) for index, cell in enumerate(row)) + "</tr>" for row in table.rows]
    body = "\n".join(rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _html_cell(cell: Cell, index: int) -> str:
    text = HTML_MARKS.get(cell.mark, "{}").format(html.escape(cell.text)) if cell.text else ""
    text += f'<span class="rest">{html.escape(cell.rest)}</span>' if cell.rest else ""
    long = ' class="long"' if len(cell.text) > 40 and index else ""
    return f"<td{long}>{text}</td>" if index else f"<th>{text}</th>"


def _html_picture(env_name: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    name = html.escape(env_name, quote=True)
    return f'<figure><img alt="Learning curves on {name}" src="data:image/png;base64,{data}"></figure>'


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _html_settings(group: Group, defaults: dict[str, Any] | None) -> str:
    """A group's settings: what differs from the agent's defaults first, then all files of its runs."""
    first = group.runs[0].settings
    if defaults is None:
        changed = _note("The agent's defaults are not known here; all settings are below.")
    else:
        rows = [
            [Cell(n), Cell(show(own)), Cell(show(other))] for n, own, other in differences(first["config"], defaults)
        ]
        grid = _html_grid(Table("", ["setting", "here", "default"], rows))
        changed = grid or _note("All settings are the agent's defaults.")
    flags, data = first["flags"], first.get("dataset")
    lines = [
        f"{first.get('preset') or 'preset not recorded'}; sparse={first.get('sparse')}",
        f"data: {json.dumps(data, sort_keys=True) if data else NONE}",
        f"{flags.get('offline_steps')} updates, evaluated every {flags.get('eval_interval')}",
    ]
    count = f"{len(group.runs)} seed{'s' if len(group.runs) > 1 else ''}"
    apart = f" ({group.apart[0].split(':')[0]})" if group.apart else ""
    summary = html.escape(f"{group.env_name}: {group.label}{apart}, {count}")
    runs = "\n".join(
        f"<details><summary>{html.escape(f'seed {run.seed}, all settings: {run.directory}')}</summary>"
        f"<pre>{html.escape(json.dumps(run.settings, indent=2, sort_keys=True))}</pre></details>"
        for run in group.runs
    )
    facts = "".join(map(_note, lines))
    return f"<details><summary>{summary}</summary>\n{changed}\n{facts}\n{runs}\n</details>"
