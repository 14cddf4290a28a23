"""Loading OGBench files: rewards, sources, checks and shards."""

import shutil
import urllib.error

import numpy as np
import ogbench
import pytest

from envs import datasets
from envs.datasets import check_horizon, list_shards, load_dataset, load_shard, load_validation
from envs.tasks import make_env, parse_task
from utils.errors import UserError

MAZE = "pointmaze-medium-navigate-v0"
MAZE_TASK = parse_task("pointmaze-medium-navigate-singletask-task1-v0")
SCENE_TASK = parse_task("scene-play-singletask-task1-v0")
ANT_TASK = parse_task("antmaze-large-navigate-singletask-task1-v0")


def task_of(name):
    return parse_task(name.replace("-v0", "-singletask-task1-v0"))


@pytest.fixture
def no_network(monkeypatch):
    """Makes OGBench's download fail after it has written a part of the file."""

    def fail(names, directory):
        with open(f"{directory}/{names[0]}.npz.tmp", "wb") as file:
            file.write(b"half")
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(ogbench, "download_datasets", fail)


def set_physical_state(env, name, arrays, row):
    """Puts an environment into the state of a raw row."""
    base = env.unwrapped
    qpos, qvel = (arrays[key][row].astype(np.float64) for key in ("qpos", "qvel"))
    if name.startswith("pointmaze"):
        base.set_xy(qpos)
        return
    buttons = (arrays["button_states"][row].copy(),) if "button_states" in arrays else ()
    base.set_state(qpos, qvel, *buttons)


def place_solved_rows(name, env, arrays):
    """Writes solved and half-solved states into rows 5 and 6, as short data may hold none."""
    base = env.unwrapped
    if name.startswith("pointmaze"):
        arrays["qpos"][5] = base.cur_goal_xy
        arrays["qpos"][6] = np.add(base.cur_goal_xy, (1.1, 0))
        return
    if "button_states" in arrays:
        arrays["button_states"][5] = base._target_button_states
    for cube in range(getattr(base, "_num_cubes", 0)):
        arrays["qpos"][5, 14 + 7 * cube : 17 + 7 * cube] = base._data.mocap_pos[cube]
    if name.startswith("cube"):
        arrays["qpos"][6, 14:17] = base._data.mocap_pos[0]
    if name.startswith("scene"):
        arrays["qpos"][5, -2:] = base._target_drawer_pos, base._target_window_pos


@pytest.mark.parametrize("name", ["scene-play-v0", "cube-double-noisy-v0", "puzzle-3x3-play-v0", MAZE])
def test_rewards_are_the_environments_own(name, raw_arrays, tmp_path):
    arrays, task = raw_arrays(name), task_of(name)
    env = make_env(task.name)
    env.reset(seed=0)
    place_solved_rows(name, env, arrays)
    np.savez(tmp_path / "data.npz", **arrays)
    train, val, _ = load_dataset(task, dataset_path=tmp_path / "data.npz")
    assert val is None

    rows = [0, 4, 5, 6, 7, *range(10, len(arrays["terminals"]), 9)]
    for row in rows:
        set_physical_state(env, name, arrays, row)
        _, reward, terminated, _, _ = env.unwrapped.step(arrays["actions"][row])
        assert train["rewards"][row] == reward, row
        if name.startswith("pointmaze"):
            assert train["masks"][row] == 1 - terminated, row
    assert (train["rewards"][5], train["masks"][5]) == (0, 0)
    assert len(np.unique(train["rewards"][rows])) >= 2
    assert (train["masks"] == (train["rewards"] != 0)).all()

    sparse = load_dataset(task, dataset_path=tmp_path / "data.npz", sparse=True)[0]
    assert set(np.unique(sparse["rewards"])) == {-1, 0}
    np.testing.assert_array_equal(sparse["rewards"] == 0, train["rewards"] == 0)


def test_rewards_follow_a_replayed_episode(raw_arrays):
    """Replays actions in the task: the reward of step i is the dataset's of row i, not of i - 1 or i + 1."""
    arrays = raw_arrays(MAZE)
    env = make_env(MAZE_TASK.name)
    env.reset(seed=0)
    goal = np.array(env.unwrapped.cur_goal_xy)
    actions = np.concatenate([np.tile([1.0, 0.0], (8, 1)), np.tile([-1.0, 0.0], (10, 1))])
    env.unwrapped.set_xy(goal - [1.55, 0])
    states, rewards = [], []
    for action in actions:
        states.append(env.unwrapped.get_xy())
        rewards.append(env.unwrapped.step(action)[1])
    raw = {key: array[: len(actions)].copy() for key, array in arrays.items()}
    raw["qpos"] = np.array(states, np.float32)
    relabelled = datasets._relabel(MAZE_TASK, env, raw)["rewards"]
    assert set(rewards) == {-1.0, 0.0}
    np.testing.assert_array_equal(relabelled, rewards)


