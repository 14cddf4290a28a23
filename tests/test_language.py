"""The project's English: docstrings begin with a verb or a noun, and words are those of the field."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from utils.system.files import ROOT

pytestmark = pytest.mark.check
FOLDERS = ("agents", "envs", "utils", "experiments", "real", "examples")
FILES = [
    path
    for path in [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    if not {"tests", ".venv"} & set(path.relative_to(ROOT).parts)
]
QUESTIONS = ("What", "Which", "How", "Whether", "Where", "Who", "Whose", "When")
# Word or phrase of a private language → what the field says.
PRIVATE = {
    r"lanes?": "run, run axis",
    r"owe[sd]?|owing": "pending",
    r"foreseen": "predicted",
    r"recipes?": "dataset spec",
    r"explorers?": "environment runner",
    r"go(es)? on|going on|went on": "resumes, continues",
    r"take up|takes up|taken up|took up": "resumes, restored",
    r"begun": "existing, started",
    r"under way": "in progress",
    r"side by side": "in parallel",
    r"in turn": "alternately, one after the other",
    r"by itself|by themselves": "standalone",
    r"quiet cores?": "idle cores",
    r"start (it|this program|the same command|again)( again)?": "rerun the same command to resume",
    r"is there already|are there already": "already exists",
    r"refuse[sd]?": "rejects, raises",
    r"(says|said|say) so in a line": "prints a one-line error",
    r"pictures?": "figure, image",
    r"films?|filmed|filming": "records, video",
    r"processors?": "CPU",
    r"made-up": "synthetic",
    r"user's mistakes?|users' mistakes?": "invalid input",
    r"what there is not|that there is not": "unknown",
    r"dealt out": "assigned",
    r"deaf ear": "blocks",
    r"sees? to it": "ensures",
    r"settles?": "write, wait",
    r"tremor": "expert_noise",
}
# Names that old files and commands contain, as they stand in a line.
KEPT = ('"explorer"', '"owed"', '"tremor"', "config.tremor", "tremor: float | None", "tremor: former name", '"lanes"')


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields line and text of every docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_no_question(path: Path):
    found = [(line, text) for line, text in docstrings(ast.parse(path.read_text())) if text.split()[0] in QUESTIONS]
    assert not found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_words_are_those_of_the_field(path: Path):
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for name in KEPT:
            line = line.replace(name, "")
        # Identifiers such as lane_keys count as well.
        text = re.sub(r"_", " ", line)
        found += [
            f"{number}: {match[0]!r}: {better}"
            for word, better in PRIVATE.items()
            if not (better == "CPU" and "real" in path.relative_to(ROOT).parts)  # LeRobot has processors.
            if (match := re.search(rf"\b({word})\b", text, re.IGNORECASE))
        ]
    assert not found, "\n".join(found)
