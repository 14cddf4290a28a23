"""Runs of main.py that are interrupted, damaged or extended."""

import random
import shutil
import signal
import time

import pytest
from tiny_runs import (
    BC,
    OTQL,
    POINTMAZE,
    assert_same_run,
    call,
    contents,
    interrupted,
    run_dir,
    run_dirs,
    run_main,
)

from utils.output.loggers import read_csv
from utils.run import checkpoints, evaluation_queue

EVALUATION = "evaluation: 0/"


@pytest.fixture(scope="module")
def otql_flags(pointmaze):
    return (
        *OTQL,
        f"--env_name={POINTMAZE}",
        f"--dataset={pointmaze}",
        "--offline_steps=3000",
        "--log_interval=50",
        "--eval_interval=1000",
        "--save_interval=100",
    )


@pytest.fixture(scope="module")
def unbroken(otql_flags, tmp_path_factory):
    """The directory of an OTQL run that nothing disturbed."""
    save_dir = tmp_path_factory.mktemp("unbroken")
    run_main(*otql_flags, f"--save_dir={save_dir}")
    return run_dir(save_dir)


def wait_for(process, condition, seconds=120):
    """Waits until `condition` holds, while the process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before the moment to disturb it"
        assert time.monotonic() < end, "the moment to disturb the run did not come"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def moments():
    """Delays of the kills: random, the same in each session."""
    return random.Random(0)


def newest(save_dir):
    """The last step with a checkpoint below `save_dir`, -1 if there is none."""
    return max((int(path.stem.removeprefix("step_")) for path in save_dir.rglob("step_*.ckpt")), default=-1)


def test_killed_and_terminated_run_goes_on_to_the_same_end(unbroken, otql_flags, start, moments, tmp_path):
    save_dir = tmp_path / "exp"
    flags = (*otql_flags, f"--save_dir={save_dir}")

    for _ in range(2):  # SIGKILL at any moment.
        before = newest(save_dir)
        process, _ = start(*flags)
        wait_for(process, lambda before=before: newest(save_dir) > before)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert newest(save_dir) > before

    process, log = start(*flags)  # SIGKILL during an evaluation.
    wait_for(process, lambda: EVALUATION in log.read_text())
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert "evaluation: 1/1" not in log.read_text()

    before = newest(save_dir)
    process, log = start(*flags)  # SIGTERM.
    wait_for(process, lambda: newest(save_dir) > before)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert log.read_text().endswith("interrupted by SIGTERM; rerun the same command to resume\n")
    assert "Traceback" not in log.read_text()

    stopped = newest(save_dir)
    assert f"resuming at step {stopped}\n" in run_main(*flags).out
    assert_same_run(run_dir(save_dir), unbroken)


def test_sigterm_saves_where_it_falls(unbroken, otql_flags, interrupt_at, tmp_path):
    flags = (*otql_flags, f"--save_dir={tmp_path}", "--save_interval=0")
    interrupt_at(250)
    outcome = interrupted(*flags)
    assert "SIGTERM: saving" in outcome.err
    assert checkpoints.valid_steps(run_dir(tmp_path) / "checkpoints") == [250]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run_main(*flags)
    assert_same_run(run_dir(tmp_path), unbroken)


def test_signal_during_an_evaluation_repeats_only_that(unbroken, otql_flags, monkeypatch, tmp_path):
    evaluate = evaluation_queue.Evaluator.evaluate

    def evaluate_and_raise(self, policy, episodes, seed, progress):
        monkeypatch.setattr(evaluation_queue.Evaluator, "evaluate", evaluate)
        signal.raise_signal(signal.SIGTERM)
        return evaluate(self, policy, episodes, seed, progress)

    monkeypatch.setattr(evaluation_queue.Evaluator, "evaluate", evaluate_and_raise)
    flags = (*otql_flags, f"--save_dir={tmp_path}")
    interrupted(*flags)
    directory = run_dir(tmp_path)
    assert checkpoints.saved_steps(directory / "checkpoints")[-1] == 1000
    assert read_csv(directory / "train.csv")["step"][-1] == 1000 and not (directory / "eval.csv").read_bytes()
    assert "resuming at step 1000" in run_main(*flags).out
    assert_same_run(directory, unbroken)


def test_evaluations_overlap_with_training_and_change_nothing(unbroken, otql_flags, tmp_path):
    run_main(*otql_flags, f"--save_dir={tmp_path}", "--noeval_overlap")
    assert_same_run(run_dir(tmp_path), unbroken)


@pytest.mark.parametrize("at", [1000, 1250])
def test_signal_during_an_overlapping_evaluation(at, unbroken, otql_flags, slow_evaluation, interrupt_at, tmp_path):
    """The evaluation of step 1000 is owed by the checkpoint at that step or at a later one, in every lane."""
    flags = (*otql_flags, f"--save_dir={tmp_path}", "--num_seeds=2", "--save_interval=0")
    slow_evaluation()
    interrupt_at(at)
    interrupted(*flags)
    for directory in run_dirs(tmp_path):
        assert checkpoints.valid_steps(directory / "checkpoints") == [at]
        assert not (directory / "eval.csv").read_bytes()
    run_main(*flags)
    directory = run_dirs(tmp_path)[0]
    assert list(read_csv(directory / "eval.csv")["step"]) == [1000, 2000, 3000]
    assert_same_run(directory, unbroken)


def test_only_runs_that_lack_a_row_are_evaluated_again(unbroken, otql_flags, monkeypatch, tmp_path):
    """Killed between the runs' saves of a step at which the rows have just been written."""
    flags = (*otql_flags, f"--save_dir={tmp_path}", "--num_seeds=2", "--save_interval=0", "--offline_steps=1000")
    run_main(*flags)
    late = run_dirs(tmp_path)[1]
    path = checkpoints.path_of(late / "checkpoints", 1000)
    state = checkpoints.load(path)
    train = {"train": state["csv"]["train"], "timing": state["csv"]["timing"]}
    checkpoints.save(late / "checkpoints", 1000, state | {"evaluated": False, "csv": train | {"eval": 0}})
    for directory in run_dirs(tmp_path):
        (directory / "summary.json").unlink()
    run_main(*flags)
    for directory in run_dirs(tmp_path):
        assert list(read_csv(directory / "eval.csv")["step"]) == [1000]


