import csv
import json
import os
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from written_runs import DATA, SCENE, STEPS, groups_of, write_run

from experiments.report import command as report
from utils.system.entry_point import run_main
from utils.system.files import ROOT


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Runs the program in this process: exit code, stdout, stderr."""
    for name in ("output", "last"):
        report.FLAGS[name].unparse()
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    code = 0
    try:
        run_main(report.main)
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_a_run_is_read_while_it_is_written(tmp_path):
    directory = write_run(tmp_path, (0.1, 0.2, 0.3, 0.4), finished=False)
    with (directory / "eval.csv").open("a") as file:
        file.write("30000,25.0,0.")
    young = write_run(tmp_path, (0,), seed=1, steps=(6_000,), finished=False, planned=30_000)
    (young / "eval.csv").write_text("")
    bare = write_run(tmp_path, (0,), seed=2, steps=(6_000,), finished=False, planned=30_000)
    (bare / "eval.csv").unlink()
    (bare / "timing.csv").unlink()
    groups = groups_of(tmp_path)
    assert [group.scores.tolist() for group in groups] == [pytest.approx([0.3]), []]
    assert groups[0].apart == ["unfinished: 24k of 30k updates"]
    assert groups[1].apart == ["unfinished: 6k of 30k updates"] and groups[1].notes == ["no evaluations, not 3"]
    text = report.write_report([tmp_path], tmp_path / "report", 3)
    assert f"| {SCENE} |" in text and "unfinished" in text


def test_a_finished_run_without_evaluations_is_not_called_unfinished(tmp_path):
    directory = write_run(tmp_path, (0, 0.1, 0.2, 0.3))
    (directory / "eval.csv").unlink()
    (group,) = groups_of(tmp_path)
    assert group.apart == ["no evaluations"]


def test_damaged_runs_are_left_out_by_name(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, (0, 0.2, 0.3, 0.4), seed=0)
    for seed, (name, content) in enumerate(
        [
            ("flags.json", b'{"env_name": "scen'),
            ("flags.json", b"[]"),
            ("flags.json", b'{"env_name": "x", "agent": "a", "seed": 0, "config": {}, "flags": {}}'),
            ("eval.csv", b"step,success_rate\n6000,high\n"),
            ("eval.csv", b"\xff\xfe\x00"),
            ("eval.csv", b"step,success_rate\n6000,1\n6000,1\n"),
            ("summary.json", b"{"),
        ],
        start=1,
    ):
        (write_run(tmp_path, (1, 1, 1, 1), seed=seed) / name).write_bytes(content)
    code, out, err = call(monkeypatch, capsys, tmp_path)
    lines = [line for line in err.splitlines() if line.startswith("left out: ")]
    assert code == 0 and [int(re.search(r"sd(\d)", line)[1]) for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert "| 0.30 (1 seed) |" in out
    assert out.count("is damaged") == len(lines)
    page = (tmp_path / "report/report.html").read_text()
    assert page.count("is damaged") == 3 * len(lines)  # the table, its LaTeX and its Markdown


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "give one or more directories"),
        (["{}/none"], "there is no directory"),
        (["{}"], "no runs in"),
        (["{}", "--lasst=2"], "lasst"),
        (["{}", "--last=0"], "last"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    code, out, err = call(monkeypatch, capsys, *(argument.format(tmp_path) for argument in arguments))
    assert code == 2 and not out and message in err
    assert err.startswith("error: ") and err.count("\n") == 1 and not any(tmp_path.iterdir())


def test_nothing_but_damaged_runs_is_a_mistake(tmp_path, monkeypatch, capsys):
    (write_run(tmp_path, (0, 0, 0, 0)) / "flags.json").write_text("{")
    code, _, err = call(monkeypatch, capsys, tmp_path)
    assert code == 2 and "is damaged" in err and err.count("\n") == 1


ADDRESSES = ("src", "href", "srcset", "xlink:href", "data", "poster", "action")


class Page(HTMLParser):
    """Parses a page strictly: every element closed in order; keeps addresses, tags and text."""

    VOID = {"meta", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.addresses, self.text = [], [], [], []
        self.style = "".join(re.findall(r"<style.*?</style>|style=\"[^\"]*\"", text, re.DOTALL))
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ADDRESSES or "://" in (value or "")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.check
def test_page_is_one_file_with_everything_escaped(tmp_path, monkeypatch, capsys):
    evil = "<script>alert('1')</script> & | `x` *y*"
    for seed in range(3):
        write_run(tmp_path, (0, 0.2, 0.3, 0.4 + seed / 10), seed=seed, config={"lam": 7.0, "w_max": 10.0})
        write_run(tmp_path, (0, 0.2, 0.3, 0.3), agent="fql", seed=seed)
    write_run(tmp_path, (0, 0, 0, 0), agent="bc", dataset=DATA | {"file": evil})
    write_run(tmp_path / "evil", (0, 0, 0, 0), agent="x", env="gym:" + "Task-v0", metric="return_mean")
    odd = next((tmp_path / "evil").rglob("flags.json"))
    odd.write_text(odd.read_text().replace('"agent": "x"', f'"agent": {json.dumps(evil)}'))
    output = tmp_path / "out"
    code, out, err = call(monkeypatch, capsys, f"--output={output}", tmp_path, "--last=2")
    assert code == 0, err
    page = Page((output / "report.html").read_text())
    assert "script" not in page.tags and {"h1", "table", "figure", "details", "strong"} <= set(page.tags)
    # The style sheet and the figures are within, and nothing is loaded from elsewhere.
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert page.tags.count("svg") == len(list(output.rglob("*.png"))) == 3  # aggregate, and curves of two tasks
    assert all(address.startswith("#") for address in page.addresses)
    assert "http" not in page.style and "@import" not in page.style
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", page.style))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in output.rglob("*.png"))
    text = "".join(page.text)
    assert evil in text and "prefers-color-scheme: dark" in text and "lam" in text
    assert (output / "report.md").read_text() == out.removesuffix("\n")
    assert "<script>" not in out.replace("\\<script>", "") and "0.35" in out
    for line in out.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) in (4, 5, 6, 12)  # tables keep their columns
    # The same runs give the same files.
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    call(monkeypatch, capsys, f"--output={output}", tmp_path, "--last=2")
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_settings_are_shown_against_the_agents_defaults(tmp_path):
    write_run(tmp_path, (0, 0, 0, 0), config={"lam": 7.25})
    code = tmp_path / "mine.py"
    code.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    write_run(tmp_path, (0, 0, 0, 0), agent="mine", agent_module=str(code))
    report.write_report([tmp_path], tmp_path / "report", 3)
    text = "".join(Page((tmp_path / "report/report.html").read_text()).text)
    from agents import otql

    assert f"lam7.25{otql.get_config().lam:g}" in text
    assert "flow_steps2" not in text  # is the default
    assert "defaults are not known here" in text and not (tmp_path / "executed").exists()
    # Neither a fork's settings against the defaults of its namesake, nor a name that leads out of agents/.
    assert report.default_settings({"agent": "otql", "agent_module": str(code)}) is None
    outside = os.path.relpath(code.with_suffix(""), ROOT / "agents")
    assert report.default_settings({"agent": outside, "agent_module": f"agents.{outside}"}) is None
    assert not (tmp_path / "executed").exists()


def test_evaluations_are_there_for_other_plots(tmp_path):
    for seed in range(2):
        write_run(tmp_path, (0, 0.25, 0.5, 0.75), seed=seed)
    report.write_report([tmp_path], tmp_path / "report", 2)
    rows = list(csv.DictReader((tmp_path / "report/evaluations.csv").open()))
    assert [(row["seed"], row["step"], row["averaged"]) for row in rows] == [
        (str(seed), str(step), str(int(step > 12_000))) for seed in range(2) for step in STEPS
    ]
    assert np.mean([float(row["value"]) for row in rows if row["averaged"] == "1"]) == 0.625
    assert {row["method"] for row in rows} == {"OTQL"} and {row["episodes"] for row in rows} == {"25"}


@pytest.mark.parametrize("other,marked", [(10_000, [[10_000, 10_000]]), (20_000, [])])
def test_curves_say_where_online_begins(tmp_path, figures, other, marked):
    """Where it begins at one step for all that is drawn."""
    for agent, offline in (("fql", 10_000), ("otql", other)):
        flags = {"offline_steps": offline, "online_steps": 40_000 - offline}
        write_run(tmp_path, (0, 0.2), steps=(10_000, 40_000), agent=agent, flags=flags, total=40_000)
    report.write_report([tmp_path], tmp_path / "report", 1)
    upright = [line.get_xdata() for line in figures[0].axes[0].lines if line.get_label().startswith("_child")]
    assert upright == marked
