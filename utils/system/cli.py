"""The command line: flags with one-line errors."""

import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from utils.errors import UserError


def parse(argv: Sequence[str], values: flags.FlagValues) -> dict[str, str]:
    """Parses a command line into `values`, and returns what `--agent.<field>=<value>` set as field → text.

    Raises:
        UserError: an unknown flag, a value that does not fit, or a stray argument.
        SystemExit: with code 0, after --help was answered.
    """
    overrides, rest, arguments = {}, [argv[0]], list(argv[1:])
    if {"--help", "-h"}.intersection(arguments):
        print(sys.modules["__main__"].__doc__ or "", values.get_help(), sep="\n")
        sys.exit(0)
    while arguments:
        argument = arguments.pop(0)
        if argument.startswith("--agent."):
            field, equals, value = argument.removeprefix("--agent.").partition("=")
            if not equals and arguments and not arguments[0].startswith("--"):
                value = arguments.pop(0)
            overrides[field] = value
        else:
            rest.append(argument)
    try:
        stray = values(rest)[1:]
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error
    if stray:
        raise UserError(f"stray argument '{stray[0]}'; flags are written --name=value")
    return overrides


def parse_arguments(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Parses a command line of flags and arguments, in any order, into `values`; returns the arguments.

    Raises:
        UserError: an unknown flag, or a value that does not fit.
        SystemExit: with code 0, after --help was answered.
    """
    if {"--help", "-h"}.intersection(argv):
        parse(argv, values)
    values.set_gnu_getopt()
    try:
        return values(list(argv))[1:]
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error


def define_flag(
    values: flags.FlagValues,
    kind: str,
    name: str,
    default: Any,
    help: str,
    choices: Sequence[str] = (),
    **bounds: Any,
) -> None:
    """Defines a flag of absl's kind `kind` ('string', 'integer', …) in `values`."""
    kind, more = ("enum", {"enum_values": list(choices)}) if choices else (kind, bounds)
    getattr(flags, f"DEFINE_{kind}")(name=name, default=default, help=help, flag_values=values, **more)
