"""Sweeps: what is started, what is left out, and that a run that was cut short ends as an unbroken one."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jaxtyping
import pytest
import slurm
from fork_env import write_demonstrations
from tiny_runs import BC, POINTMAZE, assert_same_run, call, refused, run_main

from experiments.sweep import command as sweep
from experiments.sweep.grids import GRIDS, PROGRAMS
from experiments.sweep.jobs import Job, run_here
from utils.run import checkpoints
from utils.run.flags import define_flags
from utils.system.files import ROOT, read_json
from utils.system.locks import exclusive_lock

SHARED = (*BC, "--log_interval=2", "--save_interval=2")


@pytest.fixture
def write_grid(pointmaze, tmp_path):
    """Returns a function that writes a grid of tiny runs, two seeds of each setting, as a file; returns its flags."""

    def write(flags=("--offline_steps=4",), settings=None, seeds=2, env_name=POINTMAZE, data=pointmaze):
        given = [flag for flag in SHARED if not flag.startswith("--agent=")]
        path = tmp_path / "small.py"
        path.write_text(
            "from experiments.sweep.grids import Grid\n"
            f"GRID = Grid(('bc',), ('{env_name}',), {seeds}, flags={(*given, f'--dataset={data}', *flags)},\n"
            f"            settings={settings or {'': ()}})\n"
        )
        return f"--grid={path}", f"--save_dir={tmp_path / 'exp'}"

    return write


def run_sweep(*flags):
    return call(*flags, program=sweep)


def states(*flags):
    """Job → state, from `status`, of those that are not done."""
    outcome = run_sweep(*flags, "status")
    assert outcome.code == 0, outcome.err
    return dict(re.findall(r"^(\S+-\S+) +(waiting|running|queued|stopped|failed)", outcome.out, re.MULTILINE))


@pytest.mark.parametrize("name", GRIDS)
def test_declared_grids_are_sound(name, tmp_path):
    """Every command's flags are known to its program, and names and directories are each job's own."""
    sweep.FLAGS.unparse_flags()
    sweep.FLAGS(["sweep", f"--save_dir={tmp_path}", "--seeds=2"])
    jobs = sweep.make_jobs(name, GRIDS[name])
    assert len({job.name for job in jobs}) == len(jobs)
    directories = [directory for job in jobs for directory in job.directories]
    assert len(set(directories)) == len(directories)
    known = set(define_flags(PROGRAMS[GRIDS[name].program]))
    for command in {tuple(re.sub(r"=.*", "", text) for text in job.command[1:]) for job in jobs}:
        assert {text.removeprefix("--") for text in command if not text.startswith("--agent.")} <= known


def test_table_1_is_ten_methods_on_forty_tasks(tmp_path):
    out = run_sweep("--grid=table1", "--dry_run", f"--save_dir={tmp_path}", "--seeds_per_job=4").out
    lines = out.splitlines()
    assert len(lines) == 10 * 40 * 3 and all("--num_seeds=4" in line for line in lines)
    wanted = "--agent=agents/otql.py --env_name=cube-double-play-singletask-task2-v0 --seed=8 --num_seeds=4"
    assert sum(wanted in line for line in lines) == 1
    assert not list(tmp_path.rglob("*.json"))


def test_local_sweep_finishes_and_leaves_out_what_is_done(write_grid, tmp_path):
    """A failure is shown with its last line and tried again; what is done is not started again."""
    flags = write_grid(settings={"": (), "lr": ("--agent.lr=1e-3",)})
    wrong = (*flags, "--flags=start_from=nowhere")
    outcome = run_sweep(*wrong)
    assert outcome.code == 2 and "4 of 4 jobs did not finish" in outcome.err
    failed = run_sweep(*wrong, "status").out
    assert "4 failed" in failed and failed.count("/nowhere is not the directory of a run") == 4

    outcome = run_sweep(*flags, "--jobs=2")
    assert outcome.code == 0, outcome.err
    made = sorted(str(path.parent.relative_to(tmp_path / "exp")) for path in tmp_path.rglob("summary.json"))
    assert made == [f"{group}/{POINTMAZE}/bc/sd{seed}" for group in ("small-lr", "small") for seed in (0, 1)]
    assert states(*flags) == {} and "4 done" in run_sweep(*flags, "status").out
    assert "4 done; 0 to start" in run_sweep(*flags).err
    assert "| " in run_sweep(*flags, "report").out
    assert "Seeds per score: 2." in run_sweep(*flags, "report").out
    assert "Seeds per score: 1." in run_sweep(*flags, "--seeds=1", "report").out

    # What is done with other settings is not taken for done.
    changed = (*flags, "--flags=agent.batch_size=9")
    assert "bc/sd0 holds a run with config.batch_size = 8, not 9; use another --save_dir" in refused(
        *changed, program=sweep
    )
    assert "4 other" in run_sweep(*changed, "status").out


def test_interrupted_sweep_goes_on(write_grid, pointmaze, tmp_path):
    """SIGTERM lets the jobs save; started again, the run ends as an unbroken one."""
    own = ("--offline_steps=20000", "--save_interval=500", "--log_interval=500")
    flags = write_grid(own, seeds=1)
    program = subprocess.Popen([sys.executable, "-m", "experiments.sweep", *flags], cwd=ROOT)
    directory = tmp_path / "exp" / "small" / POINTMAZE / "bc" / "sd0"
    wait_for(lambda: checkpoints.saved_steps(directory / "checkpoints"))
    assert states(*flags) == {f"bc-{POINTMAZE}-sd0": "running"}
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=60) == 128 + signal.SIGTERM
    assert states(*flags) == {f"bc-{POINTMAZE}-sd0": "stopped"}
    assert run_sweep(*flags).code == 0
    unbroken = tmp_path / "unbroken"
    run_main(*SHARED, *own, f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", f"--save_dir={unbroken}")
    assert_same_run(directory, unbroken / "debug" / POINTMAZE / "bc" / "sd0")


def test_refusals(write_grid, tmp_path, monkeypatch):
    flags = write_grid()
    for wrong, text in [
        (("--grid=nothing",), "none of table1"),
        (("--agents=otql",), "the grid has no otql; it has bc"),
        (("--flags=offline_steps=many",), "--offline_steps=many"),
        (("--flags=offline_steps=0",), "--offline_steps=0"),
        (("--flags=ofline_steps=4",), "Unknown command line flag 'ofline_steps'"),
        (("--flags=agent.lm=3",), "no setting 'lm'"),
        (("--flags=env_name=cube-single-play-singletask-task1-v0",), "--env_name is set by the sweep; leave it out"),
        (("--flags=--seed=7",), "--seed is set by the sweep; leave it out"),
        (("--partition=gpu",), "--partition is for --backend=slurm; this is local"),
        (("--backend=slurm", "--jobs=2"), "--jobs is for --backend=local; this is slurm"),
        (("--save_dir=/proc/nowhere",), "cannot write /proc/nowhere"),
        (("stop",), "'stop' is none of start, status, report"),
    ]:
        assert text in refused(*flags, *wrong, program=sweep)
    (tmp_path / "empty.py").write_text("x = 1\n")
    assert "defines no GRID" in refused(f"--grid={tmp_path / 'empty.py'}", program=sweep)
    varied = write_grid(settings={"lr": ("--agent.lr=1e-3",), "tau": ("--vary=agent.tau=0.1,0.2",)})
    for name in ("lr", "tau"):
        assert "the grid varies this setting" in refused(*varied, f"--flags=agent.{name}=1", program=sweep)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # Outside tests no types are checked.
    twice = "GRID = Grid(('bc', '{}/agents/bc.py'), ('{}',), 1)"
    for grid, text in [
        ("GRID = Grid((), ('a',), 1)", "must not be empty"),
        ("GRID = Grid(('bc',), ('a',), 0)", "seeds is 0"),
        ("GRID = Grid(('bc',), ('a',), 1, flags=('--offline_steps=5'))", "ends in a comma"),
        ("GRID = Grid(('bc',), ('a',), 1, settings={'a': '--agent.lr=1e-3'})", "ends in a comma"),
        ("GRID = Grid(('bc',), ('a',), 1, program='mine.py')", "program is mine.py"),
        (twice.format(ROOT, POINTMAZE), "2 of the grid's commands would write exp/wrong"),
    ]:
        (tmp_path / "wrong.py").write_text(f"from experiments.sweep.grids import Grid\n{grid}\n")
        assert text in refused(f"--grid={tmp_path / 'wrong.py'}", "--dry_run", program=sweep)


@pytest.mark.check
def test_dry_run_waits_for_nobody_and_can_be_pasted(write_grid, tmp_path):
    grid, _ = write_grid()
    flags = grid, f"--save_dir={tmp_path / 'my runs'}", "--dry_run"
    with exclusive_lock(tmp_path / "my runs" / "small" / ".sweep.lock"):
        lines = run_sweep(*flags).out.splitlines()
    assert len(lines) == 2 and all(f"--save_dir={tmp_path / 'my runs'}" in shlex.split(line) for line in lines)


def test_a_queue_that_does_not_answer_is_not_an_empty_one(write_grid, tmp_path, monkeypatch):
    flags = (*write_grid(), "--backend=slurm")
    name = f"bc-{POINTMAZE}-sd0"
    (folder := tmp_path / "exp" / "small" / ".sweep").mkdir(parents=True)
    (folder / "submitted.json").write_text(json.dumps({name: "12_0"}))
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    for script, code in (("echo 12_0", 0), ("echo Socket timed out >&2; exit 1", 2)):
        squeue.write_text(f"#!/bin/sh\n{script}\n")
        squeue.chmod(0o755)
        outcome = run_sweep(*flags, "--dry_run")
        assert outcome.code == code, outcome
        assert ("1 queued, 1 waiting; 1 to start" if code == 0 else "Socket timed out; try again") in outcome.err


@pytest.mark.parametrize(
    "slots,gpus,expected", [(2, ["4", "5"], ["4 -", "5 -"]), (3, ["4", "5"], ["4 0.45", "5 0.45"])]
)
def test_gpus_are_assigned_and_shared(slots, gpus, expected, tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION', '-'))"
    jobs = [Job(str(number), ("-c", code), tmp_path, (), 1, ()) for number in range(2)]
    assert len(list(run_here(jobs, slots, gpus))) == 2
    assert [job.log.read_text().strip() for job in jobs] == expected


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.5)


def start(*flags):
    """The sweep as a program: submitit resets Python's logging, which pytest's capture does not survive."""
    command = [sys.executable, "-m", "experiments.sweep", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)


@pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing() or "Slurm is there")
def test_slurm_array(write_grid, tmp_path, monkeypatch):
    """Six jobs: one is cancelled and submitted again, one is cut by its time limit and put back; all end as unbroken.

    Slurm asks for a checkpoint 10 to 40 s after the start of a job with a minute to live, less 20 s to save in.
    """
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    online, data = {"cut": 240, "cancelled": 80}, write_demonstrations(tmp_path / "fork.npz")
    settings = {name: (f"--online_steps={online.get(name, 0)}",) for name in ("a", "b", "c", "d", *online)}
    own = ("--offline_steps=4", "--start_training=10", "--horizon_length=2", "--save_interval=10")
    flags = (*write_grid(own, settings, 1, "gym:fork_env:Fork-v0", data), "--backend=slurm", "--minutes=1")
    flags += ("--signal_seconds=20", "--cpus_per_job=1")
    name, place = "bc-gym_fork_env_Fork-v0-{}-sd0", Path("gym_fork_env_Fork-v0", "bc", "sd0")
    sweep_dir = tmp_path / "exp" / "small" / ".sweep"

    with slurm.running(tmp_path / "slurm") as environment:
        monkeypatch.setenv("SLURM_CONF", environment["SLURM_CONF"])
        monkeypatch.setenv("FORK_SECONDS", "0.25")  # so that `cut` lasts a minute
        assert "submitted 6 jobs" in start(*flags).stdout
        again = start(*flags)  # Some of the six may run by then, or be done.
        assert "; 0 to start" in again.stderr and "submitted" not in again.stdout
        wait_for(lambda: checkpoints.saved_steps(tmp_path / "exp" / "small-cancelled" / place / "checkpoints"))
        subprocess.run(["scancel", read_json(sweep_dir / "submitted.json")[name.format("cancelled")]], check=True)
        # What was cancelled is submitted again, unless the time limit's signal came first and Slurm put it back itself.
        wait_for(lambda: start(*flags).returncode == 0 and not states(*flags), 600)
        monkeypatch.delenv("FORK_SECONDS")
    logs = "".join(path.read_text() for path in (sweep_dir / "slurm").glob("*log.*"))
    assert "Requeued job" in logs and "CANCELLED AT" in logs
    for setting, steps in online.items():
        save_dir = tmp_path / f"unbroken_{setting}"
        flags = (*SHARED, *own, "--env_name=gym:fork_env:Fork-v0", f"--dataset={data}", f"--online_steps={steps}")
        run_main(*flags, f"--save_dir={save_dir}")
        assert_same_run(tmp_path / "exp" / f"small-{setting}" / place, save_dir / "debug" / place)
        assert "resuming at step" in (sweep_dir / f"{name.format(setting)}.log").read_text()
