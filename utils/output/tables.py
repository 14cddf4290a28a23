"""Tables as text: Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], rule: str = "|---") -> str:
    """Returns a Markdown table without a final newline.

    Args:
        rows: cells, escaped where needed.
        rule: separator of a column, between header and rows.
    """
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], rule * len(header) + "|", *lines[1:]])


LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "—": "---"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "×": r"$\times$", "−": "$-$"},
    **{"α": r"$\alpha$", "ε": r"$\varepsilon$", "λ": r"$\lambda$", "τ": r"$\tau$", "·": r"$\cdot$", "≥": r"$\geq$"},
}


def latex_escape(text: str) -> str:
    """Returns `text` as LaTeX that prints it."""
    return "".join(LATEX.get(character, character) for character in text)


def latex_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a LaTeX tabular with the rules of the package booktabs, without a final newline.

    Args:
        header, rows: cells, escaped where needed.
    """
    top, *body = [" & ".join(row) + r" \\" for row in (header, *rows)]
    columns = "l" + "c" * (len(header) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", top, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines)


def cell(value: object) -> str:
    """Returns a value as the text of a cell, floats with four decimals."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Returns rows, the header included, as CSV text with lines that end in a newline."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
