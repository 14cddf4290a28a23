"""Runs of main.py: what runs share, where the data lie, other tasks, the online phase."""

import re

import numpy as np
import pytest
from tiny_runs import (
    BC,
    OTQL,
    POINTMAZE,
    assert_close_csv,
    assert_same_run,
    assert_same_tree,
    call,
    contents,
    interrupted,
    refused,
    run_dir,
    run_dirs,
    run_main,
)

from envs.tasks import make_env
from utils.output.loggers import read_csv
from utils.run import checkpoints
from utils.run.update_loop import UpdateLoop

# Several runs


@pytest.fixture(scope="module")
def run_flags(pointmaze):
    return (*OTQL, f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", "--offline_steps=20", "--log_interval=10")


@pytest.fixture(scope="module")
def alone(run_flags, tmp_path_factory):
    """Single runs: (seed, lam) → directory."""
    directories = {}
    for seed, lam in [(0, 1.0), (1, 1.0), (0, 0.2)]:
        save_dir = tmp_path_factory.mktemp("alone")
        run_main(*run_flags, f"--save_dir={save_dir}", f"--seed={seed}", f"--agent.lam={lam}")
        directories[seed, lam] = run_dir(save_dir)
    return directories


def test_seeds_side_by_side_equal_seeds_alone(alone, run_flags, tmp_path):
    run_main(*run_flags, f"--save_dir={tmp_path}", "--num_seeds=2", "--agent.lam=1")
    directories = run_dirs(tmp_path)
    assert [path.name for path in directories] == ["sd0", "sd1"]
    for seed, directory in enumerate(directories):
        assert_close_csv(directory, alone[seed, 1.0])
    # The seeds differ by far more than they may differ from the runs alone.
    with pytest.raises(AssertionError):
        assert_close_csv(directories[0], alone[1, 1.0], rtol=1e-2)


def test_varied_runs_equal_runs_alone(alone, run_flags, tmp_path):
    run_main(*run_flags, f"--save_dir={tmp_path}", "--vary=agent.lam=0.2,1")
    directories = run_dirs(tmp_path)
    assert [path.parent.name for path in directories] == ["otql_lam=0.2", "otql_lam=1"]
    for directory, lam in zip(directories, (0.2, 1.0), strict=True):
        assert_close_csv(directory, alone[0, lam])
    with pytest.raises(AssertionError):
        assert_close_csv(directories[0], alone[0, 1.0], rtol=1e-2)


def test_couplings_that_do_not_converge_are_warned_of_once(run_flags, tmp_path):
    flags = ("--agent.max_iterations=1", "--agent.epsilon=0.01", "--num_seeds=2")
    warnings = run_main(*run_flags, *flags, f"--save_dir={tmp_path / 'capped'}").err.splitlines()
    warnings = [line for line in warnings if "stopped at their cap" in line]
    assert len(warnings) == 2 and all(f"sd{seed}, step 10: 100%" in line for seed, line in enumerate(warnings))
    table = read_csv(run_dirs(tmp_path / "capped")[0] / "train.csv")
    assert table["coupling/capped"].tolist() == [1, 1]
    flags = ("--agent.max_iterations=100", "--agent.epsilon=2")
    assert "stopped at their cap" not in run_main(*run_flags, *flags, f"--save_dir={tmp_path / 'met'}").err


@pytest.fixture
def bc_flags(pointmaze, tmp_path):
    return (*BC, f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", f"--save_dir={tmp_path}", "--log_interval=5")


def test_more_seeds_leave_finished_ones_alone(bc_flags, tmp_path):
    run_main(*bc_flags, "--offline_steps=10")
    (first,) = run_dirs(tmp_path)
    before = contents(first)
    outcome = run_main(*bc_flags, "--offline_steps=10", "--num_seeds=2")
    assert f"finished before: {first}\n" in outcome.out
    assert contents(first) == before
    assert read_csv(run_dirs(tmp_path)[1] / "train.csv")["step"].tolist() == [5, 10]


def test_seeds_at_different_steps_are_not_started_over(bc_flags, tmp_path):
    run_main(*bc_flags, "--offline_steps=10")
    (first,) = run_dirs(tmp_path)
    before = contents(first)
    outcome = call(*bc_flags, "--offline_steps=20", "--num_seeds=2")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert re.match("error: .*/sd0 is at step 10 and .*/sd1 at step 0", outcome.err)
    assert contents(first) == before and run_dirs(tmp_path) == [first]


def test_killed_between_the_first_saves_of_two_seeds(bc_flags, monkeypatch, tmp_path):
    save, calls = checkpoints.save, []

    def die_at_the_second(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        save(*arguments)

    flags = (*bc_flags, "--offline_steps=10", "--save_interval=5", "--num_seeds=2")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", die_at_the_second)
        assert call(*flags).code == 130
    assert [len(checkpoints.saved_steps(path / "checkpoints")) for path in run_dirs(tmp_path)] == [1, 0]
    assert "training starts over" in run_main(*flags).err
    for directory in run_dirs(tmp_path):
        assert read_csv(directory / "train.csv")["step"].tolist() == [5, 10]


# Where the data lie


def test_data_on_the_host_give_the_same_numbers(bc_flags, tmp_path):
    for placement in ("host", "device"):
        flags = ("--offline_steps=25", f"--dataset_placement={placement}", f"--run_group={placement}")
        run_main(*bc_flags, *flags)
    on_device, on_host = run_dirs(tmp_path)
    assert_close_csv(on_host, on_device, rtol=1e-5)


def test_shards_take_turns_and_resume_exactly(pointmaze, write_data, interrupt_at, monkeypatch, tmp_path):
    lengths = {"a": 60, "b": 120, "c": 180}
    for name, rows in lengths.items():
        path = write_data(f"shards/{name}.npz", rows=rows)
    write_data("shards/a-val.npz", rows=30)
    used, set_data = [], UpdateLoop.set_data
    monkeypatch.setattr(
        UpdateLoop, "set_data", lambda self, data: (used.append(len(data["rewards"])), set_data(self, data))
    )
    flags = (*BC, f"--env_name={POINTMAZE}", f"--ogbench_dataset_dir={path.parent}", "--dataset_replace_interval=10")
    flags = (*flags, "--offline_steps=40", "--log_interval=5")

    run_main(*flags, f"--save_dir={tmp_path / 'unbroken'}")
    assert [n for i, n in enumerate(used) if used[i - 1 : i] != [n]] == [60, 120, 180, 60]
    used.clear()
    interrupt_at(25)
    interrupted(*flags, f"--save_dir={tmp_path / 'broken'}")
    run_main(*flags, f"--save_dir={tmp_path / 'broken'}")
    assert [n for i, n in enumerate(used) if used[i - 1 : i] != [n]] == [60, 120, 180, 60]
    assert_same_run(run_dir(tmp_path / "broken"), run_dir(tmp_path / "unbroken"))

    write_data("shards/d.npz", rows=60)
    outcome = call(*flags, f"--save_dir={tmp_path / 'broken'}", "--offline_steps=50")
    assert outcome.code == 2 and "dataset.shards = 3, not 4" in outcome.err


# Tasks whose data cannot be collected


def random_play(env_name, path, episodes=2, steps=120):
    """Writes what a random policy does, in the format of OGBench's files."""
    env = make_env(env_name)
    rows = {name: [] for name in ("observations", "actions", "terminals", "qpos", "qvel")}
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        env.action_space.seed(episode)
        for step in range(steps):
            action, data = env.action_space.sample(), env.unwrapped.data
            row = (observation, action, step == steps - 1, data.qpos.copy(), data.qvel.copy())
            for column, value in zip(rows.values(), row, strict=True):
                column.append(value)
            observation, *_ = env.step(action)
    np.savez(path, **{name: np.asarray(column, np.float32) for name, column in rows.items()})


@pytest.mark.parametrize("domain", ["antmaze-large", "humanoidmaze-medium"])
def test_locomotion_trains_from_an_official_file(domain, interrupt_at, tmp_path):
    env_name = f"{domain}-navigate-singletask-task1-v0"
    (tmp_path / "data").mkdir()
    random_play(env_name, tmp_path / "data" / f"{domain}-navigate-v0.npz")
    flags = (*BC, f"--env_name={env_name}", f"--dataset_dir={tmp_path / 'data'}", f"--save_dir={tmp_path / 'exp'}")
    flags = (*flags, "--offline_steps=6", "--log_interval=2")
    interrupt_at(4)
    outcome = interrupted(*flags)
    assert f"settings of {domain}" in outcome.out and "OGBench's file" in outcome.out
    assert "resuming at step 4" in run_main(*flags).out
    directory = run_dir(tmp_path / "exp")
    assert read_csv(directory / "train.csv")["step"].tolist() == [2, 4, 6]
    evaluation = read_csv(directory / "eval.csv")
    assert evaluation["success_rate"] == [0] and evaluation["length_mean"] == [2000 if "humanoid" in domain else 1000]


# Online


@pytest.fixture
def online_flags(pointmaze):
    """Ten updates, then 300 environment steps in which episodes end, with updates from step 20 on."""
    steps = ("--offline_steps=10", "--online_steps=300", "--start_training=20", "--log_interval=50")
    return (*BC, f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", *steps, "--save_interval=70", "--num_seeds=2")


@pytest.mark.parametrize("balanced", [pytest.param((), marks=pytest.mark.check), ("--balanced_sampling",)])
def test_online_resumes_exactly(balanced, online_flags, interrupt_at, tmp_path):
    """Interrupted in an episode and between two, the run ends in the same agent, rows and experience."""
    flags = (*online_flags, *balanced)
    run_main(*flags, f"--save_dir={tmp_path / 'unbroken'}")
    broken = (*flags, f"--save_dir={tmp_path / 'broken'}")
    for step in (100, 250):
        interrupt_at(step)
        interrupted(*broken)
    run_main(*broken)
    for one, other in zip(run_dirs(tmp_path / "unbroken"), run_dirs(tmp_path / "broken"), strict=True):
        assert_same_run(one, other)
        states = [checkpoints.load_latest(d / "checkpoints")[1]["explorer"] for d in (one, other)]
        assert_same_tree(*({"explorer": state["rows"]} for state in states))
        assert states[0]["transitions"] == 300
        assert read_csv(one / "timing.csv")["updates"].sum() == 10 + 280


def test_evaluations_do_not_touch_what_is_learnt_online(online_flags, tmp_path):
    """Nor the environment that is learnt from."""
    for name, interval in (("never", 0), ("often", 30)):
        run_main(*online_flags, f"--save_dir={tmp_path / name}", f"--eval_interval={interval}", "--eval_episodes=2")
    for one, other in zip(run_dirs(tmp_path / "never"), run_dirs(tmp_path / "often"), strict=True):
        assert len(read_csv(other / "eval.csv")["step"]) > len(read_csv(one / "eval.csv")["step"])
        for name in ("train.csv", "online.csv"):
            assert (one / name).read_bytes() == (other / name).read_bytes()
        states = [checkpoints.load_latest(d / "checkpoints")[1] for d in (one, other)]
        assert_same_tree(*(state["agent"] for state in states))
        assert_same_tree(*({"rows": state["explorer"]["rows"]} for state in states))


def test_online_phase_of_another_length(online_flags, tmp_path):
    """A run interrupted online cannot go on with other offline steps: it says so."""
    run_main(*online_flags, f"--save_dir={tmp_path}")
    changed = [flag.replace("offline_steps=10", "offline_steps=400") for flag in online_flags]
    assert "in another phase; give the same steps" in refused(*changed, f"--save_dir={tmp_path}")
