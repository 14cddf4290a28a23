"""Tables as text: Markdown and CSV."""

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


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Returns rows, the header included, as CSV text with lines that end in a newline."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
