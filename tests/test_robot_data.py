"""Data without an environment, and runs that start from what another has learnt."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny_runs import BC, OTQL, assert_same_run, assert_same_tree, call, refused, run_dir, run_main

import online_main
from utils.output.loggers import read_csv
from utils.run.agent_config import resolve_config
from utils.run.agent_files import load_agent
from utils.run.loading import load_run
from utils.run.update_loop import UpdateLoop


@pytest.fixture(scope="module")
def robot_data(tmp_path_factory):
    """Twenty episodes of 12 rows, half of them solved; observations of 3 numbers, actions of 2."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("robot") / "robot.npz"
    last, solved = np.arange(240) % 12 == 11, np.repeat(np.arange(20) % 2 == 0, 12)
    np.savez(
        path,
        observations=rng.normal(size=(240, 3)).astype(np.float32),
        actions=rng.uniform(-1, 1, (240, 2)).astype(np.float32),
        rewards=(last & solved) - 1.0,
        terminals=(last & solved) * 1.0,
        timeouts=(last & ~solved) * 1.0,
    )
    return path


def flags_of(agent, robot_data, save_dir):
    return *agent, "--env_name=robot:try", f"--dataset={robot_data}", f"--save_dir={save_dir}", "--offline_steps=20"


@pytest.fixture(scope="module")
def learnt(robot_data, tmp_path_factory):
    """Runs of BC and of OTQL on the robot's data."""
    directories = {}
    for name, agent in (("bc", BC), ("otql", OTQL)):
        save_dir = tmp_path_factory.mktemp(name)
        run_main(*flags_of(agent, robot_data, save_dir))
        directories[name] = run_dir(save_dir)
    return directories


def test_data_without_environment_are_trained_on(learnt):
    """A run ends without an evaluation, with the settings of the paper's Tables 7 and 8."""
    for directory in learnt.values():
        assert load_run(directory)[2] == 20
        assert not (directory / "eval.csv").read_bytes()
        assert read_csv(directory / "train.csv")["step"][-1] == 20
    config = resolve_config(load_agent("agents/otql.py"), "robot", "paper", {})[0]
    assert (config.lam, config.w_max, config.best_of_n, config.flow_steps) == (0.75, 10, 5, 3)
    assert (config.num_qs, config.rho, config.batch_size, config.lr) == (2, 0, 256, 3e-4)


@pytest.mark.parametrize("source", ["bc", "otql"])
def test_start_is_what_another_run_has_learnt(source, learnt, robot_data, tmp_path, monkeypatch):
    """The flow of another agent, in both places; parameters, averages and Adam's state of the same agent."""
    started = []
    run = UpdateLoop.run

    def note(self, agents, *rest):
        started.append(jax.device_get(agents))
        return run(self, agents, *rest)

    monkeypatch.setattr(UpdateLoop, "run", note)
    start = f"--start_from={learnt[source]}"
    run_main(*flags_of(OTQL, robot_data, tmp_path), start, "--num_seeds=2", "--seed=7")
    agents = started[0]
    other, _, _ = load_run(learnt[source])
    for index in range(2):
        own = jax.tree.map(lambda leaf, i=index: np.asarray(leaf)[i], agents)
        if source == "bc":
            assert_same_tree(own.params["flow"], other.targets["flow"])
            assert_same_tree(own.targets["flow"], other.targets["flow"])
            assert jax.tree.leaves(own.opt_state)[0] == 0
        else:
            assert_same_tree(own.params, other.params)
            assert_same_tree(own.targets, other.targets)
            pairs = zip(jax.tree.leaves(own.opt_state), jax.tree.leaves(other.opt_state), strict=True)
            assert all(np.array_equal(a, b) for a, b in pairs)
        assert own.step == 0 and not np.array_equal(own.key, other.key)


def test_begun_run_goes_on_without_its_source(learnt, robot_data, tmp_path, interrupt_at):
    """Whatever has become of the run it started from; but a new one needs it."""
    source = shutil.copytree(learnt["bc"], tmp_path / "source")
    save_dir, unbroken = tmp_path / "exp", tmp_path / "unbroken"
    flags = (*flags_of(OTQL, robot_data, save_dir), f"--start_from={source}", "--log_interval=10")
    run_main(*flags, f"--save_dir={unbroken}")
    interrupt_at(10)
    assert call(*flags).code == 143
    shutil.rmtree(source)
    assert "not the directory of a run" in refused(*flags, "--run_group=other")
    run_main(*flags)
    assert_same_run(run_dir(save_dir / "debug"), run_dir(unbroken))


