"""Rewards are scaled and shifted for agents alone, in the dataset and online; returns stay the environment's."""

import numpy as np
import pytest
from tiny_runs import BC, OTQL, refused, run_dir, run_main

from envs.data_card import make_card
from envs.tasks import parse_task
from utils.data.replay_buffer import ReplayBuffer
from utils.data.rewards import IDENTITY, Affine
from utils.output.loggers import read_csv
from utils.rollout.env_runner import EnvRunner
from utils.rollout.worker_pool import Steps
from utils.run.config import RunConfig
from utils.run.dataset import make_dataset, rewards_of

TASK = parse_task("gym:Pendulum-v1")


def raw(count=6):
    return {
        "observations": np.zeros((count, 3), np.float32),
        "actions": np.zeros((count, 1), np.float32),
        "rewards": np.array([-0.0, 1.0, 2.0, 3.0, 4.0, 0.0], np.float32),
        "masks": np.ones(count, np.float32),
        "terminals": np.array([0, 0, 1, 0, 0, 1], np.float32),
    }


def test_rewards_of_a_dataset():
    of_the_file = {"ends": {}, "unused": 0, "unused_reward": 0.0, "units": "scaled", "bounds": ""}
    card = make_card(raw(), False, **of_the_file)
    config = RunConfig(reward_scale=2.0, reward_shift=-1.0)
    scaled = make_dataset(raw(), card, "x", TASK, 1, rewards_of(config)).at(0)["rewards"]
    # Rows without an action keep theirs: no update uses it.
    np.testing.assert_array_equal(scaled, [-1, 1, 2, 5, 7, 0])
    assert scaled.dtype == np.float32
    plain = make_dataset(raw(), card, "x", TASK, 1, rewards_of(RunConfig()))
    assert plain.at(0)["rewards"].tobytes() == raw()["rewards"].tobytes()  # Also the sign of a zero.
    assert card.returns == (1.0, 4.0, 7.0)


def test_rewards_online():
    replay = ReplayBuffer(1, 4, 2, np.zeros(3, np.float32), 1)
    for scaled, expected in ((Affine(0.5, 3.0), [3.5, 4.0]), (IDENTITY, [1.0, 2.0])):
        runner = EnvRunner(replay, 0, lambda episode: episode, scaled=scaled)
        dialogue = runner.begin()
        next(dialogue)
        with pytest.raises(StopIteration) as end:
            dialogue.send(np.zeros(3, np.float32))
        dialogue = end.value.value.act(2, lambda *_: np.zeros((2, 1), np.float32))
        next(dialogue)
        taken = Steps(np.zeros((2, 3), np.float32), [1.0, 2.0], True, False, 1.0)
        dialogue.send(taken)
        with pytest.raises(StopIteration) as end:
            dialogue.send(np.zeros(3, np.float32))
        runner, (outcome,) = end.value.value
        runner.commit()
        np.testing.assert_array_equal(np.asarray(replay.arrays["rewards"])[0, :2], expected)
        assert outcome["return"] == 3.0


def test_flags(write_data, tmp_path):
    """Change the run's losses and its identity, not the returns that are reported."""
    flags = (*OTQL, "--env_name=pointmaze-medium-navigate-singletask-task1-v0", f"--dataset={write_data()}",
             "--offline_steps=2", "--log_interval=2", "--max_episode_steps=5")  # fmt: skip
    for name, more in {"a": (), "b": ("--reward_scale=3", "--reward_shift=-1")}.items():
        run_main(*flags, *more, f"--save_dir={tmp_path}/{name}")
    tables = [read_csv(run_dir(tmp_path / name) / "train.csv") for name in "ab"]
    assert tables[0]["critic/loss"][-1] != tables[1]["critic/loss"][-1]
    evaluations = [read_csv(run_dir(tmp_path / name) / "eval.csv")["return_mean"][-1] for name in "ab"]
    assert evaluations[0] == evaluations[1]
    assert "reward_scale = 3.0, not 1.0" in refused(*flags, f"--save_dir={tmp_path}/b")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--reward_scale=0", "it must be greater than 0"),
        ("--reward_scale=-1", "it must be greater than 0"),
        ("--reward_scale=nan", "it must be a finite number"),
        ("--reward_shift=inf", "it must be a finite number"),
        ("--reward_shift=one", "--reward_shift"),
    ],
)
def test_values_that_do_not_fit(flag, said):
    assert said in refused(*BC, flag)