def test_killed_during_an_overlapping_evaluation(unbroken, otql_flags, start, tmp_path):
    flags = (*otql_flags, f"--save_dir={tmp_path}")
    process, log = start(*flags)
    wait_for(process, lambda: EVALUATION in log.read_text() and newest(tmp_path) > 1000)
    process.kill()
    process.wait()
    run_main(*flags)
    assert_same_run(run_dir(tmp_path), unbroken)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_bit])
def test_damaged_newest_checkpoint(damage, unbroken, otql_flags, tmp_path):
    (root,) = (path for path in unbroken.parents if (path / "debug").is_dir())
    shutil.copytree(root, tmp_path / "exp")
    directory = tmp_path / "exp" / unbroken.relative_to(root)
    (directory / "summary.json").unlink()  # The run was killed before its end.
    path = directory / "checkpoints" / "step_0000003000.ckpt"
    damage(path)
    outcome = run_main(*otql_flags, f"--save_dir={tmp_path / 'exp'}")
    (line,) = (line for line in outcome.err.splitlines() if "checkpoint" in line)
    assert str(path) in line and "step 2900 is used instead" in line
    assert "resuming at step 2900" in outcome.out
    assert_same_run(directory, unbroken)


def test_finished_run_says_so_and_changes_nothing(unbroken, otql_flags):
    (root,) = (path for path in unbroken.parents if (path / "debug").is_dir())
    before = contents(root)
    outcome = run_main(*otql_flags, f"--save_dir={root}")
    assert outcome.out == f"finished before: {unbroken}; nothing to do\n" and outcome.err == ""
    assert contents(root) == before


def test_a_run_is_extended_but_never_cut_short(pointmaze, interrupt_at, tmp_path):
    flags = (*BC, f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", f"--save_dir={tmp_path}", "--log_interval=5")
    run_main(*flags, "--offline_steps=20")
    interrupt_at(30)
    interrupted(*flags, "--offline_steps=40")
    directory = run_dir(tmp_path)
    before = contents(directory)
    outcome = call(*flags, "--offline_steps=25")
    assert outcome.code == 2 and "at step 30 already; give 30 steps or more in all" in outcome.err
    assert contents(directory).keys() == before.keys()
    assert all(before[name] == data for name, data in contents(directory).items() if name != "flags.json")
    run_main(*flags, "--offline_steps=40")
    assert read_csv(directory / "train.csv")["step"].tolist() == list(range(5, 45, 5))
    assert read_csv(directory / "eval.csv")["step"].tolist() == [20, 40]
