"""Provenance: where a run was trained, which its identity does not depend on."""

import json
import subprocess

import pytest
from tiny_runs import BC, POINTMAZE, run_dir, run_main

from utils.run import provenance
from utils.run.identity import difference
from utils.run.provenance import resumed_provenance


def git(folder, *arguments):
    name = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *name, *arguments], check=True, capture_output=True)


def test_commit_of_the_checkout(tmp_path, monkeypatch):
    commit = provenance._commit.__wrapped__
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "inner")
    (tmp_path / "inner").mkdir()
    git(tmp_path, "init", "-q")
    assert commit() == {}  # The checkout around it is not the project's.
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "first")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))  # As in a hook.
    clean = commit()
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "new").write_text("untracked")
    assert commit() == clean
    (tmp_path / "file").write_text("2")
    assert commit() == clean | {"dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == {}  # There is no git.


@pytest.mark.check
def test_a_process_at_another_place_is_added():
    first = {"commit": "a", "host": "x", "device": "cpu", "device_count": 1, "time": "1"}
    assert resumed_provenance({}, first) == first
    again = first | {"time": "2", "command": "other"}
    assert resumed_provenance({"provenance": first}, again) == first
    for change in ({"commit": "b"}, {"host": "y"}, {"device": "H200"}, {"device_count": 2}):
        added = resumed_provenance({"provenance": first}, again | change)
        assert added == first | {"resumed": [again | change]}
        assert resumed_provenance({"provenance": added}, first | change) == added
        assert resumed_provenance({"provenance": added}, first)["resumed"] == [again | change, first]
    assert resumed_provenance({"seed": 0}, first) == {"resumed": [first]}  # A run of an older version.


@pytest.mark.check
def test_an_identity_has_no_provenance():
    records = [{"seed": 0, "provenance": {"commit": commit, "host": commit}} for commit in "ab"]
    assert difference(*records) == ""


def test_a_run_resumes_on_another_machine(pointmaze, tmp_path):
    flags = (*BC, f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", f"--save_dir={tmp_path}", "--eval_episodes=0")
    run_main(*flags, "--offline_steps=4")
    path = run_dir(tmp_path) / "flags.json"
    settings = json.loads(path.read_text())
    first = settings["provenance"]
    assert first["command"].startswith("main.py --agent=agents/bc.py --agent.batch_size=8")
    assert first["device"] and first["host"] and first["cores"] >= 1 and first["time"].endswith("+00:00")
    assert {"jax", "numpy", "mujoco", "ogbench"} <= first["packages"].keys()

    moved = first | {"commit": "0" * 40, "host": "elsewhere", "device": "TPU", "packages": {"jax": "0.1"}}
    path.write_text(json.dumps(settings | {"provenance": moved}))
    for steps in (8, 12):  # The second start is at the same place as the first one.
        run_main(*flags, f"--offline_steps={steps}")
        found = json.loads(path.read_text())["provenance"]
        (resumed,) = found.pop("resumed")
        assert found == moved and resumed["host"] == first["host"] and "--offline_steps=8" in resumed["command"]
    before = path.read_bytes()
    run_main(*flags, "--offline_steps=12")
    assert path.read_bytes() == before
