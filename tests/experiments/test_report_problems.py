"""Reports name the runs that are missing, failed, diverged, unfinished, damaged or unlike the others."""

import json

import pytest
from written_runs import DATA, SCENE, groups_of, write_run

from experiments.report.command import write_report
from experiments.report.pages import latex_source
from experiments.report.problems import failed_jobs, problems_table
from experiments.report.settings import differing
from experiments.report.tables import Cell, Table

OTHER = "scene-play-singletask-task2-v0"


def rows_of(tmp_path) -> list[list[str]]:
    table = problems_table(groups_of(tmp_path), [], failed_jobs([tmp_path]))
    return [[cell.text for cell in row] for row in table.rows]


@pytest.mark.check
def test_every_kind_is_listed(tmp_path):
    for seed in range(3):
        write_run(tmp_path, [0.5] * 4, seed=seed)
    write_run(tmp_path, [0.5] * 4, env=OTHER)
    write_run(tmp_path, [0.5] * 4, agent="fql")
    write_run(tmp_path, [0.5] * 4, agent="fql", seed=1, finished=False)
    write_run(tmp_path, [0.5] * 4, agent="fql", seed=2, summary={"step": 24_000, "diverged": "critic/loss"})
    write_run(tmp_path, [0.5] * 4, agent="bc", dataset=DATA | {"checksum": 2})
    jobs = tmp_path / ".sweep"
    jobs.mkdir()
    for name, outcome in (
        ("fql-sd7", {"code": 1, "line": "MemoryError"}),
        ("fql-sd8", {"code": 0, "line": "done"}),
        ("fql-sd9", {"code": -15, "line": "stopped"}),
        ("submitted", {"fql-sd7": "12"}),
    ):
        (jobs / f"{name}.json").write_text(json.dumps(outcome))
    (jobs / "half.json").write_text("{")
    assert rows_of(tmp_path) == [
        ["failed", "", "fql-sd7", "", "exit code 1: MemoryError"],
        ["diverged", SCENE, "FQL", "2", "diverged: seed 2 at step 24000 (critic/loss)"],
        ["missing", OTHER, "FQL", "all", "other tasks have runs"],
        ["unfinished", SCENE, "FQL", "1", "unfinished: 24k of 30k updates"],
        ["not compared", SCENE, "BC", "0", rows_of(tmp_path)[-1][-1]],
    ]
    assert rows_of(tmp_path)[-1][-1].startswith("other data")
    (write_run(tmp_path / "more", [0.5] * 4) / "eval.csv").write_text("step,success_rate\n6000,high\n")
    text = write_report([tmp_path], tmp_path / "report", 3)
    page = (tmp_path / "report/report.html").read_text()
    for part in ("exit code 1: MemoryError", "critic/loss", "other tasks have runs", "24k of 30k", "is damaged"):
        assert part in text.partition("## Missing, failed")[2] and part in page
    assert "runs or groups of runs are missing" in page


def test_missing_seeds_are_named_and_complete_runs_are_not(tmp_path):
    for seed in range(3):
        write_run(tmp_path, [0.5] * 4, seed=seed)
        write_run(tmp_path / "b", [0.5] * 4, agent="fql", seed=seed)
    assert not rows_of(tmp_path)
    assert problems_table(groups_of(tmp_path), [], []).notes
    write_run(tmp_path, [0.5] * 4, agent="bc", seed=1)
    assert rows_of(tmp_path) == [["missing", SCENE, "BC", "0, 2", "other methods have these seeds"]]
    write_report([tmp_path / "b"], tmp_path / "report", 3)
    assert "runs or groups of runs are missing" not in (tmp_path / "report/report.html").read_text()


def test_settings_that_differ_between_methods(tmp_path):
    write_run(tmp_path, [0.5] * 4, config={"lr": 0.001, "alpha": 1.0}, flags={"preset": "cpu"})
    write_run(tmp_path, [0.5] * 4, agent="fql", config={"lr": 0.01, "lam": 1.0}, flags={"preset": "cpu"})
    write_run(tmp_path, [0.5] * 4, agent="bc", config={"lr": 0.01}, flags={"preset": "cpu"})
    table = differing(groups_of(tmp_path))
    assert table.header == ["setting", "BC", "FQL", "OTQL"]
    # What only one method has does not differ.
    assert [[cell.text for cell in row] for row in table.rows] == [["lr", "0.01", "0.01", "0.001"]]


def test_tables_are_given_in_latex_and_markdown(tmp_path):
    for seed in range(2):
        write_run(tmp_path, [0.5] * 4, seed=seed)
        write_run(tmp_path, [0.25] * 4, agent="fql", seed=seed)
    write_report([tmp_path], tmp_path / "report", 3)
    page = (tmp_path / "report/report.html").read_text()
    assert r"OTQL &amp; \textbf{0.50} [0.50, 0.50] &amp; 1.0 [1.0, 1.0] &amp; 2 $\times$ 1 \\" in page
    assert "| OTQL | **0.50** [0.50, 0.50] | 1.0 [1.0, 1.0] | 2 × 1 |" in page
    assert page.count("<summary>LaTeX</summary>") == page.count("<summary>Markdown</summary>") == 3
    table = Table(
        "", ["a_b", "c"], [[Cell("50 %"), Cell("1", "close", " [0, 2]")], [Cell("x"), Cell("2", "published")]]
    )
    assert r"a\_b & c \\" in latex_source(table) and r"50 \% & \underline{1} [0, 2] \\" in latex_source(table)
    assert r"x & \emph{2} \\" in latex_source(table)


def test_wide_tables_stand_upright():
    wide = Table("t", ["task", *"abcdefgh"], [[Cell("one"), *map(Cell, "12345678")]], ["note"])
    upright = wide.upright()
    assert upright.header == ["method", "one"] and upright.notes == ["note"]
    assert [[cell.text for cell in row] for row in upright.rows][:2] == [["a", "1"], ["b", "2"]]
    assert upright.upright() is upright
    assert wide.without("c").header == ["task", *"abdefgh"]
    assert [cell.text for cell in wide.without("c").rows[0]] == ["one", *"1245678"]
