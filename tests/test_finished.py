"""The same command after a run has begun or finished, with another file or flag."""

import json
import re
import shutil

import numpy as np
import pytest
from tiny_runs import BC, OTQL, POINTMAZE, call, refused, run_dir, run_main

from utils.system import files
from utils.system.files import ROOT

STEPS = ("--offline_steps=4", "--online_steps=6", "--start_training=2", "--log_interval=2")


@pytest.fixture(scope="module")
def finished(pointmaze, tmp_path_factory):
    """The command of a finished run, online too, and where it is."""
    save_dir = tmp_path_factory.mktemp("finished")
    flags = (*BC, f"--env_name={POINTMAZE}", *STEPS, f"--save_dir={save_dir}")
    run_main(*flags, f"--dataset={pointmaze}")
    return flags, run_dir(save_dir)


def test_the_same_data_by_other_names(finished, pointmaze, tmp_path, monkeypatch):
    flags, directory = finished
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(pointmaze.parent))
    (tmp_path / "link.npz").symlink_to(pointmaze)
    (tmp_path / "copy.npz").write_bytes(pointmaze.read_bytes())
    (tmp_path / "x").mkdir()
    before = {path: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    for name in ("link.npz", "copy.npz", "x/../copy.npz", f"~/{pointmaze.name}"):
        outcome = run_main(*flags, f"--dataset={name}")
        assert outcome.out == f"finished before: {directory}; nothing to do\n"  # No data were read.
    assert {path: path.read_bytes() for path in directory.iterdir() if path.is_file()} == before
    with np.load(pointmaze) as file:  # The same numbers in another file: these are read and compared.
        np.savez("more.npz", **{key: file[key] for key in file.files}, note=np.zeros(3))
    for line in ("dataset: ", "finished before"):
        assert run_main(*flags, "--dataset=more.npz").out.startswith(line)
    (directory / "flags.json").write_bytes(before[directory / "flags.json"])


def test_other_data(finished, pointmaze, write_data, tmp_path):
    flags, directory = finished
    before = (directory / "flags.json").read_text()
    assert f"there is no file {tmp_path / 'gone.npz'}" in refused(*flags, f"--dataset={tmp_path / 'gone.npz'}")
    outcome = call(*flags, f"--dataset_dir={tmp_path}", "--dataset_source=collect", "--dataset_episodes=1")
    assert outcome.code == 2 and "dataset.checksum" in outcome.err
    with np.load(pointmaze) as file:
        path = write_data("copy.npz", observations=file["observations"] + 1)
    assert f"{directory} holds a run with dataset.checksum = " in refused(*flags, f"--dataset={path}")
    path.write_text("no archive")
    assert f"{path} is damaged" in refused(*flags, f"--dataset={path}")
    assert (directory / "flags.json").read_text() == before


CHANGES = {
    "--utd_ratio=2": "utd_ratio = 1, not 2",
    "--start_training=3": "start_training = 2, not 3",
    "--balanced_sampling": "balanced_sampling = False, not True",
    "--eval_episodes=2": "eval_episodes = 1, not 2",
    "--sparse": "sparse = False, not True",
    "--preset=cpu": "config.encoder = impala_small, not impala_tiny",
    "--horizon_length=4": "config.horizon_length = 5, not 4",
    "--online_steps=5": "is at step 10 already; give 10 steps or more in all",
    "--offline_steps=5": "in another phase; give the same steps as before: offline_steps = 4, not 5",
}


@pytest.mark.parametrize("flag", CHANGES)
def test_other_settings(flag, finished, pointmaze):
    flags, _ = finished
    assert CHANGES[flag] in refused(*flags, f"--dataset={pointmaze}", flag)


def test_what_changes_no_number_may_change(finished, pointmaze):
    flags, directory = finished
    others = ("--log_interval=3", "--eval_interval=5", "--eval_workers=2", "--noeval_overlap", "--save_interval=1")
    outcome = run_main(*flags, f"--dataset={pointmaze}", *others, "--dataset_placement=host", "--wandb=offline")
    assert outcome.out == f"finished before: {directory}; nothing to do\n"


def test_a_run_of_an_older_version(finished, pointmaze, write_data):
    """Its record lacks what is compared first: the data are read once, then known."""
    flags, directory = finished
    path = directory / "flags.json"
    before = path.read_text()
    old = json.loads(before)
    del old["sources"], old["config"]["augment"]
    files.atomic_write_text(path, json.dumps(old))
    with np.load(pointmaze) as file:
        other = write_data("other.npz", observations=file["observations"] + 1)
    assert "dataset.checksum" in refused(*flags, f"--dataset={other}")
    for line in ("dataset: ", "finished before"):
        assert run_main(*flags, f"--dataset={pointmaze}").out.startswith(line)
    assert "config.augment = True, not False" in refused(*flags, f"--dataset={pointmaze}", "--agent.augment=false")
    files.atomic_write_text(path, before)


def test_another_run_to_start_from(finished, pointmaze, tmp_path):
    """Its content counts, not its path; without one, it is another run."""
    data = f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", f"--save_dir={tmp_path}"
    for seed in (0, 1):
        run_main(*BC, *data, "--offline_steps=2", f"--seed={seed}", "--run_group=base")
    first = tmp_path / "base" / POINTMAZE / "bc" / "sd0"
    flags = (*OTQL, *data, "--offline_steps=2", "--run_group=next")
    run_main(*flags, f"--start_from={first}")
    (tmp_path / "link").symlink_to(first)
    done = "finished before"
    assert run_main(*flags, f"--start_from={tmp_path / 'link'}").out.startswith(done)
    moved = first.rename(first.with_name("moved"))
    assert done in run_main(*flags, f"--start_from={moved}").out
    other = first.with_name("sd1")
    assert "dataset.start.checksum" in refused(*flags, f"--start_from={other}")
    assert "dataset.start" in refused(*flags)


def test_an_agent_file_by_another_spelling(pointmaze, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "forks").mkdir()
    (tmp_path / "forks" / "my_bc.py").write_text((ROOT / "agents" / "bc.py").read_text())
    (tmp_path / "my_bc.py").symlink_to("forks/my_bc.py")
    data = f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", "--save_dir=exp", "--offline_steps=2"
    for path in ("forks/my_bc.py", "forks/../my_bc.py", str(tmp_path / "my_bc.py")):
        outcome = call(*BC, *data, f"--agent={path}")
        assert outcome.code == 0, outcome
    assert "finished before" in outcome.out


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("flags.json", "[1]", r"flags.json is damaged \(no JSON object\)"),
        ("flags.json", "{", r"flags.json is damaged"),
        ("summary.json", '{"updates": 10}', r"summary.json is damaged \(no whole number 'step'\)"),
        ("summary.json", '{"step": "10"}', r"summary.json is damaged"),
    ],
)
def test_damaged_records(name, text, said, finished, pointmaze, tmp_path):
    flags, directory = finished
    copy = tmp_path / directory.relative_to(directory.parents[3])
    shutil.copytree(directory, copy)
    (copy / name).write_text(text)
    line = refused(*flags, f"--dataset={pointmaze}", f"--save_dir={tmp_path}")
    assert re.search(said, line), line
    assert (copy / name).read_text() == text


def test_a_table_that_another_program_saved(finished, pointmaze, tmp_path):
    """Nothing of it is cut off before it is looked at."""
    flags, directory = finished
    copy = tmp_path / directory.relative_to(directory.parents[3])
    shutil.copytree(directory, copy)
    (copy / "summary.json").unlink()
    changed = (copy / "train.csv").read_bytes().replace(b",", b";").replace(b"step", b"Step")
    (copy / "train.csv").write_bytes(changed)
    assert "train.csv was changed" in refused(*flags, f"--dataset={pointmaze}", f"--save_dir={tmp_path}")
    assert (copy / "train.csv").read_bytes() == changed
