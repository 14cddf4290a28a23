"""CONTRIBUTING.md's "Read this first": what it names exists, and is short."""

import ast
import re

import pytest

from utils.system.files import ROOT


def lines_of(file: str, name: str) -> int:
    """Returns the lines of a function, class or method, its decorators included."""
    body = ast.parse((ROOT / file).read_text()).body
    for part in name.split("."):
        (node,) = [one for one in body if getattr(one, "name", None) == part]
        body = node.body
    return node.end_lineno - min([node.lineno, *(one.lineno for one in node.decorator_list)]) + 1


@pytest.mark.check
def test_an_update_is_read_in_600_lines_of_8_files():
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Read this first")[2].partition("\n## ")[0]
    rows = re.findall(r"(?m)^\| `([\w/]+\.py)` \| ((?:`[\w.]+`(?:, )?)+) \|", text)
    counts = {file: sum(lines_of(file, name) for name in re.findall(r"[\w.]+", names)) for file, names in rows}
    assert len(counts) == 8 and sum(counts.values()) <= 600, counts


@pytest.mark.check
def test_equations_name_code_that_exists():
    text = (ROOT / "docs" / "algorithm.md").read_text()
    found = re.findall(r"\[`([\w/]+\.py)`\]\([^)]*\) ((?:`[\w.]+`(?:, )?)+)", text)
    named = [(file, name) for file, names in found for name in re.findall(r"[\w.]+", names)]
    assert len(named) > 20 and all(lines_of(file, name) for file, name in named)
