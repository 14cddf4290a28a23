import numpy as np
import pytest
from written_runs import DATA, SCENE, groups_of, row_of, write_run

from experiments.report import published
from experiments.report.aggregate import aggregate_table
from experiments.report.groups import group_runs
from experiments.report.runs import find_runs, update_rate
from experiments.report.tables import Score, marked, runs_table, success_table


def test_score_is_the_mean_of_the_last_evaluations_and_then_of_the_seeds(tmp_path):
    write_run(tmp_path, (0.9, 0.1, 0.2, 0.6), seed=0)
    write_run(tmp_path, (0.9, 0.5, 0.7, 0.9), seed=1)
    (group,) = groups_of(tmp_path)
    np.testing.assert_allclose(group.scores, [0.3, 0.7])
    np.testing.assert_allclose(group.interval, [0.3, 0.7])
    assert group.mean == pytest.approx(0.5) and not group.apart and not group.notes
    (group,) = groups_of(tmp_path, last=1)
    np.testing.assert_allclose(group.scores, [0.6, 0.9])
    # Fewer evaluations than asked for are said.
    (group,) = groups_of(tmp_path, last=9)
    np.testing.assert_allclose(group.scores, [0.45, 0.75])
    assert group.notes == ["4 evaluations, not 9"]


@pytest.mark.check
@pytest.mark.parametrize(
    "other,reason",
    [
        ({"finished": False}, "unfinished: 24k of 30k updates"),
        ({"summary": {"step": 23_000}}, "unfinished: 24k of 24k updates"),
        ({"planned": 32_000}, "unfinished: 24k of 32k updates"),
        ({"steps": (6_000, 12_000, 18_000, 32_000)}, "other updates: 32k, not 24k"),
        (
            {"steps": (21_000, 22_000, 23_000, 24_000)},
            "other evaluations: averaged at 22k, 23k, 24k, not 12k, 18k, 24k",
        ),
        ({"dataset": DATA | {"checksum": 2}}, "other data: scene-play-v0-200ep.npz (200 episodes, checksum 2), not "),
        (
            {"dataset": DATA | {"base": {"checksum": 7}}},
            "other data: scene-play-v0-200ep.npz (200 episodes, checksum 1, base 7)",
        ),
        ({"dataset": None}, "other data: data not recorded, not "),
        ({"sparse": False}, "other rewards: sparse=False, not True"),
        ({"metric": "return_mean"}, "other measure: return_mean, not success_rate"),
    ],
)
def test_unlike_runs_are_set_apart_with_the_reason(tmp_path, other, reason):
    write_run(tmp_path, (0, 0.1, 0.2, 0.3), seed=0)
    write_run(tmp_path, (0, 0.2, 0.3, 0.4), seed=1)
    write_run(tmp_path, (0, 0.0, 0.1, 0.2), agent="bc")
    write_run(tmp_path, (1, 1, 1, 1), seed=2, **other)
    groups = groups_of(tmp_path)
    (odd,) = [group for group in groups if group.apart]
    assert [run.seed for run in odd.runs] == [2] and odd.apart[0].startswith(reason)
    table = success_table(groups, 3)
    assert row_of(table, SCENE)["OTQL"] == "0.25 [0.20, 0.30]"
    assert any("1 group of runs is not compared" in note for note in table.notes)
    (row,) = [row for row in runs_table(groups, 3).rows if "Not compared" in row[-1].text]
    assert odd.apart[0] in row[-1].text and "1 seed" in row[-1].text


def test_the_condition_with_most_methods_is_the_one_compared(tmp_path):
    for seed in range(3):
        write_run(tmp_path, (0, 0, 0, 1), seed=seed, steps=(8_000, 16_000, 24_000, 32_000))
    write_run(tmp_path, (0, 0, 0, 1), seed=3)
    write_run(tmp_path, (0, 0, 0, 1), agent="bc")
    compared = [(group.method, len(group.runs)) for group in groups_of(tmp_path) if not group.apart]
    assert compared == [("BC", 1), ("OTQL", 1)]


