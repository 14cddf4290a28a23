"""Solved episodes: labels, in whatever way they are written, and recorded rewards."""

from pathlib import Path

import numpy as np
import pytest

from real.dataset import Episode, Recording
from real.labels import read_labels, successes
from utils.errors import UserError

pytestmark = pytest.mark.check

LENGTHS = [4, 6, 5]
EXPECTED = {0: True, 1: False, 2: True}


def read(tmp_path: Path, content: str | bytes, name: str = "labels.csv") -> dict[int, bool]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_labels(path, LENGTHS)


PLAIN = "episode_index,success\n0,true\n1,false\n2,true\n"
WORDS = ("TRUE", "True", " true ", "yes", "Y", "1", "1.0", "Success", "succeeded", "solved", "T")
NEGATIVE = ("FALSE", "False", " false ", "no", "N", "0", "0.0", "Failure", "failed", "unsolved", "F")


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        PLAIN.encode("utf-8-sig"),
        PLAIN.encode("utf-16"),
        PLAIN.replace(",", "\t").encode("utf-16"),  # Excel's Unicode text.
        PLAIN.replace(",", ";").encode("utf-8-sig").replace(b"\n", b"\r\n"),  # Excel's CSV in many countries.
        "sep=;\r\n" + PLAIN.replace(",", ";"),
        PLAIN.replace(",", "\t"),
        PLAIN.replace(",", " , ").replace("\n", "  \n"),
        "".join(f'"{a}","{b}"\n' for a, b in (line.split(",") for line in PLAIN.split())),
        ' "episode_index" ; "success" \n "0" ; "TRUE" \n "1" ; "FALSE" \n "2" ; "TRUE" ',
        "\n\n" + PLAIN.replace("\n", "\n\n") + ",\n",
        "Success;Episode Index;notes\n1;0;\n0;1;dropped it, twice\n1;2\n",
        'episode,is_success,note\n0,1,"said:\n""well done"""\n1,0,\n2,1,\n',
        ",index,episode_index,success,steps\n0,10,0,True,4\n1,11,1,False,6\n2,12,2,True,\n",
        "episode-id,solved\n0.0,1.0\n1.0,0.0\n2.0,1.0\n",
        *(f"episode_index,success\n0,{a}\n1,{b}\n2,{a}\n" for a, b in zip(WORDS, NEGATIVE, strict=True)),
    ],
)
def test_tables(content, tmp_path):
    assert read(tmp_path, content) == EXPECTED
    assert read(tmp_path, content, "labels.txt") == EXPECTED


@pytest.mark.parametrize(
    "content",
    [
        '{"episode_index": 0, "success": true}\n{"episode_index": 1, "success": false}\n{"episode": "2", "solved": 1}',
        '{"episode_index": 0, "success": "TRUE "}\n\n{"episode": 1, "success": "No"}\n{"episode": 2, "success": 1.0}\n',
    ],
)
def test_lines_of_json(content, tmp_path):
    for content_of_file in (
        content,
        content.encode("utf-8-sig"),
        content.replace("\n", "\r\n"),
        content.encode("utf-16"),
    ):
        for name in ("labels.jsonl", "labels.txt"):
            assert read(tmp_path, content_of_file, name) == EXPECTED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1 of .* must be a header with episode_index and success; it is ''"),
        ("0,true\n1,false\n", "line 1 of .* must be a header .*; it is '0,true'"),
        ("\nepisode_index|success\n0|true\n", "line 2 of .* must be a header"),
        ("episode_index,success,success\n0,1,0\n", "line 1 of .* must be a header"),
        (PLAIN + "1,true\n", "line 5 of .* is a second label for episode 1"),
        (PLAIN.replace("1,false", "1,maybe"), "line 3 of .* says success 'maybe'; write true or false"),
        (PLAIN.replace("1,false", "1,"), "line 3 of .* says success ''"),
        (PLAIN.replace("1,false", "1"), "line 3 of .* says success ''"),
        (PLAIN.replace("1,false", "\n\none,false"), "line 5 of .* is no label"),
        (PLAIN.replace("1,false", "1.5,false"), "line 3 of .* is no label"),
        (PLAIN.replace("1,false", "inf,false"), "line 3 of .* is no label"),
        (PLAIN.replace("1,false", "nan,false"), "line 3 of .* is no label"),
        (PLAIN.replace("1,false", "1,false,true"), "line 3 of .* is no label"),
        (PLAIN.replace("1,false", "3,false"), "line 3 of .* is about episode 3; the dataset has 0 to 2"),
        (PLAIN.replace("1,false", "-1,false"), "line 3 of .* is about episode -1"),
        (PLAIN.replace("1,false", '1,"false'), "line 4 of .* says success 'false 2,true'"),
        (PLAIN.replace("1,false", "1,false" + "e" * 140_000), "line 3 of .* is no row of a table"),
        (PLAIN.encode() + b"\xff\xfe,true\n", "line 5 of .* is not UTF-8 text"),
        (
            '{"episode_index": 0, "success": true}\n{"episode_index": true, "success": true}\n',
            "line 2 of .* is no label",
        ),
        ('{"episode_index": 0, "success": true}\n{"episode_index": 1, "success": null}\n', "line 2 .* success 'None'"),
    ],
)
def test_what_is_no_label_is_named_by_its_line(content, message, tmp_path):
    with pytest.raises(UserError, match=message) as refused:
        read(tmp_path, content)
    assert "\n" not in str(refused.value)


def recording(tmp_path: Path, column: str, *episodes: list[float]) -> Recording:
    return Recording(
        *(tmp_path, 30.0, {"observation.state": 1}, [], ["a"], ["a"]),
        [Episode(np.zeros((len(e), 1)), np.zeros((len(e), 1)), {column: np.float32(e)}) for e in episodes],
    )


@pytest.mark.parametrize(
    ("column", "episodes", "expected"),
    [
        ("next.success", ([0, 0, 0], [0, 0]), [(False, 3), (False, 2)]),
        ("next.success", ([0, 0, 0], [0, 1]), [(False, 3), (True, 2)]),
        # All zero: of 0 and 1, no success; of −1 and 0, each step would be one.
        ("next.reward", ([0, 0, 0], [0, 0]), [(False, 3), (False, 2)]),
        ("next.reward", ([0, 0, 0], [0, 1]), [(False, 3), (True, 2)]),
        ("next.reward", ([-1, -1, -1], [-1, -1]), [(False, 3), (False, 2)]),
        ("next.reward", ([-1, -1, -1], [-1, 0]), [(False, 3), (True, 2)]),
        ("next.reward", ([1, 0, 0], [1, 1]), [(True, 1), (True, 1)]),
    ],
)
def test_success_as_recorded(column, episodes, expected, tmp_path):
    assert successes(recording(tmp_path, column, *episodes), None) == expected
