"""The ablation studies: what they run, and the tables, curves and pictures that come of it."""

import csv
import json
import struct

import pytest
from tiny_runs import TINY, call, refused, run_dirs, run_main
from written_runs import SCENE, STEPS, write_run

from experiments import ablate
from experiments.sweep.grids import Grid
from utils.run.agent_config import resolve_config
from utils.run.agent_files import load_agent


def commands(*flags):
    """Setting-specific flags of the commands that a study would start, one list a command."""
    out = run_main("--dry_run", *flags, program=ablate).out
    shared = ("--save_dir", "--run_group", "--seed", "--num_seeds", "--env_name")
    return [[word for word in line.split() if not word.startswith(shared)] for line in out.splitlines()]


@pytest.mark.parametrize("scale", ablate.SCALES)
@pytest.mark.parametrize("study", ablate.STUDIES)
def test_every_study_differs_in_its_settings_alone(study, scale, tmp_path):
    fields = ablate.STUDIES[study]
    lines = commands(f"--study={study}", f"--scale={scale}", "--seeds=1", f"--save_dir={tmp_path}")
    program, env_name = ablate.SCALES[scale].program, ablate.SCALES[scale].env_names[0]
    assert all(program in line[1] for line in lines)
    shared = set.intersection(*map(set, lines))
    choices = []
    for line in lines:
        own = dict(flag.removeprefix("--agent.").split("=") for flag in set(line) - shared)
        lanes = [flag for flag in line if flag.startswith("--vary=agent.")]
        axis = list(fields)[-1]
        if lanes:
            name, values = lanes[0].removeprefix("--vary=agent.").split("=")
            assert name == axis
            choices += [own | {axis: value} for value in values.split(",")]
        else:
            choices.append(own)
    # Every combination once, and as the agent understands it.
    assert len({json.dumps(choice, sort_keys=True) for choice in choices}) == len(choices)
    expected = 1
    for values in fields.values():
        expected *= len(values)
    assert len(choices) == expected
    for choice in choices:
        assert set(choice) == set(fields)
        config, _, _ = resolve_config(
            load_agent("agents/otql.py"), ablate.sweep.parse_task(env_name).domain, "paper", choice
        )
        assert all(config[name] in values for name, values in fields.items())


def write_study(root, scores, field="lam", finished=True):
    """Runs of seeds 0, 1, … for each value: value → a success rate a seed."""
    for value, seeds in scores.items():
        for seed, score in enumerate(seeds):
            write_run(
                root / f"{field}{value}", (0, score, score, score), seed=seed, config={field: value}, finished=finished
            )


def test_table_curves_and_picture(tmp_path, capsys):
    write_study(tmp_path / "runs", {4.0: (0.1, 0.3), 0.4: (0.5, 0.7)})
    write_run(tmp_path / "runs" / "half", (0, 0.9), config={"lam": 1.5}, steps=STEPS[:2], finished=False)
    ablate.report("lam", "laptop", [tmp_path / "runs"], tmp_path / "report")
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert rows[0] == "| λ | score | 95 % interval | seeds |"
    assert rows[2:] == [
        "| 0.4 | 0.60 | 0.50 to 0.70 | 0.50, 0.70 |",
        "| 4 | 0.20 | 0.10 to 0.30 | 0.10, 0.30 |",
    ]
    assert [line for line in lines if "left out" in line] == [
        "- left out: λ 1.5, 1 of the seeds: unfinished: 12k of 18k updates"
    ]
    command, shared, *data = (tmp_path / "report/curves.csv").read_text().splitlines()
    assert command == "# python -m experiments.ablate --study=lam --scale=laptop"
    assert json.loads(shared[2:]) == {"flow_steps": 2, "best_of_n": 5}
    table = list(csv.DictReader(data))
    assert len(table) == 4 * len(STEPS) and {row["env_name"] for row in table} == {SCENE}
    assert [row["value"] for row in table if row["lam"] == "4" and row["seed"] == "1"] == ["0", "0.3", "0.3", "0.3"]
    png = (tmp_path / "report/ablation.png").read_bytes()
    assert png.startswith(b"\x89PNG") and struct.unpack(">II", png[16:24])[0] == 1770


def test_coupling_says_what_more_steps_would_bring(tmp_path, capsys):
    scores = {("ot", 2): 0.8, ("ot", 10): 0.9, ("independent", 2): 0.4, ("independent", 10): 0.7}
    for (coupling, nfe), score in scores.items():
        config = {"coupling": coupling, "flow_steps": nfe}
        write_run(tmp_path / f"{coupling}{nfe}", (0, score, score, score), config=config)
    ablate.report("coupling", "laptop", [tmp_path], tmp_path / "report")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("| ot", "2", "+0.10 |"),
        ("| ot", "10", "+0.00 |"),
        ("| independent", "2", "+0.30 |"),
        ("| independent", "10", "+0.00 |"),
    ]
    assert {row[3] for row in rows} == {"one seed"}


