"""Training over several devices, in a process with four of them; started by tests/utils/test_devices.py."""

import os

import jax
import numpy as np
import pytest
from tiny_runs import BC, POINTMAZE, assert_same_run, interrupted, refused, run_dirs, run_main

from agents import bc
from utils.data.batches import assemble, gather, prepare
from utils.data.replay_buffer import ReplayBuffer
from utils.devices import BATCH, Layout, part_with, run_of
from utils.output.loggers import read_csv
from utils.run.loading import load_run
from utils.run.update_loop import UPDATE, UpdateLoop, _train_on_device
from utils.system import jax_setup
from utils.trees import tree_stack

STEPS = ("--offline_steps=20", "--log_interval=5", "--save_interval=10", "--eval_interval=10", "--max_episode_steps=20")
ONLINE = (*STEPS, "--online_steps=10", "--start_training=2", "--num_seeds=3")
HORIZON, BATCH_SIZE = 2, 12


@pytest.fixture(scope="module", autouse=True)
def tried():
    """XLA has started with these flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax_setup, "USER_XLA_FLAGS", "")
        yield


@pytest.fixture
def flags(tmp_path):
    """Name of a group of runs → flags of a tiny run."""
    return lambda name: (
        *BC,
        f"--env_name={POINTMAZE}",
        f"--dataset={os.environ['POINTMAZE']}",
        f"--save_dir={tmp_path / name}",
    )


def test_runs_are_those_of_one_device_and_resume_on_others(flags, tmp_path, interrupt_at):
    """Offline, online, evaluated: bit for bit, cut off on three devices and continued on two with three runs."""
    run_main(*flags("one"), *ONLINE, "--devices=1")
    interrupt_at(25)
    interrupted(*flags("several"), *ONLINE)
    outcome = run_main(*flags("several"), *ONLINE, "--devices=3,1")
    assert "3 runs on 2 of 2 devices, at most 2 on each\n" in outcome.out and "resuming at step 25" in outcome.out
    for one, several in zip(run_dirs(tmp_path / "one"), run_dirs(tmp_path / "several"), strict=True):
        assert_same_run(one, several)
        assert (one / "online.csv").read_bytes() == (several / "online.csv").read_bytes()


def test_a_run_with_a_spread_batch_is_evaluated_and_saved(flags, tmp_path):
    outcome = run_main(*flags("spread"), *STEPS, "--shard_batch")
    assert "each batch is spread over 4 of 4 devices\n" in outcome.out
    (run,) = run_dirs(tmp_path / "spread")
    assert read_csv(run / "eval.csv")["step"].tolist() == [10, 20] and int(load_run(run)[0].step) == 20


def test_mistakes(flags):
    assert "--devices=5: JAX finds 4 × CPU here, numbers 0 to 3" in refused(*flags("no"), "--devices=5")
    assert "--devices=0,4: JAX finds 4 × CPU" in refused(*flags("no"), "--devices=0,4")
    message = refused(*flags("no"), "--shard_batch", "--agent.batch_size=6")
    assert "--shard_batch: 4 devices cannot share --agent.batch_size=6; use a multiple of 4" in message


@pytest.fixture(scope="module")
def data():
    """Random episodes."""
    rng, size = np.random.default_rng(0), 60
    arrays = {"observations": rng.normal(size=(size, 3)), "actions": rng.uniform(-1, 1, (size, 2))}
    arrays |= {"rewards": rng.normal(size=size), "masks": np.ones(size), "terminals": np.arange(size) % 12 == 11}
    return prepare({k: v.astype(np.float32) for k, v in arrays.items()}, True)


@pytest.fixture(scope="module")
def agents(data):
    """Three small agents."""
    config = bc.get_config()
    config.update({"actor_hidden_dims": (7,), "batch_size": BATCH_SIZE, "horizon_length": HORIZON})
    example = assemble(gather(data, data["starts"], HORIZON), 1.0, "drop")
    return tree_stack([bc.Agent.create(jax.random.PRNGKey(seed), example, config) for seed in range(3)])


def trained(agents, data, layout, placement="device"):
    """Returns the loop, and the agents after 12 updates."""
    keys = jax.random.split(jax.random.PRNGKey(5), layout.num_runs)
    loop = UpdateLoop(keys, placement, layout)
    loop.set_data(data)
    return loop, loop.run(loop.place(jax.tree.map(np.asarray, agents)), 0, 12)[0]


def test_batches_from_the_host(agents, data):
    """Three runs on two devices, one of them with a copy that is trained for nothing."""
    alone = trained(agents, data, Layout(3))[1]
    layout = Layout.spread(3, jax.local_devices()[2:])
    spread = trained(agents, data, layout, "host")[1]
    assert jax.tree.leaves(spread)[0].shape[0] == 4 and not layout.sharding("runs").is_fully_replicated
    for index, device in enumerate(jax.local_devices()[number] for number in (2, 2, 3)):
        own = run_of(spread, index)
        assert {device} == jax.tree.leaves(own)[0].sharding.device_set
        jax.tree.map(np.testing.assert_array_equal, own, run_of(alone, index))
    part, index = part_with(spread, 2)
    assert index == 0 and len(part.step) == 2


@pytest.mark.parametrize("num_runs", [1, 3])
def test_each_device_has_a_part_of_a_batch(num_runs, agents, data):
    agents = jax.tree.map(lambda leaf: leaf[:num_runs], agents)
    layout = Layout.spread(num_runs, jax.local_devices(), BATCH)
    loop, spread = trained(agents, data, layout)
    for placement in ("device", "host"):
        alone = trained(agents, data, Layout(num_runs), placement)[1]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), spread, alone)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(spread))
    program = _train_on_device.lower(spread, loop.data, loop.keys, 1, layout, UPDATE).compile().as_text()
    assert f"f32[{BATCH_SIZE // 4},7]" in program and f"f32[{BATCH_SIZE},7]" not in program


def test_experience_is_written_on_the_device_of_its_run():
    layout = Layout.spread(3, jax.local_devices()[:2])
    spread, alone = (ReplayBuffer(3, 4, 1, np.zeros(3, np.float32), 2, own) for own in (layout, None))
    for run in (2, 0, 1):
        rows = {
            name: np.full((1, *leaf.shape[2:]), run + 1.0) for name, leaf in alone.arrays.items() if name != "starts"
        }
        for buffer in (spread, alone):
            buffer.write(run, 1, rows, 0, np.array([run], np.int32))
    for run in range(3):
        jax.tree.map(np.testing.assert_array_equal, spread.rows_of(run, 5), alone.rows_of(run, 5))
    kept = spread.rows_of(2, 3)
    spread.restore(1, kept, 1)
    jax.tree.map(np.testing.assert_array_equal, spread.rows_of(1, 3), kept)
    assert len(spread.arrays["rewards"].addressable_shards[0].data) == 2
