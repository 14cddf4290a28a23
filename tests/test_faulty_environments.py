"""Runs whose environment hangs, crashes or gives what is no number: one line, nothing lost, and on from there."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from faulty_env import write_data
from tiny_runs import BC, assert_same_run, assert_same_tree, call, run_dirs, run_main

from utils.output.loggers import CsvLogger, read_csv
from utils.random_streams import Stream, stream_seed
from utils.run import checkpoints

SEEDS = 2
BASE = (
    *(flag for flag in BC if not flag.startswith(("--eval", "--horizon"))),
    *("--horizon_length=4", "--eval_workers=1", "--log_interval=5", "--save_interval=0", f"--num_seeds={SEEDS}"),
)
OFFLINE = ("--offline_steps=40", "--eval_interval=20", "--eval_episodes=3")
ONLINE = ("--offline_steps=5", "--online_steps=50", "--start_training=8", "--eval_episodes=0")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("track") / "track.npz")


@pytest.fixture
def fault(monkeypatch, tmp_path):
    """Returns a function that sets the fault of the environments, '' for none, those that live included."""
    path = tmp_path / "fault"
    monkeypatch.setenv("FAULT_FILE", str(path))
    return path.write_text


@pytest.fixture
def flags(data):
    """Returns a function: the flags of a run in a directory."""

    def make(save_dir, *more, env="Track-v0"):
        return (*BASE, f"--env_name=gym:faulty_env:{env}", f"--dataset={data}", f"--save_dir={save_dir}", *more)

    return make


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """The directories of undisturbed runs, offline and online."""
    found = {}
    for kind in (OFFLINE, ONLINE):
        save_dir = tmp_path_factory.mktemp("unbroken")
        run_main(*BASE, "--env_name=gym:faulty_env:Track-v0", f"--dataset={data}", f"--save_dir={save_dir}", *kind)
        found[kind] = run_dirs(save_dir)
    return found


@pytest.fixture
def sigterm():
    """Returns a function that sends this process a SIGTERM once a file has a text; ends with the test."""
    over = threading.Event()

    def send(condition):
        def wait():
            while not condition() and not over.wait(0.05):
                pass
            over.wait(0.3)
            os.kill(os.getpid(), signal.SIGTERM)
            sent.append(time.monotonic())

        sent = []
        thread = threading.Thread(target=wait)
        thread.start()
        threads.append(thread)
        return sent

    threads = []
    yield send
    over.set()
    for thread in threads:
        thread.join()


def assert_same_online(directories, others):
    for one, other in zip(directories, others, strict=True):
        assert_same_run(one, other)
        assert (one / "online.csv").read_bytes() == (other / "online.csv").read_bytes()
        states = [checkpoints.load_latest(d / "checkpoints")[1]["explorer"] for d in (one, other)]
        assert_same_tree(*({"rows": state["rows"]} for state in states))
        assert [{k: v for k, v in s.items() if np.isscalar(v)} for s in states[:1]] == [
            {k: v for k, v in s.items() if np.isscalar(v)} for s in states[1:]
        ]


def reset_seed(seed, episode):
    """The seed that an online episode of a run is reset with."""
    return stream_seed(seed, Stream.RESET, episode)


@pytest.mark.parametrize("kind", ["hang", "exit", "raise", "reward", "observation"])
def test_a_fault_online_loses_nothing(kind, flags, fault, unbroken, tmp_path):
    """It falls in the second run's third episode, inside a chunk; the first run's chunk did not happen either.

    Also if the next start fails on the way back into that episode.
    """
    # With a worker each, the first run's has replied by then.
    flags = flags(tmp_path, *ONLINE, *(["--env_timeout=1", "--eval_workers=2"] if kind == "hang" else []))
    fault(f"{kind} 3 {reset_seed(1, 2)}")
    outcome = call(*flags)
    assert outcome.code == 2, outcome.err
    line = outcome.err.splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in outcome.err
    place = f"gym:faulty_env:Track-v0, step 3 of episode 2 (reset with seed {reset_seed(1, 2)}): "
    assert place in line and "worker_error.txt" in line
    assert (run_dirs(tmp_path)[0] / "worker_error.txt").exists()
    steps = [checkpoints.saved_steps(d / "checkpoints") for d in run_dirs(tmp_path)]
    assert steps[0] == steps[1] and f"from step {steps[0][-1]} on" in line and 10 < steps[0][-1] < 55
    fault(f"{kind} 1 {reset_seed(1, 2)}")
    assert call(*flags).code == 2
    fault("")
    run_main(*flags)
    assert_same_online(run_dirs(tmp_path), unbroken[ONLINE])


def test_sigterm_while_the_simulator_hangs_online(flags, fault, unbroken, tmp_path, sigterm):
    fault(f"hang 2 {reset_seed(0, 3)}")
    csv = tmp_path / "debug" / "gym_faulty_env_Track-v0" / "bc" / "sd1" / "online.csv"
    sent = sigterm(lambda: csv.exists() and csv.read_text().count("\n") > 3)
    outcome = call(*flags(tmp_path, *ONLINE))
    assert outcome.code == 143 and time.monotonic() - sent[0] < 8, outcome.err
    assert "SIGTERM: saving" in outcome.err
    fault("")
    run_main(*flags(tmp_path, *ONLINE))
    assert_same_online(run_dirs(tmp_path), unbroken[ONLINE])


@pytest.mark.parametrize("overlap", ["--eval_overlap", "--noeval_overlap"])
def test_sigterm_while_an_evaluation_hangs(overlap, flags, fault, unbroken, tmp_path, sigterm):
    fault("hang 2")
    csv = tmp_path / "debug" / "gym_faulty_env_Track-v0" / "bc" / "sd1" / "train.csv"
    sent = sigterm(lambda: csv.exists() and "\n20," in csv.read_text())
    outcome = call(*flags(tmp_path, *OFFLINE, overlap))
    assert outcome.code == 143 and time.monotonic() - sent[0] < 8, outcome.err
    fault("")
    run_main(*flags(tmp_path, *OFFLINE, overlap))
    for one, other in zip(run_dirs(tmp_path), unbroken[OFFLINE], strict=True):
        assert_same_run(one, other)


@pytest.mark.parametrize(("kind", "overlap"), [("hang", True), ("exit", True), ("reward", False)])
def test_a_failed_evaluation_is_repeated(kind, overlap, flags, fault, unbroken, tmp_path):
    """The state is saved at the boundary where it is noticed, and the evaluation pending."""
    fault(f"{kind} 4")
    flags = flags(tmp_path, *OFFLINE, f"--eval_overlap={overlap}", "--env_timeout=1")
    outcome = call(*flags)
    line = outcome.err.splitlines()[-1]
    assert outcome.code == 2 and line.startswith("error: evaluation of step 20 failed: gym:faulty_env:Track-v0, step 4")
    for directory in run_dirs(tmp_path):
        (step,) = checkpoints.saved_steps(directory / "checkpoints")
        assert step in (20, 25, 30, 35, 40) and not (directory / "eval.csv").read_bytes()
    fault("")
    run_main(*flags)
    for one, other in zip(run_dirs(tmp_path), unbroken[OFFLINE], strict=True):
        assert_same_run(one, other)


def test_success_of_solved_episodes_alone(flags, fault, tmp_path):
    """Rows that know of no success and rows that do stand in one file; a run is resumed on it."""
    outcome = run_main(*flags(tmp_path, *ONLINE[:3], "--eval_interval=20", "--eval_episodes=4", env="TrackSolved-v0"))
    unknown = "neither info['success'] nor info['is_success'] is reported"
    assert outcome.out.count(unknown) <= 1
    for directory in run_dirs(tmp_path):
        table = read_csv(directory / "online.csv")
        known = np.flatnonzero(np.isfinite(table["success"]))
        solved = table["return"] > -table["length"]
        assert solved.any() and not solved.all()
        assert np.isnan(table["success"][: known[0]]).all() and not solved[: known[0]].any()
        np.testing.assert_array_equal(table["success"][known[0] :], solved[known[0] :])


def test_no_success_at_all(flags, fault, tmp_path):
    outcome = run_main(*flags(tmp_path, *ONLINE[:3], "--eval_interval=20", "--eval_episodes=3", env="TrackNever-v0"))
    assert outcome.out.count("neither info['success'] nor info['is_success'] is reported: return and length only") == 1
    assert "success_rate" not in outcome.out
    for directory in run_dirs(tmp_path):
        for name, column in (("eval", "success_rate"), ("online", "success")):
            table = read_csv(directory / f"{name}.csv")
            assert np.isnan(table[column]).all() and len(table[column]) and np.isfinite(table["step"]).all()


def test_a_file_of_an_earlier_version_has_no_column_for_success(tmp_path, capsys):
    path = tmp_path / "eval.csv"
    path.write_text("step,episodes,return_mean\n5,2.0,1.0\n")
    logger = CsvLogger(path, path.stat().st_size, ("episodes", "return_mean", "success_rate"))
    for step in (10, 15):
        logger.log(step, {"episodes": 2, "return_mean": 0.5, "success_rate": 1.0})
    assert path.read_text() == "step,episodes,return_mean\n5,2.0,1.0\n10,2.0,0.5\n15,2.0,0.5\n"
    assert capsys.readouterr().err == f"warning: {path} has no column for success_rate: left out\n"


def test_columns_are_fixed_when_a_file_is_made(tmp_path):
    logger = CsvLogger(tmp_path / "a.csv", 0, ("one", "two"))
    assert not logger.path.read_bytes()
    logger.log(1, {"one": 1.0})
    logger.log(2, {"two": 2.0})
    assert logger.path.read_text() == "step,one,two\n1,1.0,\n2,,2.0\n"
    with pytest.raises(ValueError, match="three"):
        logger.log(3, {"three": 3.0})


def test_time_limit_of_the_command_line(flags, fault, tmp_path):
    """--max_episode_steps cuts episodes online and in evaluations; cut ones are no failures of the mask."""
    more = ("--eval_interval=0", "--eval_episodes=3", "--max_episode_steps=3")
    run_main(*flags(tmp_path, *ONLINE[:3], *more, env="TrackEndless-v0"))
    for directory in run_dirs(tmp_path):
        assert read_csv(directory / "online.csv")["length"].tolist() == [3] * 16
        assert set(read_csv(directory / "eval.csv")["length_mean"]) == {3}
        rows = checkpoints.load_latest(directory / "checkpoints")[1]["explorer"]["rows"]
        assert rows["terminals"].sum() == 17 and not rows["terminated"].any() and rows["masks"].all()
