"""An agent of one file: trained, evaluated, resumed, swept and reported with nothing else touched."""

import json

import pytest
from tiny_runs import POINTMAZE, TINY, assert_same_run, call, interrupted, run_dir, run_main

from experiments.report import command as report
from experiments.sweep import command as sweep
from utils.output.loggers import read_csv
from utils.run.loading import load_run

# BC with the Huber loss.
AGENT = '''
"""Behaviour cloning with the Huber loss of the flow-matching error."""

import jax
import jax.numpy as jnp
import optax

from agents import base, presets
from utils.networks import VectorField


class Agent(base.Agent):
    """A flow that imitates the data; there is no critic."""

    TARGETS = {"flow": "flow_tau"}

    @classmethod
    def networks(cls, config, action_dim):
        return {"flow": VectorField(tuple(config.actor_hidden_dims), action_dim)}

    def loss(self, params, batch, key):
        noise_key, time_key = jax.random.split(key)
        actions, valid = batch["actions"], batch["valid"][:, None] * batch["action_mask"]
        noise = jax.random.normal(noise_key, actions.shape)
        t = jax.random.uniform(time_key, (len(actions), 1))
        velocity = self.apply("flow", batch["observations"], t * actions + (1 - t) * noise, t, params=params["flow"])
        loss = jnp.mean(valid * optax.huber_loss(velocity, actions - noise, delta=self.hyper["delta"]))
        return loss, {"flow/loss": loss}


def get_config():
    config = base.get_config()
    config.delta = 1.0
    return config


PRESETS = presets.presets({})
'''


@pytest.fixture(scope="module")
def agent(tmp_path_factory):
    path = tmp_path_factory.mktemp("agents") / "huber.py"
    path.write_text(AGENT)
    return path


def test_the_file_is_short():
    assert len(AGENT.strip().splitlines()) < 40


def test_trains_evaluates_resumes_sweeps_and_reports(agent, pointmaze, interrupt_at, tmp_path):
    own = (*TINY, f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", "--offline_steps=20", "--log_interval=5")
    flags = (*own, f"--agent={agent}")
    run_main(*flags, f"--save_dir={tmp_path / 'whole'}")
    interrupt_at(10)
    interrupted(*flags, f"--save_dir={tmp_path / 'broken'}")
    assert "resuming at step 10" in run_main(*flags, f"--save_dir={tmp_path / 'broken'}").out
    directory = run_dir(tmp_path / "whole")
    assert_same_run(directory, run_dir(tmp_path / "broken"))
    assert read_csv(directory / "eval.csv")["step"].tolist() == [20]
    assert load_run(directory)[0].hyper["delta"] == 1.0

    grid, shared = tmp_path / "losses.py", tuple(flag for flag in own if not flag.startswith("--env_name"))
    settings = {"": ("--vary=agent.delta=0.1,10",)}
    grid.write_text(
        "from experiments.sweep.grids import Grid\n"
        f"GRID = Grid(({str(agent)!r},), ({POINTMAZE!r},), 1, flags={shared}, settings={settings})\n"
    )
    place = (f"--grid={grid}", f"--save_dir={tmp_path / 'swept'}")
    assert call(*place, program=sweep).code == 0
    assert (
        "2 done" in call(*place, "status", program=sweep).out or "1 done" in call(*place, "status", program=sweep).out
    )
    done = call(str(tmp_path / "swept" / "losses"), str(directory), f"--output={tmp_path / 'out'}", program=report)
    assert done.code == 0 and "huber" in done.out, done.err
    assert json.loads((directory / "summary.json").read_text())["step"] == 20
