"""Settings of a report's runs: which differ between methods, and which from an agent's defaults."""

import json
from typing import Any

from experiments.report.groups import Group, differences
from experiments.report.runs import show
from experiments.report.tables import NONE, Cell, Table

# Flags of a run that tell what it does, not where.
FLAGS = ("preset", "offline_steps", "online_steps", "utd_ratio", "eval_interval", "eval_episodes", "dataset_episodes")


def differing(groups: list[Group]) -> Table:
    """Returns the settings that several compared groups of a task have and in which they differ."""
    shown = [group for group in groups if not group.apart]
    table = Table("Settings that differ", ["setting", *(group.label for group in shown)])
    settings = [_settings(group) for group in shown]
    for name in sorted(set().union(*settings)) if settings else []:
        values = [own.get(name) for own in settings]
        known = [json.dumps(value, sort_keys=True) for value in values if value is not None]
        if len(set(known)) > 1:
            table.rows.append([Cell(name), *(Cell(NONE if value is None else show(value)) for value in values)])
    if not table.rows:
        table.notes.append("None of the settings that these methods share differs.")
    return table


def _settings(group: Group) -> dict[str, Any]:
    first = group.runs[0].settings
    return {name: first["flags"].get(name) for name in FLAGS} | first["config"]


def of_group(group: Group, defaults: dict[str, Any] | None) -> dict[str, Any]:
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
    return {"summary": f"{group.label}{apart}, {group.seeds}", "changed": changed, "notes": notes, "runs": runs}
