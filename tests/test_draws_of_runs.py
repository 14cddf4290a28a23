"""Effects of seeds, and what a run acts and is trained on, in the files that tiny runs leave."""

from pathlib import Path

import jax
import numpy as np
import probe_agent
import pytest
from probe_env import write_data
from tiny_runs import TINY, run_dirs, run_main

import online_main
from utils.output.loggers import read_csv
from utils.run import checkpoints
from utils.run.loading import load_run

SMALL = (*(flag for flag in TINY if "value_hidden" not in flag and "num_qs" not in flag), "--log_interval=3")
AGENT = f"--agent={Path(__file__).parent / 'probe_agent.py'}"
FROZEN = "--agent.lr=1e-12"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return f"--dataset={write_data(tmp_path_factory.mktemp('probe') / 'probe.npz')}"


def states(save_dir):
    """Directory and newest checkpoint of every run."""
    return [(path, checkpoints.load_latest(path / "checkpoints")[1]) for path in run_dirs(save_dir)]


def episodes(state):
    """The rows of each episode that has ended: name → array."""
    rows = state["explorer"]["rows"]
    ends = np.flatnonzero(rows["terminals"])[:-1]  # The last one is under way.
    return [{k: v[i + 1 : j + 1] for k, v in rows.items()} for i, j in zip([-1, *ends[:-1]], ends, strict=True)]


@pytest.fixture(scope="module")
def online(data, tmp_path_factory):
    """Two seeds: 6 updates, then 60 steps, in turns of three, with two updates each from step 22 on."""
    save_dir = tmp_path_factory.mktemp("online")
    steps = ("--offline_steps=6", "--online_steps=60", "--start_training=22", "--utd_ratio=2", "--sparse")
    run_main(
        AGENT,
        *SMALL,
        FROZEN,
        *steps,
        "--env_name=gym:probe_env:Probe-v0",
        "--num_seeds=2",
        data,
        f"--save_dir={save_dir}",
    )
    return states(save_dir)


def test_time_limits_are_no_terminations(online):
    """Masks are 0, and the end is marked, where the environment said `terminated`, and nowhere else."""
    kinds = set()
    for _, state in online:
        for rows in episodes(state):
            timed = bool(rows["observations"][0, 2])
            kinds.add(timed)
            expected = np.ones(len(rows["masks"]))
            expected[-2] = timed  # the last transition; the row after it is the state that it led to
            np.testing.assert_array_equal(rows["masks"], expected)
            np.testing.assert_array_equal(rows["terminated"], (np.arange(len(expected)) == len(expected) - 1) & ~timed)
    assert kinds == {True, False}


def test_sparse_rewards_are_those_not_solved(online):
    """−1 wherever the environment's reward is not 0, of either sign, and 0 where it is."""
    for _, state in online:
        for rows in episodes(state):
            steps = np.arange(1, len(rows["rewards"]))
            np.testing.assert_array_equal(rows["rewards"][:-1], -1.0 * (steps % 3 != 0))


def test_global_generator_goes_on_from_step_to_step(online):
    """NumPy's generator gives new numbers in every step of every episode of both seeds."""
    draws = np.concatenate([rows["observations"][:, 3] for _, state in online for rows in episodes(state)])
    assert len(draws) > 80 and len(np.unique(draws)) == len(draws)


def test_resets_differ(online):
    """Between episodes, and between seeds."""
    draws = [rows["observations"][0, 1] for _, state in online for rows in episodes(state)]
    assert len(draws) > 10 and len(np.unique(draws)) == len(draws)


def test_updates_begin_within_a_turn(online):
    """Every step after the first 22 has its two updates: also the two of the turn that is under way there."""
    for path, state in online:
        assert read_csv(path / "timing.csv")["updates"].sum() == 6 + 2 * (60 - 22)
        assert state["agent"]["step"] == 6 + 2 * (60 - 22)


def test_seeds_differ_in_networks_and_batches(online):
    """Networks that are not trained are as initialised; batches differ from update to update and between seeds."""
    kernels = [state["agent"]["params"]["flow"]["MLP_0"] for _, state in online]
    for layer in kernels[0]:
        assert np.abs(kernels[0][layer]["kernel"] - kernels[1][layer]["kernel"]).min() > 0
    rewards = np.concatenate([read_csv(path / "train.csv")["batch/rewards"][:2] for path, _ in online])
    assert len(np.unique(rewards)) == 4


# From a base


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    """A run of BC whose flow is not its average."""
    save_dir = tmp_path_factory.mktemp("base")
    flags = ("--agent=agents/bc.py", "--agent.lr=0.01", "--agent.flow_tau=0.1", "--offline_steps=6")
    run_main(*flags, *SMALL, "--env_name=gym:probe_env:Still-v0", data, f"--save_dir={save_dir}")
    (path,) = run_dirs(save_dir)
    flow = load_run(path)[0]
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), flow.params["flow"], flow.targets["flow"])
    assert min(jax.tree.leaves(gaps)) > 0.005
    return path, flow


@pytest.fixture(scope="module")
def post_trained(base, data, tmp_path_factory):
    """Two seeds: 20 steps of the base, five of the agent, whose updates change nothing."""
    save_dir = tmp_path_factory.mktemp("post")
    steps = ("--rollout_steps=20", "--online_steps=5", "--utd_ratio=1", "--eval_interval=5", "--num_seeds=2")
    flags = (AGENT, *SMALL, FROZEN, "--env_name=gym:probe_env:Still-v0", data, f"--base_checkpoint={base[0]}")
    run_main(*flags, *steps, f"--save_dir={save_dir}", program=online_main)
    return states(save_dir)


def assert_close(tree, other):
    """Two networks are equal up to rounding."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), tree, other)


def test_agents_begin_with_the_flow_that_acts(base, post_trained, data, tmp_path):
    """The base's average, as their flow and its average: post-trained, or started from the base's run."""
    flags = (AGENT, *SMALL, FROZEN, "--offline_steps=1", "--env_name=gym:probe_env:Still-v0", data)
    run_main(*flags, f"--start_from={base[0]}", f"--save_dir={tmp_path}")
    for _, state in (*post_trained, *states(tmp_path)):
        for part in ("params", "targets"):
            assert_close(state["agent"][part]["flow"], base[1].targets["flow"])


def test_evaluations_before_the_end_of_the_rollouts_are_of_the_base(post_trained):
    """At their end, and after, they are of the agent, which always acts in one way."""
    for path, _ in post_trained:
        table = read_csv(path / "eval.csv")
        assert table["step"].tolist() == [5, 10, 15, 20, 25]
        agents = np.abs(table["return_mean"] - 6 * probe_agent.ACTION) < 1e-5
        assert agents.tolist() == [False] * 3 + [True] * 2


def test_noise_differs(post_trained):
    """At one observation and by one flow: between chunks, episodes, seeds and evaluations."""
    chunks = [rows["actions"][t] for _, state in post_trained for rows in episodes(state)[:3] for t in (0, 5)]
    assert len(chunks) == 12 and len(np.unique(chunks, axis=0)) == 12
    returns = np.concatenate([read_csv(path / "eval.csv")["return_mean"][:3] for path, _ in post_trained])
    assert len(np.unique(np.round(returns, 6))) == 6