def test_compact_layout(collected, raw_arrays):
    raw = raw_arrays("scene-play-v0")
    train, val, info = load_dataset(SCENE_TASK, dataset_path=collected["scene-play-v0"])
    assert set(train) == {"observations", "actions", "rewards", "masks", "terminals"}
    assert {array.dtype for array in train.values()} == {np.dtype("f4")}
    np.testing.assert_array_equal(train["observations"], raw["observations"])
    np.testing.assert_array_equal(np.flatnonzero(train["terminals"]), [99, 199, 299])
    assert np.abs(raw["actions"]).max() == 1
    assert np.abs(train["actions"]).max() == np.float32(1 - 1e-5)
    assert len(val["terminals"]) == 100
    assert (info.episodes, info.transitions, info.has_val) == (3, 297, True)
    assert str(collected["scene-play-v0"]) in str(info)


def copy_as(collected, name, directory, stem):
    path = collected[name]
    for suffix in ("", "-val"):
        shutil.copy(path.with_name(f"{path.stem}{suffix}.npz"), directory / f"{stem}{suffix}.npz")


def test_auto_takes_the_official_file_then_the_largest_collected_one(collected, tmp_path, no_network):
    copy_as(collected, MAZE, tmp_path, "pointmaze-medium-navigate-v0-20ep")
    copy_as(collected, MAZE, tmp_path, "pointmaze-medium-navigate-v0-100ep")
    info = load_dataset(MAZE_TASK, dataset_dir=tmp_path)[2]
    assert info.path.name == "pointmaze-medium-navigate-v0-100ep.npz"
    assert "largest of 2" in str(info)
    copy_as(collected, MAZE, tmp_path, MAZE)
    info = load_dataset(MAZE_TASK, dataset_dir=tmp_path)[2]
    assert info.path.name == f"{MAZE}.npz"
    assert "OGBench's file" in str(info)


def test_auto_downloads(collected, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ogbench, "download_datasets", lambda names, directory: copy_as(collected, MAZE, tmp_path, names[0])
    )
    _, val, info = load_dataset(MAZE_TASK, dataset_dir=tmp_path)
    assert (info.origin, info.path) == ("downloaded", tmp_path / f"{MAZE}.npz")
    assert val is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{MAZE}-val.npz", f"{MAZE}.npz"]


def test_a_download_cut_short_is_deleted(collected, tmp_path, monkeypatch):
    def cut(names, directory):
        (tmp_path / f"{names[0]}.npz").write_bytes(collected[MAZE].read_bytes()[:-100])

    monkeypatch.setattr(ogbench, "download_datasets", cut)
    with pytest.raises(UserError, match="connection was cut"):
        load_dataset(MAZE_TASK, source="download", dataset_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_network_leads_to_collection(tmp_path, no_network, monkeypatch, capsys):
    asked = {}

    def fake_collect(name, **kwargs):
        asked.update(kwargs, name=name)
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets, "collect", fake_collect)
    with pytest.raises(KeyboardInterrupt):
        load_dataset(MAZE_TASK, dataset_dir=tmp_path, collect_episodes=7, workers=1)
    assert asked == {"name": MAZE, "episodes": 7, "dataset_dir": tmp_path, "workers": 1, "seed": 0}
    assert "collecting" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []  # The half-written file is gone.


def test_collect_makes_the_asked_size(tmp_path, no_network):
    _, val, info = load_dataset(MAZE_TASK, source="collect", dataset_dir=tmp_path, collect_episodes=2, workers=1)
    assert info.path.name == "pointmaze-medium-navigate-v0-2ep.npz"
    assert (info.episodes, info.transitions, len(val["rewards"])) == (2, 2000, 1001)


