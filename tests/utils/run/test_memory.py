"""Memory that training takes: its parts, and what does not fit."""

import math
from types import SimpleNamespace

import flax
import jax
import numpy as np
import pytest
from tiny_runs import BC, POINTMAZE, refused, run_dirs, run_main

from utils.data.replay_buffer import ReplayBuffer
from utils.devices import Layout
from utils.errors import UserError
from utils.run import memory
from utils.run.config import RunConfig
from utils.run.update_loop import UpdateLoop

GIB = 2**30


def test_the_limit_is_the_devices_own_if_it_tells():
    device = jax.local_devices()[0]
    assert memory.device_limit(device) == math.inf  # A CPU.


def loop(placement="device"):
    """An update loop of 6 runs on 3 of 4 devices, with 1200 bytes of data."""
    updates = UpdateLoop(np.zeros((6, 2), np.uint32), placement)
    updates.set_data({"actions": np.zeros((100, 3), np.float32)})
    updates.layout = Layout.spread(6, jax.local_devices() * 4)
    return updates


class Stacked(flax.struct.PyTreeNode):
    """Stand-in for 6 agents."""

    params: object
    opt_state: object
    config: object = flax.struct.field(pytree_node=False)


def sized(updates, steps=0, **settings):
    """Returns the parts, with agents of 40 and 80 bytes a run and a program of 7."""
    params, opt_state = (jax.ShapeDtypeStruct((6, size), np.float32) for size in (10, 20))
    agents = Stacked(params, opt_state, SimpleNamespace(horizon_length=2))
    return memory.needed_memory(updates, agents, RunConfig(**settings), steps, np.zeros(5, np.float32), 7)


def test_parts_of_each_device():
    """Two runs of six on it: the dataset once, their agents, a copy of what acts, the program, and experience."""
    assert sized(loop()) == {"data": 1200, "agents": 240, "evaluation": 80, "update": 7}
    assert sized(loop("host"), eval_overlap=False) == {"agents": 240, "update": 7}
    assert "evaluation" not in sized(loop(), eval_episodes=0)
    buffer = ReplayBuffer(2, 9, 2, np.zeros(5, np.float32), 3)
    assert sized(loop(), steps=9)["replay"] == sum(leaf.nbytes for leaf in buffer.arrays.values())


def test_what_fits_is_said_and_what_does_not_is_an_error(monkeypatch, capsys):
    parts = {"data": 3 * GIB, "agents": GIB, "update": GIB // 2}
    monkeypatch.setattr(memory, "device_limit", lambda _: 4.5 * GIB)
    memory.check_memory(parts, loop())
    expected = "memory: 4.50 of 4.50 GiB on each device (data 3.00, agents 1.00, update 0.50)\n"
    assert capsys.readouterr().out == expected
    with pytest.raises(UserError) as error:
        memory.check_memory(parts | {"agents": GIB + 1}, loop())
    assert str(error.value) == (
        "training needs 4.50 GiB on each device, which has 4.50 (data 3.00, agents 1.00, update 0.50); what helps: "
        "--dataset_placement=host; fewer runs at once (--num_seeds, --vary) or more --devices; smaller networks "
        "(--agent.actor_hidden_dims, --agent.value_hidden_dims, --agent.num_qs)"
    )
    monkeypatch.setattr(memory, "device_limit", lambda _: math.inf)
    memory.check_memory(parts, loop())
    assert capsys.readouterr().out == ""


def test_a_run_that_does_not_fit_ends_before_its_first_update(pointmaze, tmp_path, monkeypatch):
    """It starts once it fits, and the program's own figure is part of what it takes."""
    flags = (*BC, f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", f"--save_dir={tmp_path}", "--offline_steps=2")
    monkeypatch.setattr(memory, "device_limit", lambda _: 1000)
    assert "error: training needs 0.00 GiB on the device, which has 0.00 (" in refused(*flags)
    (run,) = run_dirs(tmp_path)
    assert not (run / "train.csv").exists() and not list((run / "checkpoints").glob("*"))
    monkeypatch.setattr(memory, "device_limit", lambda _: GIB)
    outcome = run_main(*flags)
    line = next(line for line in outcome.out.splitlines() if line.startswith("memory: "))
    assert "of 1.00 GiB on the device (data 0.00, agents 0.00, evaluation 0.00, update 0.00)" in line