def test_settings_that_differ_are_never_averaged(tmp_path):
    write_run(tmp_path, (0, 0.1, 0.1, 0.1), seed=0)
    write_run(tmp_path, (0, 0.5, 0.5, 0.5), seed=1, config={"lam": 0.4})
    write_run(tmp_path, (0, 0.6, 0.6, 0.6), seed=2, config={"lam": 0.4})
    write_run(tmp_path / "fork", (0, 0.7, 0.7, 0.7), seed=3, agent_module="/elsewhere/otql.py")
    groups = groups_of(tmp_path)
    labels = {group.label: len(group.runs) for group in groups if not group.apart}
    assert labels == {
        "OTQL (agent_module=agents.otql, lam=1)": 1,
        "OTQL (agent_module=agents.otql, lam=0.4)": 2,
        "OTQL (agent_module=/elsewhere/otql.py, lam=1)": 1,
    }
    two = groups_of(tmp_path / SCENE)
    assert {group.label: len(group.runs) for group in two} == {"OTQL (lam=1)": 1, "OTQL (lam=0.4)": 2}
    # Many differences are a number and a note, or the preset if that tells them apart.
    many = {"lam": 2.0, "w_max": 1.0, "alpha": 0.1, "epsilon": 0.1}
    write_run(tmp_path / "many", (0, 0, 0, 0), config=many, flags={"preset": "paper"})
    write_run(tmp_path / "many", (0, 0, 0, 0), seed=1, flags={"preset": "cpu"})
    assert {group.label for group in groups_of(tmp_path / "many")} == {"OTQL (preset=paper)", "OTQL (preset=cpu)"}
    write_run(tmp_path / "many", (0, 0, 0, 0), seed=2, config=many | {"lam": 3.0}, flags={"preset": "cpu"})
    groups = groups_of(tmp_path / "many")
    assert [group.label for group in groups] == [f"OTQL (variant {number})" for number in (1, 2, 3)]
    assert any("variant 3: alpha=0.1, epsilon=0.1, lam=3, w_max=1" in note for note in groups[2].notes)
    # A sweep's directories carry the value in the method's name.
    write_run(tmp_path / "vary", (0, 0, 0, 0), varied={"lam": 0.2}, config={"lam": 0.2})
    assert [group.label for group in groups_of(tmp_path / "vary")] == ["OTQL lam=0.2"]


def test_the_same_seed_twice_is_no_second_sample(tmp_path):
    write_run(tmp_path / "a", (0, 0.1, 0.1, 0.1))
    write_run(tmp_path / "b", (0, 0.5, 0.5, 0.5))
    (group,) = groups_of(tmp_path, tmp_path / "b" / ".." / "a")  # and a directory given twice is read once
    assert len(group.notes) == 2
    assert group.scores.tolist() == pytest.approx([0.1])
    assert group.notes[0] == "1 seed" and "seed 0 exists twice" in group.notes[1] and "/b/" in group.notes[1]


def test_presets_and_episodes_that_differ_are_said(tmp_path):
    write_run(tmp_path, (0, 0.1, 0.1, 0.1), seed=0, flags={"preset": "cpu"})
    write_run(tmp_path, (0, 0.1, 0.1, 0.1), seed=1, flags={"preset": "cpu"}, episodes=50)
    write_run(tmp_path, (0, 0, 0, 0), agent="bc", flags={"preset": "paper"})
    notes = {group.method: group.notes for group in groups_of(tmp_path)}
    assert notes == {
        "OTQL": ["25 and 50 episodes per evaluation", "preset=cpu"],
        "BC": ["1 seed", "preset=paper"],
    }


def test_marks():
    scores = {"a": Score(0.8, (0.7, 0.9)), "b": Score(0.71, (0, 1)), "c": Score(0.69, (0, 1)), "d": Score(0.95, None)}
    marks = {label: cell.mark for label, cell in marked(scores).items()}
    assert marks == {"a": "best", "b": "close", "c": "", "d": ""}
    assert marked(scores)["d"].rest == " (1 seed)"
    # What reads alike is alike; single seeds among themselves have a best, and a method alone has none.
    assert [c.mark for c in marked({"a": Score(0.801, (0.8, 0.9)), "b": Score(0.799, (0, 1))}).values()] == ["best"] * 2
    assert [c.mark for c in marked({"a": Score(0.8, None), "b": Score(0.7, None)}).values()] == ["best", ""]
    assert marked({"a": Score(0.8, (0.7, 0.9))})["a"].mark == ""


