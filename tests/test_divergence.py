"""Runs whose losses or parameters become NaN or infinite."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_runs import POINTMAZE, TINY, assert_same_run, call, refused, run_main

from experiments.report.groups import group_runs
from experiments.report.runs import find_runs
from experiments.sweep import command as sweep
from experiments.sweep.jobs import Job
from utils.output.loggers import read_csv
from utils.run import checkpoints

# From update `at` on, `broken` is not finite: the loss, or its gradient alone, or the actions alone.
AGENT = """
import jax.numpy as jnp
from agents import bc

class Agent(bc.Agent):
    def loss(self, params, batch, key):
        loss, info = super().loss(params, batch, key)
        broken = self.step >= self.cfg.at
        if self.config.broken == "gradient":
            weight = params["flow"]["MLP_0"]["Dense_0"]["kernel"][0, 0]
            return loss + jnp.sqrt(weight * 0 + ~broken), info  # The derivative at 0 is infinity times 0.
        if self.config.broken == "loss":
            loss = jnp.where(broken, jnp.nan, loss)
        return loss, info | {"flow/loss": loss}

    def propose(self, observations, key):
        broken = (self.step >= self.cfg.at) & (self.config.broken == "actions")
        return super().propose(observations, key) + jnp.where(broken, jnp.nan, 0.0)

def get_config():
    config = bc.get_config()
    config.update({"at": 1e9, "broken": "loss"})
    return config

PRESETS = bc.PRESETS
"""


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    """The file of the agent above."""
    path = tmp_path_factory.mktemp("agent") / "breaks.py"
    path.write_text(AGENT)
    return path


@pytest.fixture
def flags(agent, pointmaze, tmp_path):
    """Flags of a run of it: a checkpoint every 50 updates, an evaluation every 100."""
    intervals = ("--offline_steps=300", "--log_interval=50", "--save_interval=50", "--eval_interval=100")
    task = (f"--env_name={POINTMAZE}", f"--dataset={pointmaze}")
    return (*TINY, f"--agent={agent}", *task, *intervals, f"--save_dir={tmp_path / 'exp'}")


def directories(tmp_path) -> dict:
    """The directory of each run, by the name of its agent's folder."""
    return {path.parent.parent.name: path.parent for path in (tmp_path / "exp").rglob("flags.json")}


@pytest.mark.parametrize("hidden", [False, True])
def test_a_run_that_diverges_ends_with_the_last_sound_checkpoint(flags, hidden, tmp_path):
    # The loss would show it one update later, in the next call.
    flags = (*flags, f"--agent.at={199 if hidden else 170}", f"--agent.broken={'gradient' if hidden else 'loss'}")
    outcome = call(*flags)
    (directory,) = directories(tmp_path).values()
    step = 200
    what = "params/flow/MLP_0/Dense_0/kernel" if hidden else "flow/loss"
    assert outcome.code == 1
    last = outcome.err.splitlines()[-1]
    assert last.startswith(f"diverged: {directory} at step {step}, not finite: {what}; the checkpoint of step 150")
    assert "lr" in last and outcome.err.count("diverged") == 1
    assert json.loads((directory / "summary.json").read_text()) == {"step": step, "diverged": what}
    newest, state = checkpoints.load_latest(directory / "checkpoints")
    assert newest == 150 and np.isfinite(state["agent"]["params"]["flow"]["MLP_0"]["Dense_0"]["kernel"]).all()
    table = read_csv(directory / "train.csv")
    assert list(table["step"]) == [50, 100, 150, 200]  # Its last row is written.
    assert np.isnan(table["flow/loss"][-1]) != hidden
    assert list(read_csv(directory / "eval.csv")["step"]) == [100]

    again = call(*flags)
    assert again.code == 1 and again.err.startswith(f"diverged before: {directory}") and again.err.count("\n") == 1
    assert list(read_csv(directory / "train.csv")["step"]) == [50, 100, 150, 200]


def test_a_diverged_run_is_told_of_for_its_own_data_alone(flags, pointmaze, write_data, tmp_path):
    flags = (*flags, "--agent.at=10")
    assert call(*flags).code == 1
    (tmp_path / "copy.npz").write_bytes(pointmaze.read_bytes())
    same = call(*flags, f"--dataset={tmp_path / 'copy.npz'}")
    assert same.code == 1 and same.err.startswith("diverged before"), same
    assert "dataset.checksum" in refused(*flags, f"--dataset={write_data(rows=100)}")
    assert "nowhere.npz" in refused(*flags, f"--dataset={tmp_path / 'nowhere.npz'}")


def test_the_other_runs_go_on_as_if_alone(flags, tmp_path):
    """Also after the program was started again, which trains those that have not diverged."""
    outcome = call(*flags, "--vary=agent.at=120,1000", "--offline_steps=200")
    found = directories(tmp_path)
    assert outcome.code == 1 and outcome.err.splitlines()[-1].startswith(f"diverged: {found['breaks_at=120']}")
    assert f"finished: {found['breaks_at=1000']}" in outcome.out
    outcome = call(*flags, "--vary=agent.at=120,1000", "--offline_steps=200")
    assert outcome.code == 1 and "finished before" in outcome.out and "diverged before" in outcome.err

    run_main(*flags, "--vary=agent.at=1000", "--offline_steps=200", f"--save_dir={tmp_path / 'alone'}")
    assert_same_run(found["breaks_at=1000"], next((tmp_path / "alone").rglob("flags.json")).parent)


