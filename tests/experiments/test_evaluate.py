"""Evaluation of runs after training, and beside it."""

import csv
import functools
import json
import shutil

import fork_env
import imageio.v3 as imageio
import pytest
from tiny_runs import BC, OTQL, POINTMAZE, TINY, call, contents, refused, run_dir, run_main

from envs.tasks import make_env
from experiments import evaluate as program
from utils.output.intervals import wilson_interval
from utils.output.loggers import read_csv
from utils.rollout import evaluate as single
from utils.rollout.evaluator import Evaluator
from utils.run.loading import load_run
from utils.system import locks

run_program = functools.partial(run_main, program=program)
rejected = functools.partial(refused, program=program)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of which every action shows in the return, with checkpoints and evaluations at steps 4 and 8."""
    folder = tmp_path_factory.mktemp("fork")
    data = fork_env.write_demonstrations(folder / "fork.npz")
    flags = ("--env_name=gym:golden_env:DenseFork-v0", f"--dataset={data}", "--horizon_length=2", "--offline_steps=8")
    flags += ("--eval_interval=4", "--save_interval=4", "--eval_episodes=6", f"--save_dir={folder}", "--seed=3")
    run_main(*OTQL, *flags)
    return run_dir(folder)


@pytest.fixture
def directory(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "run")


def rows_of(directory):
    with (directory / "evaluations.csv").open(newline="") as file:
        return list(csv.DictReader(file))


NAMES = ("return_mean", "length_mean", "success_rate")


@pytest.mark.check
def test_it_repeats_the_evaluations_of_training(directory):
    """Of the newest checkpoint by default; bit for bit, and with another seed not."""
    before = contents(directory)
    out = run_program(str(directory)).out
    run_program(str(directory), "--step=4")
    run_program(str(directory), "--step=4", "--seed=4", "--episodes=5")
    new, old, other = rows_of(directory)
    trained = read_csv(directory / "eval.csv")
    for row, index in ((new, 1), (old, 0)):
        assert int(row["step"]) == trained["step"][index] and (row["seed"], row["episodes"]) == ("3", "6")
        assert [float(row[name]) for name in NAMES] == [trained[name][index] for name in NAMES]
        low, high = wilson_interval(trained["success_rate"][index], 6)
        assert (float(row["low"]), float(row["high"])) == (low, high) and float(row["milliseconds_per_action"]) > 0
        assert (row["flow_steps"], row["best_of_n"]) == ("2", "1")
    assert other["return_mean"] != old["return_mean"] and (other["seed"], other["episodes"]) == ("4", "5")
    assert len(set(trained["return_mean"])) == 2
    assert f"| {directory} | 8 | 2 | 1 | {trained['success_rate'][1]:.2f} [{low:.2f}" not in out  # That of step 4.
    assert f"| {directory} | 8 | 2 | 1 | {trained['success_rate'][1]:.2f} [" in out
    assert {name: text for name, text in contents(directory).items() if name != "evaluations.csv"} == before


@pytest.mark.check
def test_a_function_repeats_them_too(directory):
    agent, settings, step = load_run(directory)
    make = functools.partial(make_env, settings["env_name"])
    result = single.evaluate(agent, make, 6, seed=settings["seed"], step=step, num_workers=1, progress=False)
    trained = read_csv(directory / "eval.csv")
    assert [result[name] for name in NAMES] == [trained[name][-1] for name in NAMES]


def test_on_a_point_maze(pointmaze, tmp_path):
    """With the step limit of the run; its video shows the episodes of its evaluation."""
    flags = (f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", "--offline_steps=2", "--max_episode_steps=7")
    run_main(*BC, *flags, f"--save_dir={tmp_path}")
    directory = run_dir(tmp_path)
    outcome = run_program(str(tmp_path), "--video_grid=2", "--video_format=gif", "--nfe=3,2")
    three, two = rows_of(directory)
    assert [float(two[name]) for name in NAMES] == [read_csv(directory / "eval.csv")[name][0] for name in NAMES]
    assert (three["flow_steps"], two["flow_steps"], two["length_mean"]) == ("3", "2", "7.0")
    if "no video" in outcome.err:
        pytest.skip("MuJoCo cannot render here: neither EGL nor OSMesa")
    names = {f"evaluate_step2_nfe{nfe}_seed0.{kind}" for nfe in (2, 3) for kind in ("mp4", "gif")}
    assert {path.name for path in (directory / "videos").iterdir()} == names
    assert all(f"video: {directory / 'videos' / name}" in outcome.out for name in names)
    frames = imageio.imread(directory / "videos" / "evaluate_step2_nfe2_seed0.mp4")
    assert frames.shape == (4 + 30, 332, 2 * 332, 3)  # At steps 0, 3, 6, 7; then two seconds.


def test_no_renderer(directory, monkeypatch):
    monkeypatch.setattr("utils.rollout.video.rendering_backend", lambda: None)
    outcome = run_program(str(directory), "--video")
    assert "no video: MuJoCo cannot render" in outcome.err and "video: " not in outcome.out
    assert len(rows_of(directory)) == 1


def test_all_combinations_of_acting_settings(directory):
    """In order, one row each; the settings of the run are those of training."""
    out = run_program(str(directory), "--nfe=1,2", "--best_of_n=1,3").out
    rows = rows_of(directory)
    combinations = [(row["flow_steps"], row["best_of_n"]) for row in rows]
    assert combinations == [("1", "1"), ("1", "3"), ("2", "1"), ("2", "3")]
    assert len({row["return_mean"] for row in rows}) == 4
    assert float(rows[2]["return_mean"]) == read_csv(directory / "eval.csv")["return_mean"][-1]
    assert [line.split(" | ")[2:4] for line in out.splitlines()[2:]] == [list(pair) for pair in combinations]


WRONG = {
    (
        "--agent.lr=1e-3",
    ): "--agent.lr does not fit {}, a run of otql; of its settings, only flow_steps, best_of_n, noise_scale can be",
    ("--agent.num_qs=3",): "only flow_steps, best_of_n, noise_scale can be changed after training",
    ("--agent.lamb=3",): "only flow_steps, best_of_n, noise_scale can be changed after training",
    ("--nfe=0",): "--nfe=0: it must be a whole number, at least 1",
    ("--nfe=1.5",): "--nfe=1.5: it must be a whole number, at least 1",
    ("--nfe=",): "--nfe: a value is missing; write values such as 1,2,5",
    ("--agent.flow_steps",): "--agent.flow_steps: a value is missing",
    ("--nfe=1", "--agent.flow_steps=2"): "--agent.flow_steps=2 gives a setting for the second time",
    ("--best_of_n=1,none",): "--agent.best_of_n=none does not fit: it must be of type int",
    ("--step=5",): "has no checkpoint of step 5; it has [4, 8]",
    ("--episodes=0",): "episodes",
    ("--video_format=avi",): "video_format",
    ("--episode=3",): "Unknown command line flag 'episode'",
    ("nowhere",): "there is no directory nowhere; give directories of runs, such as exp/debug",
    ("nowhere*",): "no directory matches nowhere*; give directories of runs",
}


@pytest.mark.check
@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_arguments(directory, arguments):
    before = contents(directory)
    assert WRONG[arguments].format(directory) in rejected(str(directory), *arguments)
    assert contents(directory) == before


def test_runs_that_cannot_be_evaluated(directory, tmp_path):
    """They are named, others are evaluated; without any it is an error. A run of a robot has no simulation."""
    assert "name at least one run" in rejected()
    settings = json.loads((directory / "flags.json").read_text())
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "flags.json").write_text(json.dumps(settings))
    robot = shutil.copytree(directory, tmp_path / "robot")
    (robot / "flags.json").write_text(json.dumps(settings | {"env_name": "robot:arm"}))
    assert f"{bare} has no valid checkpoint" in rejected(str(bare))
    line = rejected(str(robot))
    assert f"{robot} is a run of robot:arm, which has no simulation; evaluate on the robot" in line
    outcome = run_program(str(tmp_path / "*"), "--episodes=1")
    assert f"left out: {bare} has no valid checkpoint" in outcome.err
    assert f"left out: {robot} is a run of robot:arm" in outcome.err
    assert outcome.out.count("\n") == 3 and len(rows_of(directory)) == 1 and not (robot / "evaluations.csv").exists()


@pytest.mark.check
def test_a_file_of_other_columns_is_kept(directory):
    (directory / "evaluations.csv").write_text("step,success\n1,0.5\n")
    assert f"{directory / 'evaluations.csv'} has other columns than this version writes" in rejected(str(directory))
    assert (directory / "evaluations.csv").read_text() == "step,success\n1,0.5\n"


def test_a_run_in_training(directory):
    """Its lock is another process's."""
    lock = locks.take(directory / ".lock")
    try:
        run_program(str(directory), "--episodes=1")
    finally:
        lock.release()
    assert len(rows_of(directory)) == 1


