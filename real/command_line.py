"""The command line of programs that also run in LeRobot's environment, which has no absl: argparse."""

import argparse
from typing import NoReturn

from utils.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser that shows a program's docstring unchanged, accepts no abbreviated flags, and raises UserErrors."""

    def __init__(self, prog: str, description: str | None):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises a UserError."""
        raise UserError(message)