def test_resumed_with_those_that_have_not_diverged(flags, interrupt_at, tmp_path):
    interrupt_at(200)
    flags = (*flags, "--vary=agent.at=120,1000")
    assert call(*flags).code == 128 + 15
    assert call(*flags).code == 1
    found = directories(tmp_path)
    assert json.loads((found["breaks_at=120"] / "summary.json").read_text())["diverged"]
    run_main(*flags[:-1], "--vary=agent.at=1000", f"--save_dir={tmp_path / 'alone'}")
    assert_same_run(found["breaks_at=1000"], next((tmp_path / "alone").rglob("flags.json")).parent)


def test_a_signal_saves_no_broken_parameters(flags, interrupt_at, tmp_path):
    """Parameters that broke in the last update, which no loss has shown yet."""
    interrupt_at(150)
    flags = (*flags, "--agent.at=149", "--agent.broken=gradient", "--save_interval=1000")
    assert call(*flags).code == 128 + 15
    (directory,) = directories(tmp_path).values()
    assert not checkpoints.saved_steps(directory / "checkpoints")


def test_online(flags, tmp_path):
    """Nothing is acted or logged by what has diverged, and the other run is what it would be alone."""
    online = ("--offline_steps=20", "--online_steps=60", "--start_training=10", "--eval_episodes=0")
    flags = (*flags, *online, "--log_interval=10")
    outcome = call(*flags, "--vary=agent.at=40,1000")
    found = directories(tmp_path)
    assert outcome.code == 1, outcome.err
    summary = json.loads((found["breaks_at=40"] / "summary.json").read_text())
    assert summary == {"step": 55, "diverged": "flow/loss"}  # Its 41st update is in the chunk that ends there.
    assert read_csv(found["breaks_at=40"] / "train.csv")["step"][-1] == 55
    run_main(*flags, "--vary=agent.at=1000", f"--save_dir={tmp_path / 'alone'}")
    alone = next((tmp_path / "alone").rglob("flags.json")).parent
    assert (found["breaks_at=1000"] / "train.csv").read_bytes() == (alone / "train.csv").read_bytes()


@pytest.mark.parametrize("online", [False, True])
def test_actions_that_are_not_finite(flags, online, tmp_path):
    """They end the run that they are of, and no other, in an evaluation and in the environment that is learnt from."""
    steps = ("--offline_steps=20", "--online_steps=40", "--start_training=10", "--eval_episodes=0")
    flags = (*flags, *(steps if online else ()), "--agent.broken=actions")
    outcome = call(*flags, f"--vary=agent.at={30 if online else 170},1000")
    found = directories(tmp_path)
    summary = json.loads((found[f"breaks_at={30 if online else 170}"] / "summary.json").read_text())
    assert outcome.code == 1 and summary["diverged"] == "the policy's actions", outcome.err
    if online:
        assert summary["step"] == 40  # Updates begin at 30, and reach the 30th there.
    run_main(*flags, "--vary=agent.at=1000", f"--save_dir={tmp_path / 'alone'}")
    alone = next((tmp_path / "alone").rglob("flags.json")).parent
    assert_same_run(found["breaks_at=1000"], alone) if not online else None
    assert (found["breaks_at=1000"] / "train.csv").read_bytes() == (alone / "train.csv").read_bytes()


def test_reports_show_it_and_average_without_it(flags, tmp_path):
    flags = (*flags, "--eval_interval=50", "--offline_steps=100")
    run_main(*flags, "--seed=0", "--agent.lr=1e-3")
    assert call(*flags, "--seed=1", "--agent.lr=1e25").code == 1
    runs, damaged = find_runs([tmp_path / "exp"])
    assert not damaged and [bool(run.diverged) for run in sorted(runs, key=lambda run: run.seed)] == [False, True]
    sound, broken = sorted(group_runs(runs, 3), key=lambda group: group.condition.diverged)
    assert [run.seed for run in sound.runs] == [0] and not sound.apart
    assert any(reason.startswith("diverged: seed 1 at step") for reason in broken.apart)


def test_a_seed_that_diverged_is_told_beside_the_others(flags, tmp_path):
    for seed in (0, 1):
        run_main(*flags, f"--seed={seed}", "--offline_steps=100", "--eval_interval=50")
    summary = tmp_path / "exp" / "debug" / POINTMAZE / "breaks" / "sd1" / "summary.json"
    summary.write_text(json.dumps({"step": 100, "diverged": "flow/loss"}))
    groups = group_runs(find_runs([tmp_path / "exp"])[0], 3)
    sound = next(group for group in groups if not group.condition.diverged)
    assert "without seed 1, which diverged" in sound.notes


def test_sweeps_do_not_start_it_again(flags, tmp_path, monkeypatch, capsys):
    assert call(*flags, "--agent.at=10").code == 1
    (directory,) = directories(tmp_path).values()
    job = Job("one", (), tmp_path, (directory,), 300, ({},))
    assert job.state() == ("diverged", f"{directory}: flow/loss at step 50")
    monkeypatch.setattr(sweep, "FLAGS", SimpleNamespace(dry_run=True))
    sweep.start([job], tmp_path)
    assert capsys.readouterr() == ("", "1 diverged; 0 to start\n")
