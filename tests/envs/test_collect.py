"""Collection: determinism, resumption, formats, names and errors."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import ogbench
import pytest

from envs.collect import collect, main
from envs.datasets import load_file
from envs.npz import write_npz
from envs.ogbench import oracles, specs
from envs.ogbench.oracles import Collector
from envs.ogbench.specs import DATASET_SPECS, file_stem, find_collected, find_spec
from envs.tasks import parse_task
from utils.errors import UserError
from utils.system.entry_point import run_main
from utils.system.rendering import rendering_backend

ROOT = Path(__file__).parents[2]
MAZE = "pointmaze-medium-navigate-v0"


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_files_do_not_depend_on_the_number_of_workers(collected, tmp_path):
    with_two = collected["scene-play-v0"]
    with_one = collect("scene-play-v0", episodes=3, max_steps=100, dataset_dir=tmp_path, workers=1)
    for suffix in (".npz", "-val.npz"):
        name = with_one.stem + suffix
        assert (with_one.parent / name).read_bytes() == (with_two.parent / name).read_bytes()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npz", ".npz"]  # No parts, no lock.


def test_episodes_differ_from_each_other(raw_arrays, collected):
    first, second, _ = np.split(raw_arrays("scene-play-v0")["observations"], 3)
    path = collected["scene-play-v0"]
    val = np.load(path.with_name(f"{path.stem}-val.npz"))["observations"]
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, val)


# 'noisy' in the scene is the case in which OGBench's environment carries something over a reset.
@pytest.mark.parametrize(("name", "steps"), [("scene-noisy-v0", 300), ("pointmaze-teleport-navigate-v0", 200)])
def test_an_episode_does_not_depend_on_the_one_before(name, steps):
    used, fresh = (Collector(find_spec(name), steps) for _ in range(2))
    used.episode(0, "train", 0)
    expected = fresh.episode(0, "train", 1)
    assert same(used.episode(0, "train", 1), expected)
    assert not same(used.episode(1, "train", 1), expected)


def test_a_redrawn_scene_episode_is_a_function_of_its_index(monkeypatch):
    collector = Collector(find_spec("scene-play-v0"), 20)
    plain = collector.episode(0, "train", 0)
    redrawn = []
    for _ in range(2):
        verdicts = iter([False, True])
        monkeypatch.setattr(oracles, "_cube_stays_visible", lambda qpos, verdicts=verdicts: next(verdicts))
        redrawn.append(collector.episode(0, "train", 0))
    assert same(*redrawn)
    assert not same(redrawn[0], plain)
    assert len(redrawn[0]["terminals"]) == 20


@pytest.mark.parametrize(
    ("xyz", "fine"),
    [((0.4, 0.0, 0.02), True), ((0.4, 0.3, 0.02), False), ((0.4, -0.35, 0.02), False), ((0.4, -0.35, 0.07), True)],
)
def test_scene_health(xyz, fine):
    qpos = np.zeros((2, 25))
    qpos[1, 14:17] = xyz
    assert oracles._cube_stays_visible(list(qpos)) == fine


@pytest.mark.filterwarnings("ignore:.*precision lowered")
@pytest.mark.parametrize("name", ["scene-play-v0", "cube-double-noisy-v0", "puzzle-3x3-play-v0", MAZE])
def test_format_is_ogbenchs(name, collected, raw_arrays):
    arrays = raw_arrays(name)
    kinds = {key: array.dtype for key, array in arrays.items()}
    expected = {"observations": "f4", "actions": "f4", "terminals": "?", "qpos": "f4", "qvel": "f4"}
    if name.startswith(("scene", "puzzle")):
        expected["button_states"] = "i8"
    assert kinds == {key: np.dtype(kind) for key, kind in expected.items()}
    episodes = {"cube-double-noisy-v0": 2, "puzzle-3x3-play-v0": 2}.get(name, 3)
    rows = len(arrays["terminals"]) // episodes
    assert np.flatnonzero(arrays["terminals"]).tolist() == [rows * (k + 1) - 1 for k in range(episodes)]
    assert np.abs(arrays["actions"]).max() <= 1

    single = name.replace("-v0", "-singletask-task1-v0")
    _, train, val = ogbench.make_env_and_datasets(single, dataset_path=str(collected[name]))
    assert train["observations"].shape[0] == episodes * (rows - 1)
    assert val["next_observations"].shape[0] == rows - 1
    np.testing.assert_array_equal(train["next_observations"][0], arrays["observations"][1])


def test_physical_state_is_the_one_acted_from(raw_arrays):
    scene = raw_arrays("scene-play-v0")
    np.testing.assert_array_equal(scene["observations"][:, :6], scene["qpos"][:, :6])  # The arm's joints.
    one_hot = scene["observations"][:, [28, 29, 32, 33]].reshape(-1, 2, 2)
    np.testing.assert_array_equal(one_hot.argmax(axis=2), scene["button_states"])
    maze = raw_arrays(MAZE)
    np.testing.assert_array_equal(maze["observations"], maze["qpos"])


def test_the_oracles_do_their_task():
    rows = Collector(find_spec("puzzle-3x3-play-v0"), 300).episode(0, "train", 0)
    presses = np.abs(np.diff(rows["button_states"], axis=0)).sum()
    assert presses >= 3
    maze = Collector(find_spec(MAZE), 400).episode(0, "train", 0)
    assert len(np.unique(np.round(maze["qpos"] / 4), axis=0)) >= 8  # Cells of 4 m visited.


@pytest.mark.check
def test_settings_are_those_of_the_released_datasets():
    sizes = {name: (r.episodes, r.max_steps) for name, r in DATASET_SPECS.items()}
    assert len(DATASET_SPECS) == 44
    assert sizes["scene-play-v0"] == sizes["cube-double-noisy-v0"] == (1000, 1001)
    assert sizes["cube-triple-play-v0"] == sizes["puzzle-4x5-noisy-v0"] == (3000, 1001)
    assert sizes["cube-quadruple-play-v0"] == sizes["puzzle-4x6-play-v0"] == (5000, 1001)
    assert sizes["pointmaze-giant-navigate-v0"] == (500, 2001)
    assert sizes["pointmaze-giant-stitch-v0"] == (5000, 201)
    assert DATASET_SPECS["cube-triple-play-v0"].p_stack == (0.05, 0.35)
    assert DATASET_SPECS["scene-play-v0"].p_stack == (0.5, 0.5)
    assert (DATASET_SPECS["cube-single-noisy-v0"].p_random, DATASET_SPECS["puzzle-3x3-noisy-v0"].p_random) == (0.1, 0.2)
    assert specs.val_episodes(1000) == 100
    assert specs.val_episodes(3) == 1


def test_names_tell_datasets_apart_and_are_found_again(tmp_path):
    spec = DATASET_SPECS["scene-play-v0"]
    stems = {
        (1000, 0, 1001): "scene-play-v0",
        (200, 0, 1001): "scene-play-v0-200ep",
        (200, 3, 1001): "scene-play-v0-200ep-sd3",
        (1000, 3, 1001): "scene-play-v0-sd3",
        (300, 0, 50): "scene-play-v0-300ep-50steps",
    }
    for (episodes, seed, max_steps), stem in stems.items():
        assert file_stem(spec, episodes, seed, max_steps) == stem
        (tmp_path / f"{stem}.npz").touch()
        (tmp_path / f"{stem}-val.npz").touch()
    (tmp_path / "scene-play-v0-big.npz").touch()
    (tmp_path / "cube-double-play-v0-900ep.npz").touch()
    found = find_collected(tmp_path, "scene-play-v0")
    assert [(f.episodes, f.seed, f.max_steps) for f in found] == [
        (1000, 3, 1001),
        (300, 0, 50),
        (200, 0, 1001),
        (200, 3, 1001),
    ]
    assert found[2].path.name == "scene-play-v0-200ep.npz"
    assert find_collected(tmp_path / "nowhere", "scene-play-v0") == []


def test_resumes_after_a_kill_and_keeps_what_was_there(tmp_path):
    arguments = {"episodes": 80, "max_steps": 400, "workers": 1}
    code = f"from envs.collect import collect; collect('{MAZE}', dataset_dir={str(tmp_path)!r}, **{arguments})"
    parts = tmp_path / f"{file_stem(DATASET_SPECS[MAZE], 80, 0, 400)}.parts"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(parts.glob("train-*"))) >= 2)
    process.kill()
    process.wait()
    wait_for(lambda: is_quiet(parts))  # The worker notices that it is alone.
    done = sorted(parts.glob("train-*"))
    assert 2 <= len(done) < 80  # No orphan made the rest.

    with np.load(done[0]) as rows:
        marked = {key: rows[key] for key in rows.files}
    marked["observations"] = marked["observations"] + 100
    write_npz(done[0], marked)
    done[1].write_bytes(done[1].read_bytes()[:300])  # Cut short, as by a full disk.

    path = collect(MAZE, dataset_dir=tmp_path, **arguments)
    assert not parts.exists()
    expected = Collector(DATASET_SPECS[MAZE], 400)
    observations = np.split(np.load(path)["observations"], 80)
    np.testing.assert_array_equal(observations[0], marked["observations"])  # Kept, not made anew.
    for index in (1, 2, 79):
        np.testing.assert_array_equal(observations[index], expected.episode(0, "train", index)["observations"])


def is_quiet(folder):
    """True if nothing is written into a folder for half a second."""
    before = sorted(folder.iterdir())
    time.sleep(0.5)
    return sorted(folder.iterdir()) == before


def test_a_dead_worker_is_one_line_and_costs_nothing(tmp_path):
    parts = tmp_path / f"{file_stem(DATASET_SPECS[MAZE], 300, 0, 400)}.parts"

    def kill_a_worker():
        wait_for(lambda: list(parts.glob("train-*")))
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    with pytest.raises(UserError, match="a worker died") as caught:
        collect(MAZE, episodes=300, max_steps=400, dataset_dir=tmp_path, workers=1)
    killer.join()
    assert str(parts) in str(caught.value)
    assert list(parts.glob("train-*"))


@pytest.mark.parametrize("early", [True, False])
def test_ctrl_c_ends_in_one_line_and_keeps_the_parts(early, tmp_path):
    command = [sys.executable, "-m", "envs.collect", f"--env_name={MAZE}", f"--dataset_dir={tmp_path}", "--workers=1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    parts = tmp_path / f"{MAZE}.parts"
    wait_for(lambda: list(parts.glob("settings.json" if early else "train-*")))
    time.sleep(0.3 if early else 0)  # Early: the worker is still importing.
    os.killpg(process.pid, signal.SIGINT)  # As a terminal does: to parent and workers.
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("stopped; ")
    assert early or list(parts.glob("train-*"))


def run(*argv, monkeypatch):
    """Runs the command line; returns the exit code."""
    monkeypatch.setattr(sys, "argv", list(argv))
    with pytest.raises(SystemExit) as end:
        run_main(main)
    return end.value.code


def test_ctrl_c_without_a_message_is_reported(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("envs.collect.collect", interrupt)
    assert run("collect", f"--env_name={MAZE}", monkeypatch=monkeypatch) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_workers_do_not_import_the_callers_main_module(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(  # No __main__ guard, on purpose.
        f"open({str(tmp_path / 'log')!r}, 'a').write('x')\n"
        "from envs.collect import collect\n"
        f"collect('{MAZE}', episodes=1, max_steps=10, dataset_dir={str(tmp_path)!r}, workers=2)\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, script], check=True, env=env, capture_output=True, timeout=40)
    assert (tmp_path / "log").read_text() == "x"


def test_a_finished_dataset_is_left_alone(collected, capsys):
    path = collected["scene-play-v0"]
    before = path.stat().st_mtime_ns
    assert collect("scene-play-v0", episodes=3, max_steps=100, dataset_dir=path.parent, workers=2) == path
    assert path.stat().st_mtime_ns == before
    assert "already exists" in capsys.readouterr().err


def test_other_settings_are_not_mixed_in(tmp_path):
    stem = file_stem(DATASET_SPECS[MAZE], 2, 0, 10)
    parts = tmp_path / f"{stem}.parts"
    parts.mkdir()
    (parts / "settings.json").write_text(json.dumps({"noise": 0.1}))
    with pytest.raises(UserError, match=r"other settings .*noise"):
        collect(MAZE, episodes=2, max_steps=10, dataset_dir=tmp_path)
    (tmp_path / f"{stem}.npz").touch()
    (tmp_path / f"{stem}.json").write_text(json.dumps({"noise": 0.1}))
    with pytest.raises(UserError, match="collected with other settings"):
        collect(MAZE, episodes=2, max_steps=10, dataset_dir=tmp_path)
    (tmp_path / f"{stem}.json").unlink()
    with pytest.raises(UserError, match=r"-val\.npz does not"):
        collect(MAZE, episodes=2, max_steps=10, dataset_dir=tmp_path)


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        collect(MAZE, episodes=1, max_steps=10, dataset_dir=tmp_path / "file" / "sub")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--episode=3", f"--env_name={MAZE}"], "Unknown command line flag 'episode'"),
        (["--episodes=many", f"--env_name={MAZE}"], "invalid literal"),
        (["--episodes=0", f"--env_name={MAZE}"], "at least 1"),
        (["--workers=0", f"--env_name={MAZE}"], "at least 1"),
        (["--seed=-1", f"--env_name={MAZE}"], "at least 0"),
        ([], "--env_name is missing"),
        (["--env_name=scen-play-v0"], "scene-play-v0"),
        (["--env_name=antmaze-large-navigate-v0"], "expert"),
        (["scene-play-v0"], "stray argument"),
    ],
)
def test_command_line_mistakes(arguments, hint, tmp_path, capsys, monkeypatch):
    assert run("collect", f"--dataset_dir={tmp_path}", *arguments, monkeypatch=monkeypatch) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert hint in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_single_task_name_means_its_dataset():
    assert find_spec("scene-play-singletask-task3-v0").name == "scene-play-v0"
    assert find_spec("scene-play-singletask-v0").name == "scene-play-v0"


def test_images_are_those_of_the_same_episodes(tmp_path):
    """A collection with images takes the steps of the one without, and has its rewards, and an image a row."""
    if rendering_backend() is None:
        pytest.skip("no off-screen rendering here")
    name, steps = "cube-single-play-v0", 12
    path = collect(f"visual-{name}", episodes=1, max_steps=steps, dataset_dir=tmp_path, workers=1)
    plain = Collector(find_spec(name), steps).episode(0, "train", 0)
    with np.load(path) as file:
        raw = dict(file)
    for key in ("actions", "qpos", "qvel", "terminals"):
        np.testing.assert_array_equal(raw[key], plain[key])
    assert raw["observations"].dtype == np.uint8 and raw["observations"].shape == (steps, 64, 64, 3)
    assert (np.diff(raw["observations"].astype(int), axis=0) != 0).any(axis=(1, 2, 3)).all()  # It moves.
    write_npz(tmp_path / "plain.npz", plain)
    tasks = {prefix: parse_task(f"{prefix}cube-single-play-singletask-task1-v0") for prefix in ("visual-", "")}
    loaded, expected = load_file(tasks["visual-"], path), load_file(tasks[""], tmp_path / "plain.npz")
    np.testing.assert_array_equal(loaded["images"][:, 0], raw["observations"])
    assert loaded["observations"].shape == (steps, 0) and loaded["images"].dtype == np.uint8
    for key in ("actions", "rewards", "masks", "terminals"):
        np.testing.assert_array_equal(loaded[key], expected[key])
    write_npz(tmp_path / "small.npz", raw | {"observations": raw["observations"][:, ::2, ::2]})
    with pytest.raises(UserError, match=r"the environment gives \[1, 64, 64, 3\]"):
        load_file(tasks["visual-"], tmp_path / "small.npz")
