"""The command line of main.py: mistakes end in one line, and forks of agents work."""

import fcntl
import json
import os
import socket
import subprocess
import sys
from types import ModuleType

import ml_collections
import numpy as np
import pytest
from tiny_runs import BC, POINTMAZE, call, contents, refused, run_dir, run_main

import online_main
from utils.errors import UserError
from utils.rollout.worker_pool import WorkerError
from utils.run.agent_config import resolve_config, set_field
from utils.run.directory import make_run_specs
from utils.system.files import ROOT


@pytest.fixture
def flags(pointmaze, tmp_path):
    """A tiny run that would succeed."""
    save_dir = f"--save_dir={tmp_path / 'exp'}"
    return (*BC, f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", save_dir, "--offline_steps=4", "--log_interval=2")


WRONG = {
    "--env_name=pointmaze-medum-navigate-singletask-task1-v0": "did you mean pointmaze-medium-navigate-singletask",
    "--env_name=gym:NoSuchTask-v3": "cannot make the gymnasium environment 'NoSuchTask-v3'",
    "--agent=agents/otlq.py": "there is no agent file agents/otlq.py; did you mean agents/otql.py?",
    "--agent=xyz/zzz.py": "there is no agent file xyz/zzz.py; use one of agents/bc.py",
    "--agent.batch_sice=3": "agent bc has no setting 'batch_sice'; did you mean --agent.batch_size?",
    "--agent.xyz=3": "agent bc has no setting 'xyz'; it has actor_hidden_dims, augment, batch_size",
    "--agent.num_seeds=3": "agent bc has no setting 'num_seeds'; did you mean --num_seeds?",
    "--agent.num_samples=3": "agent bc has no setting 'num_samples'; use --agent.best_of_n",
    "--agent.batch_size=many": "it must be of type int",
    "--agent.batch_size=2.5": "it must be of type int",
    "--agent.batch_size=0": "--agent.batch_size=0: it must be at least 1",
    "--agent.batch_size=-8": "it must be at least 1",
    "--agent.batch_size": "it must be of type int",
    "--agent.lr=fast": "it must be of type float",
    "--agent.lr=nan": "it must be a finite number",
    "--agent.lr=inf": "it must be a finite number",
    "--agent.lr=0": "it must be greater than 0",
    "--agent.lr=-1e-3": "it must be greater than 0",
    "--agent.discount=1.5": "it must be between 0 and 1",
    "--agent.tau=nan": "it must be a finite number",
    "--agent.rho=-1": "--agent.rho=-1.0: it must not be negative (agent bc)",
    "--agent.flow_steps=0": "it must be at least 1",
    "--agent.best_of_n=5": "--agent.best_of_n has no effect: BC has no critic (agent bc)",
    "--vary=agent.rho=0,1": "--vary=agent.rho=0,1: rho has no effect: BC has no critic",
    "--agent.actor_hidden_dims=(16,0)": "it must be at least 1",
    "--agent.actor_hidden_dims=wide": "it must be of type list of integers",
    "--agent.window_rule=drp": "use one of pad, drop (agent bc); did you mean --agent.window_rule=drop?",
    "--agent.sparse=true": "write --sparse or --nosparse",
    "--horizon_length=0": "horizon_length",
    "--agent.horizon_length=3": "--horizon_length and --agent.horizon_length are one setting",
    "--num_seeds=0": "num_seeds",
    "--seed=-1": "seed",
    "--offline_steps=0": "offline_steps",
    "--offline_steps=1e6": "offline_steps",
    "--log_interval=0": "log_interval",
    "--eval_episodes=-2": "eval_episodes",
    "--ofline_steps=10": "Unknown command line flag 'ofline_steps'; did you mean --offline_steps?",
    "--nosparce": "Unknown command line flag 'nosparce'; did you mean --nosparse?",
    "--flow_step=3": "Unknown command line flag 'flow_step'; did you mean --agent.flow_steps?",
    "--tau=0.1": "Unknown command line flag 'tau'; did you mean --agent.tau?",
    "--restore_path=exp": "Unknown command line flag 'restore_path'; rerun the same command to resume a run",
    "--dataset_placement=disk": "dataset_placement",
    "--wandb=onlin": "did you mean --wandb=online?",
    "--preset=papre": "unknown preset 'papre'; use one of paper, cpu, none; did you mean --preset=paper?",
    "offline_steps=10": "stray argument 'offline_steps=10'; flags are written --name=value",
    "--vary=agent.roh=1,2": "--vary=agent.roh=1,2: agent bc has no setting 'roh'; did you mean agent.rho?",
    "--vary=agent.lr": "cannot be read; write for example",
    "--vary=agent.batch_size=8,16": "batch_size changes the program",
    "--vary=agent.lr=1e-3,high": "1e-3,high is not a list of numbers",
    "--vary=agent.lr=1e-3,0.001": "names a value twice",
    "--vary=agent.lr=1e-3,-1": "it must be greater than 0",
    "--dataset=nowhere.npz": "there is no file nowhere.npz",
    "--ogbench_dataset_dir=nowhere": "exclude each other",
}


@pytest.mark.check
@pytest.mark.parametrize("flag", WRONG)
def test_wrong_flag(flag, flags):
    assert WRONG[flag] in refused(*flags, flag)


def test_separate_value_and_help(flags):
    assert "--agent.rho=-1.0: it must not be negative" in refused(*flags, "--agent.rho", "-1")
    assert "Unknown command line flag 'sed'" in refused(*flags, "--agent.rho", "--sed=1")
    outcome = call("--help")
    assert outcome.code == 0 and "--offline_steps" in outcome.out and outcome.err == ""
    assert "--agent.lam" in outcome.out
    outcome = call("--help", "--agent=agents/fql.py")
    assert outcome.code == 0 and "--agent.alpha" in outcome.out and "--agent.lam" not in outcome.out
    outcome = call("--agent.help", program=online_main)
    assert outcome.code == 0 and "settings of OpenMicrowave" in outcome.out and "--online_steps" not in outcome.out
    assert "did you mean agents/otql.py?" in refused("--help", "--agent=otlq")


AGENTS = {
    "syntax.py": ("def broken(:\n", "does not import: SyntaxError"),
    "raises.py": ("x = 1\nx / 0\n", "does not import: ZeroDivisionError: division by zero"),
    "import.py": ("import no_such_module\n", "does not import: ModuleNotFoundError"),
    "empty.py": ("Agent, PRESETS = object, {}\n", "does not define get_config"),
}


@pytest.mark.check
@pytest.mark.parametrize("name", AGENTS)
def test_broken_agent_file(name, flags, tmp_path):
    text, message = AGENTS[name]
    (tmp_path / name).write_text(text)
    line = refused(*flags, f"--agent={tmp_path / name}")
    assert message in line and name in line


def test_agent_file_outside_the_folder(flags, tmp_path):
    fork = tmp_path / "forks" / "my_bc.py"
    fork.parent.mkdir()
    text = (ROOT / "agents" / "bc.py").read_text()
    changed = text.replace(
        "    return base.get_config(SETTINGS)\n",
        "    config = base.get_config(SETTINGS)\n    config.tau = 0.25\n    return config\n",
    )
    assert changed != text
    fork.write_text(changed)
    outcome = run_main(*flags, f"--agent={fork}")
    directory = run_dir(tmp_path / "exp")
    assert directory.parent.name == "my_bc" and "settings of pointmaze-medium" in outcome.out
    assert json.loads((directory / "flags.json").read_text())["config"]["tau"] == 0.25


def test_a_network_error_without_a_text_is_named(flags, monkeypatch, tmp_path):
    def silent(*_, **__):
        raise TimeoutError

    monkeypatch.setattr("ogbench.download_datasets", silent)
    without = [flag for flag in flags if not flag.startswith("--dataset=")]
    line = refused(*without, "--dataset_source=download", f"--dataset_dir={tmp_path}")
    assert "(no connection to the server: TimeoutError)" in line


def test_no_data_and_no_network(flags, monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    without = [flag for flag in flags if not flag.startswith("--dataset=")]
    line = refused(*without, "--dataset_source=download", f"--dataset_dir={tmp_path}")
    assert "cannot download pointmaze-medium-navigate-v0 (no connection to the server" in line
    line = refused(*without, f"--dataset_dir={tmp_path}", "--env_name=antmaze-large-navigate-singletask-task1-v0")
    assert "there is no antmaze-large-navigate-v0.npz" in line and "put the file there" in line
    assert "give one with --dataset" in refused(*without, "--env_name=gym:Pendulum-v1")


def test_damaged_data(flags, write_data, pointmaze):
    whole = pointmaze.read_bytes()
    path = write_data("cut.npz")
    path.write_bytes(whole[: len(whole) // 2])
    assert f"{path} is damaged or no .npz file" in refused(*flags, f"--dataset={path}")

    with np.load(pointmaze) as file:
        observations = file["observations"].copy()
        wide = np.concatenate([file["observations"]] * 2, axis=1)
    observations[7, 1] = np.nan
    path = write_data("nan.npz", observations=observations)
    assert "is NaN or infinite (first in row 7)" in refused(*flags, f"--dataset={path}")
    path = write_data("wide.npz", observations=wide)
    assert "has shape [180, 4], the environment needs [N, 2]" in refused(*flags, f"--dataset={path}")
    path = write_data("short.npz", rows=5)
    line = refused(*flags, f"--dataset={path}")
    assert "no episode of the dataset has 5 consecutive transitions (the longest has 4)" in line


def test_save_dir_that_cannot_be_made(flags, tmp_path):
    (tmp_path / "file").write_text("here")
    line = refused(*flags, f"--save_dir={tmp_path / 'file' / 'exp'}")
    assert "Not a directory: cannot write" in line
    assert (tmp_path / "file").read_text() == "here"


def test_directory_of_another_run_is_left_alone(flags, write_data, pointmaze, tmp_path):
    run_main(*flags)
    before = contents(tmp_path / "exp")
    for change, message in {
        "--agent.batch_size=9": "config.batch_size = 8, not 9",
        "--agent.lr=1e-3": "config.lr = 0.0003, not 0.001",
        "--sparse": "sparse = False, not True",
    }.items():
        assert message in refused(*flags, change)
    with np.load(pointmaze) as file:
        path = write_data(pointmaze.name, observations=file["observations"] + 1)
    assert "dataset.checksum" in refused(*flags, f"--dataset={path}", "--offline_steps=8")
    assert contents(tmp_path / "exp") == before


def test_directory_of_a_live_run_is_left_alone(flags, tmp_path):
    directory = tmp_path / "exp" / "debug" / POINTMAZE / "bc" / "sd0"
    directory.mkdir(parents=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert f"another process is working on {directory}; wait for it" in refused(*flags)
    assert contents(directory) == {".lock": b""}


def test_values_of_all_types():
    config = ml_collections.ConfigDict({"flag": False, "size": 0, "sizes": (1, 2), "rate": 1.0, "rule": "a"})
    texts = {"flag": "true", "size": "3", "sizes": "4, 5", "rate": "1e-2", "rule": "b"}
    for field, text in texts.items():
        set_field(config, field, text, "own")
    assert config.to_dict() == {"flag": True, "size": 3, "sizes": (4, 5), "rate": 0.01, "rule": "b"}
    set_field(config, "flag", "", "own")
    with pytest.raises(UserError, match=r"must be of type bool \(agent own\)"):
        set_field(config, "flag", "maybe", "own")


def test_an_integer_may_be_as_small_as_its_default():
    module = ModuleType("own")
    module.PRESETS, module.get_config = {}, lambda: ml_collections.ConfigDict({"delay": 0, "size": 4})
    assert resolve_config(module, "none", "paper", {"delay": "0"})[0].delay == 0
    for field, least in (("delay", 0), ("size", 1)):
        with pytest.raises(UserError, match=f"--agent.{field}=-1: it must be at least {least}"):
            resolve_config(module, "none", "paper", {field: "-1"})


def test_varied_values_never_share_a_directory(tmp_path):
    config = ml_collections.ConfigDict({"lam": 1.0})
    specs = make_run_specs(config, range(2), "agent.lam=0.2,0.12345678,0.12345679", tmp_path, "otql")
    assert len({spec.directory for spec in specs}) == 6
    assert specs[0].directory == tmp_path / "otql_lam=0.2" / "sd0"


def test_wrong_renderer(flags):
    """A renderer that MuJoCo does not know, set by the user."""
    command = [sys.executable, str(ROOT / "main.py"), *flags]
    ended = subprocess.run(command, env=os.environ | {"MUJOCO_GL": "vulkan"}, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: MuJoCo fails with MUJOCO_GL=vulkan")


def test_dead_worker(flags, tmp_path, monkeypatch):
    """An environment that fails ends in one line; all that its worker said is in a file."""

    def failing(*_):
        raise WorkerError("ValueError: no such joint\nTraceback: ...")

    monkeypatch.setattr("utils.rollout.evaluator.Evaluator.evaluate", failing)
    outcome = call(*flags)
    assert outcome.code == 2
    line = outcome.err.splitlines()[-1]
    assert line.startswith("error: evaluation of step 4 failed: ValueError: no such joint (traceback: ")
    assert "Traceback" in (run_dir(tmp_path / "exp") / "worker_error.txt").read_text()
