"""Help on an agent's settings: name, default, the preset's value and meaning of each."""

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from envs.tasks import parse_task
from utils.run.agent_config import idle_settings, resolve_config
from utils.run.agent_files import load_agent


def settings_help(agent: str, env_name: str, preset: str) -> str:
    """Returns a table of an agent's settings.

    Args:
        agent: agent file. env_name: task. preset: one of PRESETS.

    Raises:
        UserError: an unknown agent, task or preset.
    """
    module = load_agent(agent)
    resolved, _, note = resolve_config(module, parse_task(env_name).domain, preset, {})
    about, defaults = meanings(module), module.get_config()
    idle = {name: f"no effect: {reason}" for name, reason in idle_settings(module, resolved).items()}
    rows = [("setting", "default", "preset", "meaning")]
    for name in sorted(defaults):
        default, value = _shown(defaults[name]), _shown(resolved[name])
        rows.append(
            (f"--agent.{name}", default, value if value != default else "", idle.get(name, about.get(name, "")))
        )
    *widths, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]
    return "\n".join([f"Settings of {agent} ({note}):", "", *lines])


def meanings(module: ModuleType) -> dict[str, str]:
    """Returns setting → meaning, by SETTINGS of an agent's file and of the files whose classes its Agent extends."""
    files = [module, *(sys.modules.get(kind.__module__) for kind in module.Agent.__mro__)]
    found: dict[str, str] = {}
    for file in reversed(files):
        settings = getattr(file, "SETTINGS", {})
        for name, entry in settings.items() if isinstance(settings, Mapping) else ():
            match entry:  # A user's file may have another use for this name.
                case (_, str(meaning)):
                    found[name] = meaning
    return found


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
