"""Demonstrations of the Panda tasks: what their file holds, whatever the workers and stops; wrong command lines."""

import sys

import numpy as np
import pytest
from panda_helpers import make, needs_model, run

from envs import parallel_episodes
from envs.datasets import load_file
from envs.panda import demonstrate
from envs.tasks import parse_task
from utils.errors import UserError
from utils.system.entry_point import run_main


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demonstrations")
    return demonstrate.demonstrate("OpenMicrowave-v0", episodes=3, workers=1, dataset_dir=directory)


@needs_model
def test_demonstrations_load_and_end_in_successes(demonstrations):
    assert sorted(path.name for path in demonstrations.parent.iterdir()) == [
        "OpenMicrowave-v0-3ep.json",
        "OpenMicrowave-v0-3ep.npz",
    ]
    dataset = load_file(parse_task("gym:OpenMicrowave-v0"), demonstrations)
    last = np.flatnonzero(dataset["terminals"])
    assert len(last) == 3 and last[-1] == len(dataset["terminals"]) - 1
    np.testing.assert_array_equal(np.flatnonzero(dataset["masks"] == 0), last - 1)
    np.testing.assert_array_equal(np.flatnonzero(dataset["rewards"] == 0), np.sort([*last, *(last - 1)]))
    assert (dataset["observations"][last, 25] >= 1).all() and (dataset["observations"][last - 1, 25] < 1).all()
    assert set(np.unique(dataset["rewards"])) == {-1, 0}


@needs_model
def test_demonstrations_are_rollouts(demonstrations):
    rows, env = np.load(demonstrations), make("OpenMicrowave-v0")
    length = int(np.flatnonzero(rows["terminals"])[0])
    seed = np.random.SeedSequence(0, spawn_key=(0, 0)).generate_state(2)[0]
    np.testing.assert_array_equal(env.reset(seed=int(seed))[0], rows["observations"][0])
    np.testing.assert_array_equal(run(env, rows["actions"][:length]), rows["observations"][1 : length + 1])
    np.testing.assert_allclose(env.data.qpos, rows["qpos"][length], atol=1e-6)
    np.testing.assert_allclose(env.data.qvel, rows["qvel"][length], atol=1e-5)


@needs_model
def test_demonstrations_do_not_depend_on_workers_or_stops(demonstrations, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    output = tmp_path / "new" / "mine.npz"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="of 2 episodes are kept"):
        patch.setattr(parallel_episodes.tqdm, "update", stop)  # Called after the first episode.
        demonstrate.demonstrate("OpenMicrowave-v0", episodes=2, workers=1, output=output)
    assert not output.exists() and list(output.with_suffix(".parts").glob("train-*"))
    demonstrate.demonstrate("OpenMicrowave-v0", episodes=3, workers=2, output=output)
    ours, theirs = np.load(output), np.load(demonstrations)
    assert sorted(ours.files) == sorted(theirs.files)
    for key in ours.files:
        np.testing.assert_array_equal(ours[key], theirs[key])
    assert demonstrate.demonstrate("OpenMicrowave-v0", episodes=3, workers=1, output=output) == output
    with pytest.raises(UserError, match="made with other settings"):
        demonstrate.demonstrate("OpenMicrowave-v0", episodes=3, seed=1, workers=1, output=output)
    with pytest.raises(UserError, match="made with other settings"):
        demonstrate.demonstrate("OpenMicrowave-v0", episodes=3, expert_noise=2.0, workers=1, output=output)


@needs_model
def test_failures_are_drawn_again(monkeypatch):
    rollout, seeds = demonstrate.rollout, []

    def fail_first(env, expert, seed):
        seeds.append(seed)
        return rollout(env, expert, seed) if len(seeds) > 1 else ({}, False)

    monkeypatch.setattr(demonstrate, "rollout", fail_first)
    rows = demonstrate.episode("OpenMicrowave-v0", 5, 2)
    assert rows["failed"].sum() == 1 and seeds[0] != seeds[1]
    seeds.clear()
    shaky = demonstrate.episode("OpenMicrowave-v0", 5, 2, expert_noise=2.0)
    assert not np.array_equal(shaky["actions"][:10], rows["actions"][:10])
    monkeypatch.setattr(demonstrate, "rollout", lambda *_: ({}, False))
    with pytest.raises(UserError, match="100 attempts"):
        demonstrate.episode("OpenMicrowave-v0", 5, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--env_name is missing"),
        (["--env_name=OpenFridge-v0"], "use ArrangeBoxes-v0 or OpenMicrowave-v0"),
        (["--env_name=OpenMicrowave-v0", "--episodes=0"], "episodes is 0"),
        (["--env_name=OpenMicrowave-v0", "--seed=-1"], "seed is -1"),
        (["--env_name=OpenMicrowave-v0", "--tremor=nan"], "expert_noise is nan"),
        (["--env_name=OpenMicrowave-v0", "--agent.lam=1"], "--agent.lam"),
        (["--env_name=OpenMicrowave-v0", "--output=demos.txt"], ".npz"),
    ],
)
def test_wrong_command_lines(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(demonstrate, "gym_hil_assets", lambda: None)
    monkeypatch.setattr(sys, "argv", ["demonstrate", *arguments])
    with pytest.raises(SystemExit) as caught:
        run_main(demonstrate.main)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1
