"""The runner of planted faults, on a project of one number."""

import subprocess

import mutants
import pytest

TESTS = """
from number import NUMBER

def test_value():
    assert NUMBER == 11

def test_sign():
    assert NUMBER > 0

def test_end():
    while NUMBER > 20:
        pass

def test_never():
    assert False
"""


@pytest.fixture
def run(tmp_path, capsys):
    """Returns a function that plants a fault, the entries of which are given, and returns exit code and output."""
    (tmp_path / "number.py").write_text("NUMBER = 11\n")
    (tmp_path / "test_number.py").write_text(TESTS)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "-C", tmp_path, "add", "."], check=True)

    def plant(*arguments, test="test_value", **entries):
        file = tmp_path / "mutants.toml"
        known = {"name": "n", "path": "number.py", "text": "11", "replacement": "13"} | entries
        lines = [f"{key} = {value!r}" for key, value in known.items()]
        file.write_text("\n".join(["[[mutant]]", *lines, f"tests = ['test_number.py::{test}']"]))
        code = mutants.main(arguments, tmp_path, file)
        assert (tmp_path / "number.py").read_text() == "NUMBER = 11\n"
        return code, capsys.readouterr().out

    return plant


def test_a_fault_is_caught_or_survives(run):
    code, said = run("--baseline")
    assert (
        code == 0 and "caught" in said and "test_value - assert 13 == 11" in said and "1 faults, 0 not caught" in said
    )
    code, said = run(test="test_sign")
    assert code == 1 and "SURVIVED: n" in said and "'11' → '13' is not seen" in said


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"text": "12"}, "stands in 0 places of number.py"),
        ({"text": "1"}, "stands in 2 places"),
        ({"text": "1", "occurrence": 3}, "stands in 2 places"),
        ({"path": "other.py"}, "other.py"),
        ({"test": "test_other"}, "exit code 4"),
        ({"replacement": "11 +"}, "exit code "),
    ],
)
def test_what_shows_nothing_is_an_error(run, entries, reason):
    """A text that no longer applies, a test that is gone, a fault that keeps tests from being collected."""
    code, said = run(**entries)
    assert code == 1 and "ERROR: n" in said and reason in said


def test_one_of_several_places_may_be_chosen(run):
    assert run(text="1", replacement="2", occurrence=1)[0] == 0


def test_tests_that_hang_are_caught(run, monkeypatch):
    monkeypatch.setattr(mutants, "LIMIT", 5.0)
    code, said = run(replacement="21", test="test_end")
    assert code == 0 and "more than 5 s" in said


def test_tests_that_fail_without_a_fault_show_nothing(run):
    code, said = run("--baseline", test="test_never")
    assert code == 1 and "caught" not in said


def test_names_choose(run):
    assert run("--list") == (0, "n\n")
    code, said = run("m")
    assert code == 1 and "no fault" in said
