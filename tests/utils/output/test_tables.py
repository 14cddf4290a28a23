import csv

import pytest

from utils.output.tables import csv_text, markdown_table

pytestmark = pytest.mark.check


def test_markdown_table():
    assert markdown_table(["a", ""], [["1", "x"]]) == "| a |  |\n|---|---|\n| 1 | x |"
    assert markdown_table(["a"], [], rule="| --- ") == "| a |\n| --- |"


def test_csv_text_reads_back():
    rows = [["a", "b"], ["1,2", 'say "x"'], ["", "two\nlines"]]
    text = csv_text(rows)
    assert list(csv.reader(text.splitlines(keepends=True))) == rows
    assert csv_text([["a", 1.5], ["b", 2]]) == "a,1.5\nb,2\n"