@pytest.mark.check
def test_aggregate_is_the_iqm_over_the_tasks_that_all_methods_have(tmp_path):
    generator, scores = np.random.default_rng(0), {}
    for task in (1, 2, 3):
        for agent in ("bc", "otql", "fql"):
            if (task, agent) == (3, "fql"):
                continue
            for seed in range(4):
                value = round(generator.random(), 2)
                scores.setdefault((task, agent), []).append(value)
                write_run(tmp_path, [value] * 4, env=f"scene-play-singletask-task{task}-v0", agent=agent, seed=seed)
    table = aggregate_table(groups_of(tmp_path))
    for agent, label in (("bc", "BC"), ("otql", "OTQL"), ("fql", "FQL")):
        middle = sorted(scores[1, agent] + scores[2, agent])[2:-2]
        row = row_of(table, label)
        assert row["IQM of success"].startswith(f"{np.mean(middle):.2f} [") and row["runs × tasks"] == "4 × 2"
    text = " ".join(table.notes)
    assert "(2): scene-play-singletask-task1-v0, scene-play-singletask-task2-v0." in text
    assert "Not in it: scene-play-singletask-task3-v0." in text
    only = aggregate_table([g for g in groups_of(tmp_path) if (g.method == "FQL") != (g.env_name == SCENE)])
    assert not only.rows and "There is no aggregate" in only.notes[0]


def test_domains_mean_stands_above_table_1_when_all_five_tasks_are_there(tmp_path):
    for task in range(1, 6):
        for seed in range(2):
            write_run(tmp_path, [task / 10 + seed / 100] * 4, env=f"scene-play-singletask-task{task}-v0", seed=seed)
    groups = groups_of(tmp_path)
    table = success_table(groups, 3)
    value = row_of(table, "scene, mean of its 5 tasks")["OTQL"]
    assert value.startswith("0.30 [") or value.startswith("0.31 [")
    assert row_of(table, "published: mean of scene's 5 tasks")["OTQL"] == "0.99"
    four = success_table([group for group in groups if group.env_name != SCENE], 3)
    assert not [row for row in four.rows if row[0].text.startswith("scene, mean")]


def test_published_figures_stand_beneath_at_the_same_updates_and_at_the_end(tmp_path):
    for agent in ("fql", "otql"):
        write_run(tmp_path, (0.5, 0.5), agent=agent, steps=(300_000, 350_000))
    table = success_table(groups_of(tmp_path, last=2), 2)
    curve = published.curves()[SCENE]["FQL"]
    same = row_of(table, "published: this task, at the same updates (350k)")
    assert same["FQL"] == f"{(curve.mean[5] + curve.mean[6]) / 2:.2f}" and same["OTQL"] == ""
    assert row_of(table, "published: this task, 1M")["FQL"] == f"{curve.mean[-1]:.2f} ± {curve.std[-1]:.2f}"
    row = row_of(table, "published: mean of scene's 5 tasks, 1M (Table 1)")
    assert (row["FQL"], row["OTQL"]) == ("0.78", "0.99")
    # No figure is made up below the first published one, nor for a task that Table 1 does not have.
    assert curve.at((6_000, 12_000)) is None
    write_run(tmp_path / "noisy", (0.5,), agent="fql", steps=(1_000,), env="scene-noisy-singletask-task1-v0")
    assert len(success_table(groups_of(tmp_path / "noisy"), 3).rows) == 1


def test_one_agent_file_of_three_published_methods():
    assert published.method_name("qam", {"fql_alpha": 0.0, "edit_scale": 0.0}) == "QAM"
    assert published.method_name("qam", {"fql_alpha": 300.0, "edit_scale": 0.0}) == "QAM-F"
    assert published.method_name("qam", {"fql_alpha": 0.0, "edit_scale": 0.1}) == "QAM-E"
    assert published.method_name("qam_f", {"fql_alpha": 0.0}) == "QAM-F"
    assert published.method_name("fedit", {"edit_scale": 0.1}) == "FEdit"
    assert published.method_name("mine", {}) == "mine"
    names = ["OTQL", "OTQL lam=0.2", "QAM-F", "mine", "BC", "FAWAC"]
    assert sorted(names, key=published.method_order) == ["BC", "mine", "FAWAC", "QAM-F", "OTQL", "OTQL lam=0.2"]


def test_carried_figures_are_those_of_the_paper():
    table = published.table1()
    averages = {method: np.mean([row[method] for row in table.values()]) for method in table["scene"]}
    expected = {"FAWAC": 0.11, "DSRL": 0.48, "QSM": 0.47, "CGQL": 0.34, "FEdit": 0.36, "QAM": 0.55, "IFQL": 0.43}
    for method, value in (expected | {"FQL": 0.44, "QAM-F": 0.54, "OTQL": 0.59}).items():
        assert abs(averages[method] - value) < 0.0101, method
    curves = published.curves()
    for domain, row in table.items():
        tasks = [env_name for env_name in curves if published.domain_of(env_name) == domain]
        assert len(tasks) == 5
        for method in row.keys() - {"QSM", "OTQL"}:
            assert abs(np.mean([curves[task][method].mean[-1] for task in tasks]) - row[method]) < 0.0055
    assert all(curve.steps[-1] == published.STEPS for task in curves.values() for curve in task.values())


