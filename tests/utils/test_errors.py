"""Reports of exceptions that a user's own code raises."""

import importlib.util
import json
from pathlib import Path

import pytest

from utils.errors import UserError, failure, failure_line

CODE = """
def fails(value):
    import json
    return json.loads(value)


def needs(one, two):
    pass
"""


@pytest.fixture
def module(tmp_path):
    """A user's module, its file, and its functions."""
    path = tmp_path / "own.py"
    path.write_text(CODE)
    spec = importlib.util.spec_from_file_location("own", path)
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    return own


def caught(function, *args) -> Exception:
    """The exception that a call raises."""
    with pytest.raises(Exception) as info:
        function(*args)
    return info.value


@pytest.mark.check
def test_names_the_users_line_not_the_librarys_or_ours(module):
    """The innermost frame is json's; the one to look at is the user's."""
    line = failure_line(caught(module.fails, "{"), "the reward function", "return a number")
    assert line.startswith(f"the reward function failed at {module.__file__}, line 4: JSONDecodeError: ")
    assert line.endswith("; return a number") and "\n" not in line


@pytest.mark.check
def test_a_call_that_does_not_fit_is_placed_at_the_definition(module):
    error = caught(lambda: module.needs(1))
    error.__traceback__ = None  # As where the call stands in the project's own code.
    assert f"at {module.__file__}, line 7: TypeError" in failure_line(error, "step", source=module.needs)
    assert "step failed: TypeError" in failure_line(error, "step", source=json.loads.__class__)


@pytest.mark.check
def test_the_whole_traceback_is_in_the_file_that_the_line_names(module):
    error = failure(caught(module.fails, "{"), "the reward function")
    assert isinstance(error, UserError)
    path = Path(str(error).rpartition("(traceback: ")[2].removesuffix(")"))
    assert "Traceback (most recent call last)" in path.read_text() and "JSONDecodeError" in path.read_text()
    path.unlink()


@pytest.mark.check
def test_long_and_many_lined_reasons_stay_one_short_line():
    line = failure_line(ValueError("a\nb " * 1000), "reset")
    assert "\n" not in line and len(line) < 350