def test_no_network_and_no_oracle(tmp_path, no_network):
    with pytest.raises(UserError, match=r"antmaze-large-navigate-v0\.npz") as caught:
        load_dataset(ANT_TASK, dataset_dir=tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match="cannot download"):
        load_dataset(MAZE_TASK, source="download", dataset_dir=tmp_path)
    with pytest.raises(UserError, match="expert"):
        load_dataset(ANT_TASK, source="collect", dataset_dir=tmp_path)
    with pytest.raises(UserError, match="source"):
        load_dataset(ANT_TASK, source="magic", dataset_dir=tmp_path)


def drop(key):
    return lambda arrays: arrays.pop(key)


def put(key, row, value):
    return lambda arrays: arrays[key].__setitem__(row, value)


def cut(key):
    return lambda arrays: arrays.update({key: arrays[key][:-1]})


def narrow(key):
    return lambda arrays: arrays.update({key: arrays[key][:, :-1]})


def empty(arrays):
    arrays.update({key: array[:0] for key, array in arrays.items()})


@pytest.mark.parametrize(
    ("damage", "hint"),
    [
        (drop("qpos"), "lacks the array 'qpos'"),
        (drop("button_states"), "lacks the array 'button_states'"),
        (put("observations", 3, np.nan), "'observations' .*NaN .*row 3"),
        (put("actions", 4, np.inf), "'actions' .*NaN or infinite .*row 4"),
        (put("qpos", 5, np.nan), "'qpos' .*NaN"),
        (cut("actions"), "differ in length .*actions 299"),
        (narrow("observations"), r"'observations' .*\[300, 39\].*\[N, 40\]"),
        (narrow("actions"), r"'actions' .*\[N, 5\]"),
        (narrow("qpos"), "'qpos' .*another environment"),
        (narrow("button_states"), "'button_states' .*another environment"),
        (empty, "is empty"),
        (lambda arrays: arrays.update(terminals=np.full(300, 2)), "'terminals' .*0 or 1"),
        (lambda arrays: arrays.update(actions=np.full((300, 5), "x")), "not numbers"),
        (lambda arrays: arrays.update(actions=np.full((300, 5), None)), "damaged"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(damage, hint, raw_arrays, tmp_path):
    arrays = raw_arrays("scene-play-v0")
    damage(arrays)
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=hint) as caught:
        load_dataset(SCENE_TASK, dataset_path=path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_one_line_that_names_it(collected, tmp_path):
    good = collected["scene-play-v0"].read_bytes()
    flipped = bytearray(good)
    flipped[5000:5100] = bytes(100)
    array = tmp_path / "array.npy"
    np.save(array, np.zeros(3))
    bad_files = {"cut": good[:-2000], "flipped": bytes(flipped), "text": b"hello", "empty": b""}
    bad_files["npy"] = array.read_bytes()
    for label, content in bad_files.items():
        path = tmp_path / f"{label}.npz"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged or no \.npz file") as caught:
            load_dataset(SCENE_TASK, dataset_path=path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="there is no file"):
        load_dataset(SCENE_TASK, dataset_path=tmp_path / "missing.npz")
    with pytest.raises(UserError, match="cannot read"):
        load_dataset(SCENE_TASK, dataset_path=tmp_path)


def test_another_environments_file(collected):
    with pytest.raises(UserError, match="another environment"):
        load_dataset(parse_task("cube-single-play-singletask-v0"), dataset_path=collected["cube-double-noisy-v0"])


def test_check_horizon():
    dataset = {"terminals": np.array([0, 0, 1, 0, 0, 0, 0, 1, 0, 1], np.float32)}
    check_horizon(dataset, 4)
    with pytest.raises(UserError, match=r"5 consecutive transitions .*longest has 4"):
        check_horizon(dataset, 5)


def test_shards(collected, tmp_path):
    for stem in ("scene-play-v0-001", "scene-play-v0-000"):
        copy_as(collected, "scene-play-v0", tmp_path, stem)
    shards = list_shards(tmp_path)
    assert [path.name for path in shards] == ["scene-play-v0-000.npz", "scene-play-v0-001.npz"]
    dense = load_shard(SCENE_TASK, shards[0])
    sparse = load_shard(SCENE_TASK, shards[0], sparse=True)
    assert dense["rewards"].min() < -1
    assert sparse["rewards"].min() == -1
    assert len(load_validation(SCENE_TASK, shards[1])["rewards"]) == 100
    for nowhere in (tmp_path / "nowhere", collected["scene-play-v0"]):
        with pytest.raises(UserError, match=r"no \.npz files"):
            list_shards(nowhere)