def test_an_interruption_keeps_the_rows(directory, monkeypatch):
    calls, evaluate = [], Evaluator.evaluate

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(Evaluator, "evaluate", interrupted)
    outcome = call(str(directory), "--nfe=1,2,3", "--episodes=1", program=program)
    assert outcome.code == 130 and outcome.err.splitlines()[-1] == "interrupted"
    assert [row["flow_steps"] for row in rows_of(directory)] == ["1"]


def test_an_environment_that_fails(directory):
    """One line, without a traceback; the worker's is in a file."""
    settings = json.loads((directory / "flags.json").read_text())
    settings["env_name"] = "gym:no_such_module:Task-v0"
    (directory / "flags.json").write_text(json.dumps(settings))
    outcome = call(str(directory), program=program)
    assert outcome.code == 2
    line = outcome.err.splitlines()[-1]
    assert line.startswith(
        f"error: the evaluation of {directory} failed: gym:no_such_module:Task-v0, its constructor: "
    )
    assert "No module named 'no_such_module'" in line and "(traceback: " in line


@pytest.mark.parametrize(("recorded", "rate"), [("0.5", "0.0"), ("", "")])
def test_success_that_no_episode_reports(directory, monkeypatch, recorded, rate):
    """None was solved, if training saw solved ones; else the environment reports none."""
    evaluate = Evaluator.evaluate

    def silent(*arguments):
        result = evaluate(*arguments)
        return {name: result[name] for name in result if not name.startswith("success")}

    monkeypatch.setattr(Evaluator, "evaluate", silent)
    (directory / "eval.csv").write_text(f"step,success_rate\n40,{recorded}\n")
    out = run_program(str(directory), "--episodes=4").out
    (row,) = rows_of(directory)
    assert row["success_rate"] == rate and bool(row["low"]) == bool(rate)
    assert ("| – |" in out) == (not rate)


