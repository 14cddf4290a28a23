"""Advice in messages: nobody is told to delete a file or folder."""

import ast
import re

import pytest

from utils.system.files import ROOT

SOURCES = sorted(
    path
    for folder in ("agents", "envs", "utils", "experiments", "real", ".")
    for path in (ROOT.glob("*.py") if folder == "." else (ROOT / folder).rglob("*.py"))
    if not {"tests", ".venv"} & set(path.relative_to(ROOT).parts)
)
DELETING = re.compile(r"\b(delete|remove|erase|rm|overwrite)\s+(-\w+|it|them|one|its|that|this|such|the|your)\b", re.I)


def messages(source: str) -> list[tuple[int, str]]:
    """Lines and texts of a file's strings, without docstrings; parts of one message are joined."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    skipped = {id(node.body[0].value) for node in nodes if node.body and isinstance(node.body[0], ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            found.append((node.lineno, "".join(parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            found.append((node.lineno, node.value))
    return found


def test_what_is_searched():
    """The search sees strings, joined ones too, and no docstrings."""
    source = 'def f(x):\n    """Deletes it: delete it."""\n    raise ValueError(f"{x} is bad; " "remove its folder")\n'
    found = [text for _, text in messages(source) if DELETING.search(text)]
    assert found == ["… is bad; remove its folder"]
    assert len(SOURCES) > 80


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_is_told_to_delete_anything(path):
    """Data and runs are the user's: to be moved, mended, or left where they are while another name is taken."""
    wrong = [f"line {line}: {text}" for line, text in messages(path.read_text()) if DELETING.search(text)]
    assert not wrong, wrong
