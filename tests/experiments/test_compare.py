"""Paired differences: pairs, weights, intervals, and evaluations after training."""

import re

import numpy as np
import pytest
from tiny_runs import refused, run_main
from written_runs import write_run

from experiments import compare

TASKS = ("scene-play-singletask-task1-v0", "cube-single-play-singletask-task2-v0")


@pytest.fixture
def groups(tmp_path):
    """Two groups with three and two seeds of two tasks; b has one seed more."""
    rates = {
        "a": {TASKS[0]: (0.8, 0.6, 0.9), TASKS[1]: (0.5, 0.1)},
        "b": {TASKS[0]: (0.5, 0.5, 0.4), TASKS[1]: (0.4, 0.3, 1.0)},
    }
    for group, tasks in rates.items():
        for task, values in tasks.items():
            for seed, value in enumerate(values):
                write_run(tmp_path / group, (0.0, value), env=task, seed=seed, steps=(500, 1000))
    return tmp_path


def table(out):
    """The rows of a Markdown table, without header and rule."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:]]


def test_differences_are_of_pairs_and_tasks_weigh_alike(groups):
    captured = run_main(str(groups / "a"), str(groups / "b"), program=compare)
    cube, scene, mean = table(captured.out)
    assert scene[:4] == [TASKS[0], "3", "0.77", "0.47"] and scene[4].startswith("+0.30 [")
    assert cube[:4] == [TASKS[1], "2", "0.30", "0.35"] and cube[4].startswith("-0.05 [")
    assert mean[0] == "mean" and mean[1] == "2+3" and mean[4].startswith("+0.12 [")
    assert f"without a partner: {TASKS[1]} seed 2" in captured.err
    rng, pairs = np.random.default_rng(5), (np.array([0.3, 0.1, 0.5]), np.array([0.1, -0.2]))
    draws = np.mean([rng.choice(own, (40_000, len(own))).mean(axis=1) for own in pairs], axis=0)
    low, high = map(float, re.findall(r"[+-]\d\.\d\d", mean[4])[1:])
    np.testing.assert_allclose((low, high), np.quantile(draws, (0.025, 0.975)), atol=0.02)


def test_another_step(groups):
    outcome = run_main(str(groups / "a"), str(groups / "b"), "--step=500", program=compare)
    assert table(outcome.out)[-1][4].startswith("+0.00")


def test_evaluations_after_training(tmp_path):
    """A row counts if the settings named are its own and all others are those of training; of several the last."""
    for group, rate in (("a", 0.9), ("b", 0.4)):
        run = write_run(
            tmp_path / group,
            (0.0, 0.1),
            steps=(500, 1000),
            config={"flow_steps": 2, "best_of_n": 5, "noise_scale": 1.0},
        )
        lines = ["step,seed,flow_steps,best_of_n,noise_scale,episodes,success_rate,low,high,normalized_score"]
        lines += [f"1000,0,1,5,1.0,50,{value},0,1,0.5" for value in (0.0, rate)]
        lines += ["1000,0,1,1,1.0,50,0.7,0,1,0.5", "1000,0,1,5,0.5,50,0.8,0,1,0.5", "1000,0,2,5,1.0,50,0.3,0,1,0.5"]
        (run / "evaluations.csv").write_text("\n".join(lines) + "\n")
    arguments = [str(tmp_path / "a"), str(tmp_path / "b")]
    for at, expected in {"flow_steps=1": "+0.50", "flow_steps=1,best_of_n=1": "+0.00"}.items():
        outcome = run_main(*arguments, f"--at={at}", program=compare)
        assert table(outcome.out)[0][4] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a",), "give two directories"),
        (("a", "nowhere"), "there is no directory"),
        (("a", "b", "--step=7"), "no evaluation at step 7"),
        (("a", "b", "--at=flow_steps"), "field=value"),
        (("a", "b", "--at=flow_steps=1"), "no row with flow_steps=1"),
    ],
)
def test_refusals(arguments, message, groups):
    given = [text if text.startswith("--") else str(groups / text) for text in arguments]
    assert message in refused(*given, program=compare)


def test_runs_in_training_need_a_step(tmp_path):
    """A run that stopped early is not compared with one that ended; at a step that both have, it is."""
    for group, steps, finished in (("a", (500, 1000), True), ("b", (500,), False)):
        write_run(tmp_path / group, (0.5,) * len(steps), steps=steps, finished=finished)
    directories = (str(tmp_path / "a"), str(tmp_path / "b"))
    assert "have not finished" in refused(*directories, program=compare)
    assert table(run_main(*directories, "--step=500", program=compare).out)[0][4] == "+0.00"


def test_groups_of_different_tasks_and_mixed_groups(groups):
    assert "no task and seed is in both" in refused(
        str(groups / "a" / TASKS[0]), str(groups / "b" / TASKS[1]), program=compare
    )
    assert "several runs" in refused(str(groups), str(groups / "a"), program=compare)