def test_nfe_counts_an_actor_beside_the_flow(trained, tmp_path):
    """DSRL's latent actor is one evaluation more; noise_scale is a column of its own."""
    data = json.loads((trained / "flags.json").read_text())["flags"]["dataset"]
    flags = ("--env_name=gym:golden_env:DenseFork-v0", f"--dataset={data}", "--horizon_length=2", "--offline_steps=2")
    run_main(*TINY, "--agent=agents/dsrl.py", *flags, f"--save_dir={tmp_path}")
    arguments = (str(tmp_path), "--nfe=2,4", "--agent.noise_scale=0.5", "--episodes=1")
    out = run_program(*arguments).out
    assert [line.split(" | ")[2:5] for line in out.splitlines()[2:]] == [["2", "1", "0.5"], ["4", "1", "0.5"]]
    rows = rows_of(run_dir(tmp_path))
    assert [(row["flow_steps"], row["noise_scale"]) for row in rows] == [("1", "0.5"), ("3", "0.5")]
    assert "--nfe=1: it must be a whole number, at least 2" in rejected(*arguments, "--nfe=1")


@pytest.mark.check
def test_help():
    outcome = run_program("--help")
    assert "--[no]video" in outcome.out and "--nfe" in outcome.out and "--num_workers" in outcome.out
