"""Errors that users can cause, and one-line reports of exceptions in their code."""

import difflib
import inspect
import os
import sysconfig
import tempfile
import traceback
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

_PROJECT = Path(__file__).resolve().parent.parent
_LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})


class UserError(Exception):
    """An error that the user can fix.

    The message is one line that says what is wrong and what to do. Entry points print it to stderr and exit
    with code 2 and no traceback.

    Attributes:
        line: the message without the traceback's file; set by `failure` only.
    """

    line: str


class Diverged(Exception):
    """Raised when training gives values that are not finite. The message has a line per run; the exit code is 1."""


def did_you_mean(word: str, known: Iterable[str], form: str = "{}") -> str:
    """Returns '; did you mean <form of the most similar known word>?', or '' if none is similar."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {form.format(near[0])}?" if near else ""


def failure(error: BaseException, what: str, expected: str = "", source: Any = None) -> UserError:
    """Returns the error to raise when a user's code fails; its line names a file with the whole traceback.

    Args:
        error: the exception that the code raised.
        what: the part that failed, such as "the environment's reset" or "agent file my_agent.py".
        expected: requirement on the code, or advice.
        source: the user's function or class, for errors raised at its call, before any line of it runs.
    """
    line, note = failure_line(error, what, expected, source), traceback_note(error)
    result = UserError(line + note)
    result.line = line
    return result


def traceback_note(error: BaseException) -> str:
    """Writes the whole traceback to a file; returns ' (traceback: <file>)', or '' if it cannot be written."""
    with suppress(OSError):
        path = Path(tempfile.gettempdir()) / f"otql_traceback_{os.getpid()}.txt"
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="replace")
        return f" (traceback: {path})"
    return ""


def is_users(error: BaseException) -> bool:
    """True if the traceback of the error contains the user's code."""
    return any(map(_is_users, traceback.extract_tb(error.__traceback__)))


def failure_line(error: BaseException, what: str, expected: str = "", source: Any = None) -> str:
    """Returns one line with the failed part, file and line of the user's code, the error, and what is expected."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    reason = reason if len(reason) <= 300 else reason[:300] + " …"
    # Without a line of the user's code, the call itself failed: its definition is more useful than a library's line.
    where = place(error, libraries=False) or _definition(source) or place(error)
    return f"{what} failed{f' at {where}' if where else ''}: {reason}{f'; {expected}' if expected else ''}"


def place(error: BaseException, libraries: bool = True) -> str:
    """Returns 'file, line n' of the innermost frame of the user's code, else of a library; '' if there is none.

    Includes the frames of the exceptions that caused `error`.

    Args:
        error: the exception.
        libraries: whether to return frames of libraries.
    """
    chain: BaseException | None = error
    frames: list[traceback.FrameSummary] = []
    while chain is not None:
        if isinstance(chain, SyntaxError) and chain.filename:
            return f"{chain.filename}, line {chain.lineno}"
        frames += reversed([f for f in traceback.extract_tb(chain.__traceback__) if not _is_ours(f.filename)])
        chain = chain.__cause__ or chain.__context__
    for frame in [*filter(_is_users, frames), *(frames if libraries else [])]:
        return f"{frame.filename}, line {frame.lineno}"
    return ""


def _is_users(frame: traceback.FrameSummary) -> bool:
    return not (_is_ours(frame.filename) or frame.filename.startswith(_LIBRARIES))


def _is_ours(filename: str) -> bool:
    """True if a file belongs to this project or has no source."""
    if filename.startswith("<"):
        return True
    with suppress(ValueError):
        parts = Path(filename).resolve().relative_to(_PROJECT).parts
        return parts[0] in ("agents", "envs", "utils", "experiments", "real", "main.py", "online_main.py")
    return False


def _definition(source: Any) -> str:
    """Returns 'file, line n' of the definition of a function or class, or ''."""
    if source is None:
        return ""
    with suppress(OSError, TypeError):
        return f"{inspect.getsourcefile(source)}, line {inspect.getsourcelines(source)[1]}"
    return ""