def test_speed_is_the_median_over_rows():
    timing = {"step": np.array([5e3, 10e3, 15e3]), "seconds": np.array([50.0, 10.0, 25.0])}
    assert update_rate(timing) == 200  # of 100, 500 and 200
    assert update_rate(timing | {"updates": np.array([5e3, 1e3, 5e3])}) == 100
    assert np.isnan(update_rate({}))


def test_cost_stands_beside_success(tmp_path):
    write_run(tmp_path, (0, 0, 0, 0), seconds=4.0)
    write_run(tmp_path, (0, 0, 0, 0), agent="bc", summary={"milliseconds_per_action": 1.234}, flags={"num_seeds": 3})
    write_run(tmp_path, (0, 0, 0, 0), agent="fql", nfe=1, config={"flow_steps": 10})
    write_run(tmp_path, (0, 0, 0, 0), agent="mine", config={"flow_steps": 10})
    table = runs_table(groups_of(tmp_path), 3)
    rows = {row[1].text: dict(zip(table.header, (cell.text for cell in row), strict=True)) for row in table.rows}
    columns = ("NFE", "N", "ms/action", "updates/s")
    assert [rows["OTQL"][name] for name in columns] == ["2", "5", "–", "250"]
    assert [rows["BC"][name] for name in columns] == ["2", "5", "1.23", "100 (3 runs at once)"]
    assert rows["FQL"]["NFE"] == "1"
    assert rows["mine"]["NFE"] == "–"  # not recorded, and flow_steps need not be its NFE
    assert rows["OTQL"]["evaluations"] == "3 × 25 episodes" and rows["OTQL"]["updates"] == "24k"


def test_runs_can_be_compared_at_a_step_that_all_have_reached(tmp_path):
    """A longer run, cut at the step where a shorter one ends, is compared with it by its evaluations up to there."""
    write_run(tmp_path, (0.1, 0.3, 0.5, 0.9))
    shorter = write_run(tmp_path, (0.2, 0.2, 0.2, 0.2), agent="bc")
    for name in ("eval", "timing"):
        lines = (shorter / f"{name}.csv").read_text().splitlines()
        kept = [lines[0], *(line for line in lines[1:] if int(line.split(",")[0]) <= 18_000)]
        (shorter / f"{name}.csv").write_text("\n".join(kept) + "\n")
    runs_at = {run.algorithm: run for run in find_runs([tmp_path], 18_000)[0]}
    assert all(run.finished and run.planned == 18_000 for run in runs_at.values())
    assert list(runs_at["OTQL"].values) == [0.1, 0.3, 0.5] and runs_at["OTQL"].reached == 18_000
    assert not any(group.apart for group in group_runs(runs_at.values(), 3))
    late = {run.algorithm: run for run in find_runs([tmp_path], 20_000)[0]}
    assert not late["BC"].finished


def test_online_runs_are_said_to_be_such_with_their_base(tmp_path):
    """The steps of online_main.py are the environment's, and what it evaluates before the rollouts' end is the base."""
    flags, steps = {"offline_steps": None, "rollout_steps": 2_000}, (0, 1_000, 2_000, 3_000)
    for seed, values in enumerate([(0.2, 0.4, 0.5, 0.9), (0.3, 0.5, 0.5, 0.7)]):
        write_run(tmp_path, values, env="OpenMicrowave-v0", steps=steps, seed=seed, flags=flags, total=3_000)
    (group,) = groups_of(tmp_path, last=1)
    assert not group.apart and group.mean == pytest.approx(0.8)
    assert "environment steps, not updates; of the base: 0.35" in group.notes
    # A seed that was evaluated more often counts no more; one that is under way is told of in its own unit.
    write_run(tmp_path, (0.8, 0.9), env="OpenMicrowave-v0", steps=(1_000, 3_000), seed=2, flags=flags, total=3_000)
    write_run(
        tmp_path, (0.1,), env="OpenMicrowave-v0", steps=(1_000,), seed=3, flags=flags, total=3_000, finished=False
    )
    half, group = sorted(groups_of(tmp_path, last=1), key=lambda group: len(group.runs))
    assert "environment steps, not updates; of the base: 0.50" in group.notes
    assert half.apart == ["unfinished: 1k of 3k environment steps"]
