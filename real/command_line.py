"""The command line of programs that also run in LeRobot's environment, hence argparse: there is no absl."""

import argparse
from typing import NoReturn

from utils.errors import UserError


class Parser(argparse.ArgumentParser):
    """Shows a program's docstring as it stands, and takes flags in full only; what is wrong is a UserError."""

    def __init__(self, prog: str, description: str | None):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises a UserError."""
        raise UserError(message)
