"""Datasets that Minari itself has written, by its DataCollector and from buffers, in both of its stores."""

import copy
import csv
import json
import sys
import warnings
from pathlib import Path

import goal_env  # registers Goal-v0
import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from tiny_runs import BC, OTQL, assert_same_run, call, interrupted, refused, run_dir, run_main

import experiments.evaluate
import online_main
from envs import minari_store
from envs.datasets import load_dataset, sized_env
from envs.tasks import make_env, parse_task
from utils.errors import UserError
from utils.output.loggers import read_csv

minari = pytest.importorskip("minari", reason="Minari is an optional dependency: pip install '.[minari]'")
from minari.data_collector import EpisodeBuffer  # noqa: E402

VECTOR = Box(-10, 10, (1,), np.float32)


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """An empty local store, and modules of tests on the path of workers."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    monkeypatch.setenv("PYTHONPATH", str(Path(goal_env.__file__).parent), prepend=":")
    (tmp_path / "store").mkdir()
    sized_env.cache_clear()
    warnings.simplefilter("ignore", UserWarning)  # Minari asks for authors and links.
    return tmp_path / "store"


def collect(name, env_id="Goal-v0", episodes=3, data_format="hdf5", make=None, jpeg_encoding=False, **about):
    """Collects random play; returns the rows that the environment gave and took."""
    env = gymnasium.make(env_id, **(make or {}))
    collector = minari.DataCollector(env, data_format=data_format, jpeg_encoding=jpeg_encoding)
    collector.action_space.seed(0)
    rows = []
    for episode in range(episodes):
        observation, _ = collector.reset(seed=episode)
        over = False
        while not over:
            action = collector.action_space.sample()
            following, reward, terminated, truncated, _ = collector.step(action)
            rows.append((observation, action, reward, following, terminated, truncated))
            observation, over = following, terminated or truncated
    collector.create_dataset(name, **about)
    return rows


def buffers(name, episodes, env=None, observation_space=VECTOR, action_space=None, **about):
    """Writes episodes, (observations, rewards, terminations, truncations) each, with actions of 0.5."""
    content = [
        EpisodeBuffer(
            observations=observations,
            actions=[np.full(1, 0.5, np.float32) for _ in rewards],
            rewards=list(rewards),
            terminations=list(terminations),
            truncations=list(truncations),
        )
        for observations, rewards, terminations, truncations in episodes
    ]
    action_space = action_space or Box(-1, 1, (1,), np.float32)
    spaces = {"observation_space": observation_space, "action_space": action_space}
    minari.create_dataset_from_buffers(name, content, env=env, **spaces, **about)


def states(*numbers):
    return [np.array([number], np.float32) for number in numbers]


def load(name):
    dataset, _, info = load_dataset(parse_task(f"minari:{name}"))
    return dataset, info.card


def error_of(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_every_step_is_a_transition(data_format):
    rows = collect("pendulum/test-v0", "Pendulum-v1", 3, data_format, {"max_episode_steps": 7})
    dataset, card = load("pendulum/test-v0")
    followed = np.flatnonzero(dataset["terminals"] == 0)
    observations, actions, rewards, following = (np.stack(column) for column in list(zip(*rows, strict=True))[:4])
    np.testing.assert_array_equal(dataset["observations"][followed], observations)
    np.testing.assert_array_equal(dataset["observations"][followed + 1], following)
    np.testing.assert_allclose(dataset["actions"][followed], actions / 2, atol=2e-5)  # The bounds are ±2.
    np.testing.assert_allclose(dataset["rewards"][followed], rewards, rtol=1e-6)
    assert dataset["masks"].all() and card.ends["cut by a time limit"] == 3 and card.lengths == (7, 7, 7)
    assert "[-2, 2] in the environment, rescaled to [-1, 1]" in "\n".join(card.lines())
    assert card.observed == ""


def test_a_mujoco_task():
    """Falls of the hopper are terminations; actions in [-1, 1] are not rescaled."""
    rows = collect("hopper/test-v0", "Hopper-v5", 4, make={"max_episode_steps": 30})
    dataset, card = load("hopper/test-v0")
    ends = np.flatnonzero([terminated or truncated for *_, terminated, truncated in rows])
    fell = [rows[end][4] for end in ends]
    last = np.flatnonzero(dataset["terminals"])
    np.testing.assert_array_equal(dataset["masks"][last - 1] == 0, fell)
    assert card.ends["truly terminated"] == sum(fell) > 0 and card.bounds == ""
    followed = dataset["terminals"] == 0
    np.testing.assert_allclose(dataset["actions"][followed], [action for _, action, *_ in rows], atol=2e-5)
    assert make_env("minari:hopper/test-v0").reset(seed=0)[0].shape == (11,)


def test_terminations_and_truncations_are_minaris():
    zeros = [False] * 3
    buffers(
        "ends/all-v0",
        [
            (states(0, 1, 2, 3), (1.0, 2.0, 3.0), [False, False, True], zeros),
            (states(10, 11, 12, 13), (4.0, 5.0, 6.0), zeros, [False, False, True]),
            (states(20, 21, 22, 23), (7.0, 8.0, 9.0), zeros, zeros),
            (states(30, 31, 32, 33), (1.0, 1.5, 2.0), [True, False, False], [False, False, True]),
            (states(40, 41, 42, 43), (1.0, 1.5, 2.5), [False, False, True], [False, False, True]),
        ],
    )
    dataset, card = load("ends/all-v0")
    # An end of either kind closes an episode; the one in the middle splits the fourth.
    expected = [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 31, 32, 33, 40, 41, 42, 43]
    np.testing.assert_array_equal(dataset["observations"][:, 0], expected)
    np.testing.assert_array_equal(np.flatnonzero(dataset["masks"] == 0), [2, 12, 19])
    np.testing.assert_array_equal(np.flatnonzero(dataset["terminals"]), [3, 7, 11, 13, 16, 20])
    assert (card.ends["truly terminated"], card.ends["cut by a time limit"]) == (3, 3)
    text = "\n".join(card.warnings)
    assert "1 of 5 episodes of ends/all-v0 end without a termination or truncation" in text
    assert "1 steps of ends/all-v0 mark an end inside an episode" in text


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_dictionaries_are_joined_by_the_order_of_their_names(data_format):
    rows = collect("goal/test-v0", data_format=data_format)
    dataset, card = load("goal/test-v0")
    followed = np.flatnonzero(dataset["terminals"] == 0)
    expected = [np.r_[o["arm"]["position"], o["desired_goal"], o["observation"]] for o, *_ in rows]
    np.testing.assert_allclose(dataset["observations"][followed], expected, rtol=1e-6)
    assert card.observed == "arm/position [1], desired_goal [1], observation [2]"
    assert "observed arm/position [1], desired_goal [1], observation [2]" in "\n".join(card.lines())
    env = make_env("minari:goal/test-v0")
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(observation, dataset["observations"][0])
    assert env.action_space.low == -1 and env.action_space.high == 1
    moved = env.step(np.array([0.5], np.float32))[0]  # Half of the bound, 2.
    assert moved[2] - observation[2] == pytest.approx(0.2)


def test_images_go_to_the_encoders(tmp_path):
    rows = collect("goal/cameras-v0", make={"cameras": True})
    dataset, card = load("goal/cameras-v0")
    followed = np.flatnonzero(dataset["terminals"] == 0)
    assert dataset["images"].shape[1:] == (2, 32, 32, 3) and dataset["images"].dtype == np.uint8
    for index, (observation, *_) in zip(followed, rows, strict=True):
        np.testing.assert_array_equal(dataset["images"][index, 0], observation["front"])
        np.testing.assert_array_equal(dataset["images"][index, 1], observation["grey"][..., None].repeat(3, axis=-1))
    assert card.observed.endswith("observation [2], front [32, 32, 3], grey [32, 32]")
    observation, _ = make_env("minari:goal/cameras-v0").reset(seed=0)
    np.testing.assert_array_equal(observation.images, dataset["images"][0])
    np.testing.assert_array_equal(observation.state, dataset["observations"][0])
    task = ("--env_name=minari:goal/cameras-v0", "--agent.encoder=impala_tiny")
    run_main(*BC, *task, f"--save_dir={tmp_path}", "--offline_steps=1", "--horizon_length=1")
    settings = json.loads((run_dir(tmp_path) / "flags.json").read_text())
    assert settings["image_shape"] == [2, 32, 32, 3] and settings["observation_dim"] == 4


def test_the_environment_for_evaluation_is_taken():
    eval_env = copy.deepcopy(gymnasium.spec("Goal-v0"))
    eval_env.max_episode_steps = 5
    collect("goal/eval-v0", eval_env=eval_env)
    assert make_env("minari:goal/eval-v0").get_wrapper_attr("spec").max_episode_steps == 5
    collect("goal/plain-v0")
    assert make_env("minari:goal/plain-v0").get_wrapper_attr("spec").max_episode_steps == 12
    assert make_env("minari:goal/plain-v0", render_mode="rgb_array").get_wrapper_attr("render_mode") == "rgb_array"


def test_reference_scores_normalise_returns(tmp_path):
    collect("goal/scored-v0", eval_env="Goal-v0", ref_min_score=-3.0, ref_max_score=5.0)
    card = load("goal/scored-v0")[1]
    expected = minari.get_normalized_score(minari.load_dataset("goal/scored-v0"), np.array(card.returns))
    np.testing.assert_allclose(card.scores(), expected)
    assert "(0: return -3, 1: return 5)" in "\n".join(card.lines())
    outcome = run_main(*BC, "--env_name=minari:goal/scored-v0", f"--save_dir={tmp_path}", "--offline_steps=1")
    table = read_csv(run_dir(tmp_path) / "eval.csv")
    score = (table["return_mean"][-1] + 3) / 8
    assert table["normalized_score"][-1] == pytest.approx(score) and f"normalised score {score:.3f}" in outcome.out
    assert "success" in outcome.out  # The environment reports it.
    again = run_main(str(run_dir(tmp_path)), "--episodes=1", program=experiments.evaluate)
    (row,) = csv.DictReader((run_dir(tmp_path) / "evaluations.csv").open())
    assert float(row["normalized_score"]) == pytest.approx((float(row["return_mean"]) + 3) / 8)
    assert f"(score {float(row['normalized_score']):.3f})" in again.out
    collect("goal/unscored-v0")
    assert minari_store.reference_scores("minari:goal/unscored-v0") is None
    assert minari_store.reference_scores("gym:Pendulum-v1") is None


def test_actions_beyond_the_space_are_clipped_and_counted():
    episode = (states(0, 1, 2), (1.0, 2.0), [False, True], [False, False])
    buffers("wide/test-v0", [episode], action_space=Box(-0.25, 1, (1,), np.float32))
    assert load("wide/test-v0")[0]["actions"][0, 0] == pytest.approx(0.2)  # 0.5 between -0.25 and 1.
    buffers("narrow/test-v0", [episode], action_space=Box(-0.25, 0.25, (1,), np.float32))
    dataset, card = load("narrow/test-v0")
    assert dataset["actions"][0, 0] == pytest.approx(1, abs=1e-4)
    assert "2 of 2 actions of narrow/test-v0 are beyond the action space, and are clipped" in card.warnings


@pytest.mark.parametrize("odd", ["text", "discrete", "tuple"])
def test_observations_that_cannot_be_trained_on(odd):
    collect("goal/odd-v0", make={"odd": odd}, episodes=1)
    assert "observations 'odd' in" in (line := error_of(load, "goal/odd-v0")) and "only Box" in line


def test_actions_that_cannot_be_trained_on():
    collect("cart/test-v0", "CartPole-v1", 1)
    assert "discrete actions in Discrete(2)" in error_of(load, "cart/test-v0")
    episode = [(states(0, 1, 2), (1.0, 2.0), [False, True], [False, False])]
    buffers("free/test-v0", episode, action_space=Box(-np.inf, np.inf, (1,), np.float32))
    assert "unbounded actions" in error_of(load, "free/test-v0")


def test_a_dataset_without_an_environment(tmp_path):
    """Is trained on without evaluations; with them, one line says so before training."""
    episode = (states(*range(9)), [float(i) for i in range(8)], [False] * 7 + [True], [False] * 8)
    buffers("alone/test-v0", [episode])
    flags = (*BC, "--env_name=minari:alone/test-v0", f"--save_dir={tmp_path}", "--offline_steps=1")
    line = refused(*flags)
    assert "alone/test-v0 names no environment to evaluate in; train on it with --eval_episodes=0" in line
    run_main(*flags, "--eval_episodes=0")


def test_an_environment_that_cannot_be_made(store, monkeypatch):
    collect("goal/gone-v0")
    path = store / "goal/gone-v0/data/metadata.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"env_spec": about["env_spec"].replace("goal_env:Goal", "no_such_module:Goal")}))
    line = error_of(make_env, "minari:goal/gone-v0")
    assert "No module named 'no_such_module'; install no-such-module, or train with --eval_episodes=0" in line
    path.write_text(path.read_text().replace('"dataset_id"', '"requirements": ["arms>=3"], "dataset_id"'))
    assert "the dataset asks for: pip install arms>=3" in error_of(make_env, "minari:goal/gone-v0")


def test_an_environment_of_other_spaces(store):
    collect("goal/wide-v0")
    path = store / "goal/wide-v0/data/metadata.json"
    about = json.loads(path.read_text())
    for change, said in {
        '"kwargs": {"bound": 1.0}': "has actions in [-1, 1], the dataset in [-2, 2]",
        '"kwargs": {"cameras": true}': "front [32, 32, 3], grey [32, 32], the dataset arm/position [1]",
    }.items():
        path.write_text(json.dumps(about | {"env_spec": about["env_spec"].replace('"kwargs": {}', change)}))
        assert said in error_of(make_env, "minari:goal/wide-v0")


def test_names_that_are_none(store, monkeypatch):
    for name in ("", "door", "door/human", "../door-v0", "a b-v0", "door/human-v0/", "/door-v1"):
        assert "does not name a dataset; write for example" in error_of(parse_task, f"minari:{name}")
    collect("goal/test-v0", episodes=1)
    monkeypatch.setattr(minari, "download_dataset", lambda name: 1 / 0)
    line = error_of(load, "goal/tets-v0")
    assert "is not in Minari's local store" in line and "cannot be downloaded (ZeroDivisionError" in line
    assert "did you mean --env_name=minari:goal/test-v0?" in line
    monkeypatch.setitem(sys.modules, "minari", None)
    assert "pip install '.[minari]'" in error_of(load, "goal/test-v0")


def test_a_dataset_that_is_not_there_is_downloaded(store, monkeypatch, capsys):
    asked = []

    def download(name):
        asked.append(name)
        collect(name)

    monkeypatch.setattr(minari, "download_dataset", download)
    assert load("goal/far-v0")[1].episodes == 3 and asked == ["goal/far-v0"]
    assert "does not hold goal/far-v0: downloading it" in capsys.readouterr().err
    load("goal/far-v0")
    assert asked == ["goal/far-v0"]


def test_damaged_datasets(store):
    collect("goal/test-v0")
    file = store / "goal/test-v0/data/main_data.hdf5"
    file.write_bytes(file.read_bytes()[:3000])
    assert "cannot read the episodes of goal/test-v0" in error_of(load, "goal/test-v0")
    (store / "goal/test-v0/data/metadata.json").write_text("{}")
    assert "cannot read Minari's dataset goal/test-v0" in error_of(load, "goal/test-v0")
    buffers("short/test-v0", [(states(0, 1), (1.0, 2.0), [False, True], [False, False])])
    assert "does not hold 3 observations" in error_of(load, "short/test-v0")
    buffers("nan/test-v0", [(states(0, np.nan, 2), (1.0, 2.0), [False, True], [False, False])])
    assert "'observations' in" in (line := error_of(load, "nan/test-v0")) and "NaN or infinite" in line


def test_steps_that_a_store_has_lost():
    collect("goal/test-v0", data_format="arrow")
    dataset = minari.load_dataset("goal/test-v0")
    dataset.storage.update_episode_metadata([{"total_steps": 99}], [1])
    assert "episode 1 of goal/test-v0 has" in (line := error_of(load, "goal/test-v0")) and "should have 99" in line


def test_no_other_data_beside_it(tmp_path):
    collect("goal/test-v0")
    task = "--env_name=minari:goal/test-v0"
    assert "goal/test-v0 names its dataset; leave out --dataset" in refused(*BC, task, f"--dataset={tmp_path}/a.npz")
    np.savez(tmp_path / "a.npz", actions=np.zeros((3, 1)))
    assert "leave out other files" in refused(*BC, task, f"--ogbench_dataset_dir={tmp_path}")


def test_the_store_is_listed(store):
    empty = call("--env_name=minari:list")
    assert empty.code == 0 and "holds no datasets" in empty.out and "python -m envs.record" in empty.out
    collect("goal/test-v0", eval_env="Goal-v0", ref_min_score=0.0, ref_max_score=1.0)
    buffers("alone/test-v0", [(states(0, 1, 2), (1.0, 2.0), [False, True], [False, False])])
    text = call("--env_name=minari:list").out
    assert f"{store} holds 2 datasets" in text and "minari:goal/test-v0" in text
    assert "Goal-v0; hdf5, with reference scores" in text and "1 episodes, 2 steps" in text and "no environment" in text


def test_a_run_resumes_after_a_signal(tmp_path, interrupt_at):
    collect("goal/test-v0", episodes=6)
    flags = (*OTQL, "--env_name=minari:goal/test-v0", "--offline_steps=8", "--log_interval=2", "--save_interval=4")
    flags += ("--eval_interval=4", "--horizon_length=1", "--reward_scale=2", "--reward_shift=-1")
    run_main(*flags, f"--save_dir={tmp_path}/whole")
    interrupt_at(4)
    interrupted(*flags, f"--save_dir={tmp_path}/cut")
    run_main(*flags, f"--save_dir={tmp_path}/cut")
    assert_same_run(run_dir(tmp_path / "whole"), run_dir(tmp_path / "cut"))


def test_online_training_in_the_recovered_environment(tmp_path):
    collect("goal/test-v0")
    flags = ("--env_name=minari:goal/test-v0", f"--save_dir={tmp_path}", "--offline_steps=2", "--online_steps=26")
    run_main(*OTQL, *flags, "--horizon_length=1", "--start_training=24", "--eval_episodes=0")
    table = read_csv(run_dir(tmp_path) / "online.csv")
    assert len(table["length"]) == 2 and set(table["success"]) <= {0, 1}
    line = refused("--env_name=minari:goal/test-v0", f"--save_dir={tmp_path}/b", program=online_main)
    assert "main.py --online_steps=… trains on Minari's dataset" in line


def test_units_that_are_given_win():
    episode = (states(0, 1, 2), (1.0, 2.0), [False, True], [False, False])
    buffers("narrow/test-v0", [episode], action_space=Box(-0.25, 0.25, (1,), np.float32))
    dataset, _, info = load_dataset(parse_task("minari:narrow/test-v0"), actions="scaled")
    assert dataset["actions"][0, 0] == 0.5 and not any("clipped" in warning for warning in info.card.warnings)


def test_a_finished_run_notices_other_episodes(tmp_path):
    collect("goal/test-v0")
    flags = (*BC, "--env_name=minari:goal/test-v0", f"--save_dir={tmp_path}", "--offline_steps=1", "--eval_episodes=0")
    run_main(*flags)
    assert "nothing to do" in run_main(*flags).out
    collect("goal/more-v0")
    minari.load_dataset("goal/test-v0").storage.update_from_storage(minari.load_dataset("goal/more-v0").storage)
    outcome = call(*flags)
    assert outcome.code == 2 and "holds a run with dataset.checksum" in outcome.err.splitlines()[-1]


def test_a_space_of_one_kind_of_number():
    """A plain vector keeps its order, one of two axes is flattened, and small images are numbers."""
    from envs.observation_layout import layout_of

    layout = layout_of("x", gymnasium.spaces.Dict({"b": Box(-1, 1, (2, 2)), "a": Box(0, 255, (4, 4, 3), np.uint8)}))
    batch = {"a": np.arange(96).reshape(2, 4, 4, 3), "b": np.arange(8).reshape(2, 2, 2)}
    np.testing.assert_array_equal(layout.states(batch, 2)[1], np.r_[48:96, 4:8])
    assert layout.image_shape is None and layout.width == 52 and not layout.plain
    stack = layout_of("x", gymnasium.spaces.Dict({"images": Box(0, 255, (2, 40, 48, 3), np.uint8)}))
    assert stack.image_shape == (2, 40, 48, 3) and stack.width == 0
    sizes = {"a": Box(0, 255, (40, 48, 3), np.uint8), "b": Box(0, 255, (40, 40, 3), np.uint8)}
    assert "images of several sizes" in error_of(layout_of, "x", gymnasium.spaces.Dict(sizes))
    assert "1 or 3 channels" in error_of(layout_of, "x", Box(0, 255, (40, 40, 4), np.uint8))
    assert "has observations in Discrete(3)" in error_of(layout_of, "x", Discrete(3))


def test_point_mazes():
    robotics = pytest.importorskip("gymnasium_robotics", reason="needs gymnasium-robotics: pip install '.[minari]'")
    gymnasium.register_envs(robotics)
    rows = collect("maze/test-v0", "PointMaze_UMaze-v3", 2, make={"max_episode_steps": 9})
    dataset, card = load("maze/test-v0")
    assert card.observed == "achieved_goal [2], desired_goal [2], observation [4]"
    first = rows[0][0]
    expected = np.r_[first["achieved_goal"], first["desired_goal"], first["observation"]]
    np.testing.assert_allclose(dataset["observations"][0], expected, rtol=1e-6)
    np.testing.assert_allclose(make_env("minari:maze/test-v0").reset(seed=0)[0], expected, rtol=1e-6)