def test_a_half_finished_coupling_study(tmp_path, figures):
    """A line without the most Euler steps has no gain by them, and the axis keeps its order."""
    for coupling, nfe in (("ot", 2), ("ot", 10), ("independent", 3)):
        write_run(tmp_path / f"{coupling}{nfe}", (0, 0.5, 0.5, 0.5), config={"coupling": coupling, "flow_steps": nfe})
    points, _ = ablate.find_points("coupling", [tmp_path])
    ablate.draw("coupling", points)
    assert [label.get_text() for label in figures[0].axes[-1].get_xticklabels()] == ["2", "3", "10"]
    # A panel of learning curves for each coupling, every line named at its end, and the caption has what it needs.
    panels = figures[0].axes[:-1]
    assert [axes.get_title() for axes in panels] == ["ot", "independent"]
    assert [sorted(text.get_text() for text in axes.texts) for axes in panels] == [["NFE 10", "NFE 2"], ["NFE 3"]]
    assert figures[0].get_supxlabel().startswith(f"OTQL on {SCENE}. Means over 1 seed, 25 episodes per evaluation.")
    rows = [row.split(" | ") for row in ablate.table("coupling", points).splitlines()]
    assert rows[0][-1] == "gain by NFE 10 |" and [row[-1] for row in rows[2:]] == ["+0.00 |", "+0.00 |", "– |"]


def test_only_what_is_studied_differs(tmp_path, capsys):
    """Runs with another setting, or of another agent file, are told of and left out."""
    write_study(tmp_path, {1: (0.5, 0.5), 2: (0.5,)}, field="flow_steps")
    for name, others in (("a", {"lr": 9.0}), ("b", {"image_components": 16})):
        write_run(tmp_path / name, (0, 0.9, 0.9, 0.9), seed=7, config={"flow_steps": 3} | others)
    write_run(tmp_path / "c", (0, 0.9, 0.9, 0.9), seed=7, config={"flow_steps": 3}, agent_module="/mine/otql.py")
    ablate.report("nfe", "laptop", [tmp_path], tmp_path / "report")
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in lines if line.startswith("| ")][2:] == ["| 1 ", "| 2 "]
    assert sorted(line for line in lines if line.startswith("- ")) == [
        "- left out: NFE 3, 1 of the seeds: other settings: agent_module /mine/otql.py, not agents.otql",
        "- left out: NFE 3, 1 of the seeds: other settings: image_components 16, not –",
        "- left out: NFE 3, 1 of the seeds: other settings: lr 9, not –",
    ]


def test_nothing_to_compare_yet(tmp_path, monkeypatch):
    write_study(tmp_path / "ablate-laptop-lam", {0.4: (0.5,), 1.0: (0.5,)}, finished=False)
    message = refused("--study=lam", f"--save_dir={tmp_path}", "report", program=ablate)
    assert "none of the study's runs can be compared yet: λ 0.4" in message and "unfinished" in message
    assert "there is no directory" in refused("--study=alpha", f"--save_dir={tmp_path}", "report", program=ablate)


@pytest.mark.check
@pytest.mark.parametrize(
    "flags,message",
    [
        ([], "--study is missing; it is one of lam, best_of_n"),
        (["--study=lamb"], "study"),
        (["--study=lam", "--scale=huge"], "scale"),
        (["--study=lam", "draw"], "'draw' is none of start, status, report"),
        (["--study=lam", "--grid=fig6"], "grid"),
    ],
)
def test_mistakes(flags, message):
    assert message in refused(*flags, program=ablate)


def test_a_study_runs_and_goes_on(tmp_path, pointmaze, monkeypatch):
    """Lanes of λ in one program, then everything that comes of them; a second start has nothing to do."""
    flags = [flag for flag in TINY if not flag.startswith("--eval_interval")]
    flags += [f"--dataset={pointmaze}", "--offline_steps=2", "--eval_interval=2", "--save_interval=2"]
    small = Grid(("otql",), ("pointmaze-medium-navigate-singletask-task1-v0",), 2, flags=tuple(flags))
    monkeypatch.setitem(ablate.SCALES, "laptop", small)
    monkeypatch.setitem(ablate.STUDIES, "lam", {"lam": (0.5, 1.0)})
    arguments = "--study=lam", f"--save_dir={tmp_path}", "--seeds_per_job=2"
    outcome = run_main(*arguments, program=ablate)
    assert len(run_dirs(tmp_path)) == 4 and "1 to start" in outcome.err
    rows = [line for line in outcome.out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| 0.5", "| 1"]
    assert "0 to start" in run_main(*arguments, program=ablate).err
    assert call(*arguments, "status", program=ablate).out == "1 done\n"