def test_refusals(learnt, robot_data, tmp_path):
    """What cannot be done ends in one line."""
    robot = flags_of(OTQL, robot_data, tmp_path)
    assert "no simulation" in refused(*robot, "--video_episodes=1")
    assert "no simulation" in refused(*robot, "--online_steps=10")
    online = ("--agent=agents/otql.py", "--env_name=robot:try", f"--dataset={robot_data}", f"--save_dir={tmp_path}")
    assert "no simulation" in refused(*online, program=online_main)
    assert "needs a name" in refused(*BC, "--env_name=robot:a/b")
    assert "no dataset of its own" in refused(*BC, "--env_name=robot:try", f"--save_dir={tmp_path}")
    start = f"--start_from={learnt['otql']}"
    assert "other networks" in refused(*robot, start, "--agent.num_qs=3", "--run_group=a")
    assert "they must be equal" in refused(*robot, start, "--horizon_length=2", "--run_group=b")
    assert "not the directory of a run" in refused(*robot, f"--start_from={tmp_path}", "--run_group=c")
    qsm = [flag for flag in robot if "flow_steps" not in flag and "max_iter" not in flag]
    assert "this agent has no flow" in refused(*qsm, start, "--agent=agents/qsm.py", "--run_group=d")


def test_the_card_of_the_data_is_shown_and_kept(robot_data, tmp_path):
    """Runs recorded without one go on."""
    flags = flags_of(BC, robot_data, tmp_path)
    out = run_main(*flags).out
    assert "solved   10 of 20 episodes" in out and "ends     10 truly terminated, 10 cut by a time limit" in out
    assert "unused   10 transitions: no next observation recorded (sum of their rewards -10)" in out
    path = run_dir(tmp_path) / "flags.json"
    settings = json.loads(path.read_text())
    card = settings.pop("data_card")
    assert (card["solved"], card["units"], card["lengths"]) == (10, "scaled", [11, 11.5, 12])
    path.write_text(json.dumps(settings))
    assert "resuming at step 20" in run_main(*flags, "--offline_steps=30").out
    settings = json.loads(path.read_text())
    assert settings["data_card"] == card and settings["flags"]["dataset_actions"] == "auto"


def test_data_that_look_wrong_are_warned_of_or_rejected(robot_data, tmp_path):
    with np.load(robot_data) as file:
        arrays = dict(file)
    np.savez(tmp_path / "equal.npz", **arrays | {"rewards": np.full(240, 0.5)})
    outcome = run_main(*flags_of(BC, tmp_path / "equal.npz", tmp_path / "equal"))
    assert outcome.err.count("warning: all rewards") == 1
    arrays["masks"] = arrays["terminals"]
    np.savez(tmp_path / "inverse.npz", **arrays)
    assert "'masks'" in refused(*flags_of(BC, tmp_path / "inverse.npz", tmp_path / "inverse"))
    raw = (*flags_of(BC, robot_data, tmp_path / "raw"), "--dataset_actions=raw")
    assert "environment's bounds" in refused(*raw)


def test_shards_are_in_the_units_of_the_first(tmp_path, monkeypatch):
    """The second one alone could be of either."""
    (tmp_path / "shards").mkdir()
    random = np.random.default_rng(0)
    for name, largest in (("a", 2.0), ("b", 0.5)):
        arrays = {"observations": random.normal(size=(40, 3)), "actions": random.uniform(-largest, largest, (40, 1))}
        arrays |= {"rewards": random.normal(size=40), "terminals": np.arange(40) % 20 == 19}
        np.savez(tmp_path / "shards" / f"{name}.npz", **arrays)
    used, set_data = [], UpdateLoop.set_data
    monkeypatch.setattr(UpdateLoop, "set_data", lambda self, data: (used.append(data), set_data(self, data)))
    shards = (f"--ogbench_dataset_dir={tmp_path / 'shards'}", "--dataset_replace_interval=2", "--eval_episodes=0")
    out = run_main(*BC, "--env_name=gym:Pendulum-v1", *shards, f"--save_dir={tmp_path}", "--offline_steps=4").out
    assert "bounds   [-2, 2] in the environment, rescaled to [-1, 1]; actions of the file are raw" in out
    first, *_, second = used
    np.testing.assert_allclose(np.abs(first["actions"]).max(), 1, atol=0.1)
    np.testing.assert_allclose(np.abs(second["actions"]).max(), 0.25, atol=0.05)
