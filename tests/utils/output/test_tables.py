import csv

import pytest

from utils.output.tables import csv_text, latex_escape, latex_table, markdown_table

pytestmark = pytest.mark.check


def test_markdown_table():
    assert markdown_table(["a", ""], [["1", "x"]]) == "| a |  |\n|---|---|\n| 1 | x |"
    assert markdown_table(["a"], [], rule="| --- ") == "| a |\n| --- |"


def test_latex_table_is_a_tabular_with_every_special_character_escaped():
    assert latex_table(["a", "b"], [["1", r"\textbf{2}"]]).split("\n") == [
        r"\begin{tabular}{lc}",
        r"\toprule",
        r"a & b \\",
        r"\midrule",
        r"1 & \textbf{2} \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert latex_escape("50 % of a_b & {x} #1 $") == r"50 \% of a\_b \& \{x\} \#1 \$"
    assert (
        latex_escape("\\^~ 1 ± 2 × λ")
        == r"\textbackslash{}\textasciicircum{}\textasciitilde{} 1 $\pm$ 2 $\times$ $\lambda$"
    )


def test_csv_text_reads_back():
    rows = [["a", "b"], ["1,2", 'say "x"'], ["", "two\nlines"]]
    text = csv_text(rows)
    assert list(csv.reader(text.splitlines(keepends=True))) == rows
    assert csv_text([["a", 1.5], ["b", 2]]) == "a,1.5\nb,2\n"
