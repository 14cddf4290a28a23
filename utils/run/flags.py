"""Command lines of training: flags derived from a config, help and advice."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeVar, get_type_hints

from absl import flags

from envs.minari_store import LISTING, listing
from utils.errors import UserError
from utils.run.agent_files import load_agent
from utils.run.agent_help import settings_help
from utils.run.config import KINDS, CommonConfig, plain_type, settings_of
from utils.run.foreign_flags import REPLACED
from utils.system.cli import HELP, define_flag, parse, print_help

Config = TypeVar("Config", bound=CommonConfig)


def define_flags(cls: type[CommonConfig]) -> flags.FlagValues:
    """Returns flags of the names, types, defaults, bounds and help of a config's settings."""
    values, types = flags.FlagValues(), get_type_hints(cls)
    for f in settings_of(cls):
        kind, about = KINDS[plain_type(types[f.name])], f.metadata
        bounds = {"lower_bound": about["min"], "upper_bound": about["max"]}
        bounds = {name: bound for name, bound in bounds.items() if bound is not None}
        define_flag(values, kind, f.name, f.default, about["help"], choices=about["choices"], **bounds)
        if about["alias"]:
            flags.DEFINE_alias(about["alias"], f.name, flag_values=values)
    return values


def parse_flags(argv: Sequence[str], cls: type[Config]) -> Config:
    """Returns the config that a command line asks for.

    Raises:
        UserError: an unknown flag, a value that does not fit, or a stray argument.
        SystemExit: with code 0, after --help, --agent.help or --env_name=minari:list was answered.
    """
    values = define_flags(cls)
    arguments = [argument for argument in argv if argument not in {*HELP, "--agent.help"}]
    if HELP.intersection(argv):
        print_help(values)
    overrides = parse(arguments, values, lambda: _advice(str(values["agent"].value)))
    given: dict[str, Any] = {f.name: values[f.name].value for f in settings_of(cls)}
    config = cls(**given, overrides=overrides, command=shlex.join(argv))
    if len(arguments) < len(argv):
        print(settings_help(config.agent, config.env_name, config.preset))
        sys.exit(0)
    if config.env_name == LISTING:
        print(listing())
        sys.exit(0)
    config.validate()
    return config


def _advice(agent: str) -> dict[str, str]:
    """Returns unknown flag → what to give in its place: flags of other code bases, and settings of the agent."""
    with suppress(UserError):
        return REPLACED | {name: f"did you mean --agent.{name}?" for name in load_agent(agent).get_config()}
    return REPLACED
