"""The command line: flags with one-line errors."""

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from utils.errors import UserError, did_you_mean

HELP = {"--help", "-h"}


def parse(
    argv: Sequence[str], values: flags.FlagValues, advice: Callable[[], Mapping[str, str]] = dict
) -> dict[str, str]:
    """Parses a command line into `values`, and returns what `--agent.<field>=<value>` set as field → text.

    Args:
        argv: command line. values: flags of the program.
        advice: called if a flag is unknown; returns advice on flags that the program does not have.

    Raises:
        UserError: an unknown flag, a value that does not fit, or a stray argument.
        SystemExit: with code 0, after --help was answered.
    """
    overrides: dict[str, str] = {}
    rest, arguments = [argv[0]], list(argv[1:])
    if HELP.intersection(arguments):
        print_help(values)
        sys.exit(0)
    while arguments:
        argument = arguments.pop(0)
        if argument.startswith("--agent."):
            field, equals, value = argument.removeprefix("--agent.").partition("=")
            if not equals and arguments and not arguments[0].startswith("--"):
                value = arguments.pop(0)
            if field in overrides:
                _report_repeated(f"agent.{field}", value)
            overrides[field] = value
        else:
            rest.append(argument)
    if stray := _parse(rest, values, advice):
        raise UserError(f"stray argument '{stray[0]}'; flags are written --name=value")
    return overrides


def parse_arguments(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Parses a command line of flags and arguments, in any order, into `values`; returns the arguments.

    Raises:
        UserError: an unknown flag, or a value that does not fit.
        SystemExit: with code 0, after --help was answered.
    """
    if HELP.intersection(argv):
        parse(argv, values)
    values.set_gnu_getopt()
    return _parse(argv, values)


def print_help(values: flags.FlagValues) -> None:
    """Prints the docstring of the program and its flags."""
    print(sys.modules["__main__"].__doc__ or "", values.get_help(), sep="\n")


def last_of_each(arguments: Sequence[str]) -> list[str]:
    """Returns a command line without the flags that a later one of the same name replaces."""
    last = {_name(argument): index for index, argument in enumerate(arguments)}
    return [a for index, a in enumerate(arguments) if not a.startswith("-") or last[_name(a)] == index]


def _name(argument: str) -> str:
    return argument.lstrip("-").partition("=")[0].removeprefix("no")


def _parse(argv: Sequence[str], values: flags.FlagValues, advice: Callable[[], Mapping[str, str]] = dict) -> list[str]:
    """Parses flags into `values`; returns the arguments that are none."""
    before = {name: values[name].present for name in values}
    try:
        stray = values(list(argv))[1:]
    except flags.UnrecognizedFlagError as error:
        names = [*values, *(f"no{name}" for name in values if values[name].boolean)]
        known = {**advice(), **{name: f"did you mean --{name}?" for name in names}}
        near = difflib.get_close_matches(error.flagname, known, n=1)
        hint = f"; {known[near[0]]}" if near else ""
        raise UserError(f"Unknown command line flag '{error.flagname}'{hint}") from error
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error
    for name, count in before.items():
        if values[name].present > count + 1:
            _report_repeated(name, values[name].value)
    return stray


def _report_repeated(name: str, value: Any) -> None:
    print(f"--{name} is given more than once; the last value counts: {value}")


class _EnumFlag(flags.EnumFlag):
    """A flag with choices; its error suggests one of them."""

    def _parse(self, arg: Any) -> Any:
        try:
            return super()._parse(arg)
        except flags.IllegalFlagValueError as error:
            hint = did_you_mean(arg, self.parser.enum_values, f"--{self.name}={{}}")
            raise flags.IllegalFlagValueError(f"{error}{hint}") from error


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
    if choices:
        flags.DEFINE_flag(_EnumFlag(name, default, help, list(choices)), values)
    else:
        getattr(flags, f"DEFINE_{kind}")(name=name, default=default, help=help, flag_values=values, **bounds)
