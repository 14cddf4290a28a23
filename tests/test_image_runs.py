"""Whole runs on a small task with images: offline, resumed, online, from a base; and mistakes."""

import os
import shutil

import jax
import numpy as np
import pytest
from spot_env import write_demonstrations
from tiny_runs import BC, assert_same_run, refused, run_dir, run_main

import online_main
from utils import encoders
from utils.observations import Observation
from utils.output.loggers import read_csv
from utils.run.loading import load_run

IMAGES = ("--env_name=gym:spot_env:Spot-v0", "--horizon_length=2", "--agent.encoder=impala_tiny", "--log_interval=5")


@pytest.fixture(scope="module", autouse=True)
def small():
    """Images of 16×16, and an encoder that is compiled in a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(encoders.ENCODERS, "impala_tiny", (4, (4,), 1, 8))
        patch.setenv("SPOT_SIZE", "16")
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_demonstrations(tmp_path_factory.mktemp("spot") / "spot.npz", size=16, episodes=30)


OFFLINE = (*BC, *IMAGES, "--offline_steps=10", "--eval_episodes=3", "--save_interval=5")


@pytest.fixture(scope="module")
def learnt(data, tmp_path_factory):
    """A run of BC, evaluated at its end."""
    save_dir = tmp_path_factory.mktemp("bc")
    run_main(*OFFLINE, f"--dataset={data}", f"--save_dir={save_dir}")
    return run_dir(save_dir)


def test_offline(learnt):
    """It is evaluated on images, records their shape, and its agent is loaded and acts on them."""
    assert read_csv(learnt / "eval.csv")["length_mean"][-1] > 1
    agent, settings, step = load_run(learnt)
    assert (settings["observation_dim"], settings["image_shape"], step) == (2, [1, 16, 16, 3], 10)
    observations = Observation(np.zeros((3, 2), np.float32), np.zeros((3, 1, 16, 16, 3), np.uint8))
    assert jax.jit(type(agent).sample_actions)(agent, observations, agent.key).shape == (3, 4)


def test_from_the_host_as_from_the_device(data, learnt, tmp_path):
    """The rows of a batch are the same, bit for bit."""
    run_main(*OFFLINE, "--dataset_placement=host", f"--dataset={data}", f"--save_dir={tmp_path}")
    assert_same_run(learnt, run_dir(tmp_path))


def test_online_and_resumed(data, tmp_path, interrupt_at):
    """Experience with images is trained on, and a run that was cut off goes on to the same numbers."""
    flags = (*OFFLINE, f"--dataset={data}", "--online_steps=12", "--start_training=4")
    run_main(*flags, f"--save_dir={tmp_path / 'whole'}")
    interrupt_at(12)
    with pytest.raises(AssertionError, match="rerun the same command"):
        run_main(*flags, f"--save_dir={tmp_path / 'cut'}")
    run_main(*flags, f"--save_dir={tmp_path / 'cut'}")
    assert_same_run(run_dir(tmp_path / "whole"), run_dir(tmp_path / "cut"))
    assert len(read_csv(run_dir(tmp_path / "whole") / "online.csv")["length"])


def test_online_from_a_base(data, learnt, tmp_path):
    """The flow is taken over with its encoder."""
    flags = (*BC, *IMAGES, f"--dataset={data}", f"--save_dir={tmp_path}", f"--base_checkpoint={learnt}")
    flags += ("--rollout_steps=2", "--online_steps=1", "--agent.lr=0.0000001", "--utd_ratio=1")
    run_main(*flags, program=online_main)
    base, agent = (load_run(directory)[0] for directory in (learnt, run_dir(tmp_path)))
    np.testing.assert_allclose(
        agent.params["flow"]["encoder"]["camera_0"]["Dense_0"]["kernel"],
        base.targets["flow"]["encoder"]["camera_0"]["Dense_0"]["kernel"],
        atol=1e-5,
    )
    message = refused(*flags, "--agent.encoder=impala_small", "--run_group=other", program=online_main)
    assert "encoder = impala_tiny, the agent impala_small" in message


def test_mistakes(data, learnt, tmp_path):
    flags = (*BC, *IMAGES, "--offline_steps=10", f"--save_dir={tmp_path}")
    assert "use one of impala, impala_small" in refused(*flags, f"--dataset={data}", "--agent.encoder=resnet")
    other = write_demonstrations(tmp_path / "large.npz", size=20, episodes=4)
    assert "the environment gives [1, 16, 16, 3] per step" in refused(*flags, f"--dataset={other}")
    with np.load(data) as file:
        np.savez(tmp_path / "blind.npz", **{name: file[name] for name in file.files if name != "images"})
    assert "lacks the array 'images'" in refused(*flags, f"--dataset={tmp_path / 'blind.npz'}")
    robot = [flag.replace("gym:spot_env:Spot-v0", "robot:arm") for flag in flags]
    message = refused(*robot, f"--dataset={tmp_path / 'blind.npz'}", f"--start_from={learnt}")
    assert "image_shape = [1, 16, 16, 3], the agent None" in message
    shutil.rmtree(tmp_path)
    assert os.environ["SPOT_SIZE"] == "16"
