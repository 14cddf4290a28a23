"""Differences between two records of runs that count, and those that do not."""

import os

import numpy as np
import pytest

from utils.errors import UserError
from utils.run.identity import content, difference, same_sources, sources

FLAGS = {"env_name": "gym:Own-v0", "offline_steps": 10, "online_steps": 5, "start_training": 2, "utd_ratio": 1}
FLAGS |= {"balanced_sampling": False, "eval_episodes": 5, "log_interval": 2, "dataset": "a.npz"}
FLAGS |= {"ogbench_dataset_dir": None, "dataset_replace_interval": 3, "matmul_precision": None}
DATA = {"checksum": 7, "file": "a.npz", "episodes": 2}
OLD = {"env_name": "gym:Own-v0", "agent": "bc", "agent_module": "agents.bc", "seed": 0, "sparse": False}
OLD |= {"config": {"lr": 0.1, "dims": [4, 4]}, "dataset": DATA, "flags": FLAGS}


def changed(key, **values):
    return OLD | {key: OLD[key] | values}


SAME = {
    "the same": OLD | {"config": {"lr": 0.1, "dims": (4, 4)}},
    "another name of the file": changed("dataset", file="b.npz"),
    "what an older version did not write": {"seed": 0},
    "new entries of the record": changed("dataset", contents=[1], longest=3),
    "log_interval": changed("flags", log_interval=9, dataset="b.npz"),
    "shards that are not used": changed("flags", dataset_replace_interval=9),
    "more online steps": changed("flags", online_steps=50),
    "a new setting with its default": changed("config", alpha=2.0),
    "a setting that is gone": OLD | {"config": {"lr": 0.1}},
}
OTHER = {
    "env_name = gym:Own-v0, not gym:Other-v0": OLD | {"env_name": "gym:Other-v0"},
    "agent = bc, not fql": OLD | {"agent": "fql"},
    "seed = 0, not 1": OLD | {"seed": 1},
    "sparse = False, not True": OLD | {"sparse": True},
    "config.lr = 0.1, not 0.2": changed("config", lr=0.2),
    "config.alpha = 2.0, not 3.0": changed("config", alpha=3.0),
    "config.dims = [4, 4], not [4]": changed("config", dims=(4,)),
    "dataset.checksum = 7, not 8": changed("dataset", checksum=8),
    "dataset.start = None, not {'checksum': 1}": changed("dataset", start={"checksum": 1}),
    "utd_ratio = 1, not 4": changed("flags", utd_ratio=4),
    "start_training = 2, not 3": changed("flags", start_training=3),
    "balanced_sampling = False, not True": changed("flags", balanced_sampling=True),
    "eval_episodes = 5, not 6": changed("flags", eval_episodes=6),
    "matmul_precision = None, not float32": changed("flags", matmul_precision="float32"),
    "agent_module = agents.bc, not /own/bc.py": OLD | {"agent_module": "/own/bc.py"},
    "offline_steps = 10, not 12": changed("flags", offline_steps=12, online_steps=3),
}


@pytest.mark.check
@pytest.mark.parametrize("name", SAME)
def test_the_same_run(name):
    assert difference(OLD, SAME[name], {"alpha": 2.0}) == ""


@pytest.mark.check
@pytest.mark.parametrize("text", OTHER)
def test_another_run(text):
    assert difference(OLD, OTHER[text], {"alpha": 2.0}).endswith(text)


@pytest.mark.check
def test_what_was_learnt_before_may_have_moved():
    """Its directory is no part of it; what is in it is."""
    start, moved = ({"start": {"checksum": 1, "path": path}} for path in ("/a", "/b"))
    assert difference(changed("dataset", **start), changed("dataset", **moved)) == ""
    moved["start"]["checksum"] = 2
    text = "dataset.start.checksum = 1, not 2"
    assert difference(changed("dataset", **start), changed("dataset", **moved)).endswith(text)


@pytest.mark.check
def test_online_flags_do_not_act_before_there_is_an_online_phase():
    offline = changed("flags", online_steps=0)
    assert difference(offline, changed("flags", utd_ratio=4)) == ""
    assert "phase" in difference(offline, changed("flags", offline_steps=5))  # As many steps in all.


@pytest.mark.check
def test_flags_of_the_base_and_of_the_demonstrations_act_where_these_are_made():
    flags = {"online_steps": 5, "rollout_steps": 2, "base_steps": 3, "base_checkpoint": None, "expert_noise": 1.0}
    for values, text in (
        ({"base_steps": 4}, "base_steps"),
        ({"expert_noise": 2.0}, "expert_noise"),
        ({"rollout_steps": 3}, "r"),
    ):
        assert text in difference({"flags": flags}, {"flags": flags | values})
    # Records of older versions name the flag otherwise.
    old = {name: value for name, value in flags.items() if name != "expert_noise"} | {"tremor": 8.0}
    assert "expert_noise = 8.0, not 1.0" in difference({"flags": old}, {"flags": flags})
    assert difference({"flags": old}, {"flags": flags | {"expert_noise": 8.0}}) == ""
    given = flags | {"base_checkpoint": "a", "dataset": "b"}
    assert difference({"flags": given}, {"flags": given | {"base_steps": 4, "expert_noise": 2.0}}) == ""


@pytest.mark.check
def test_another_spelling_of_the_agents_file(tmp_path):
    (tmp_path / "own.py").touch()
    (tmp_path / "link.py").symlink_to(tmp_path / "own.py")
    old = {"agent_module": str(tmp_path / "own.py")}
    assert difference(old, {"agent_module": str(tmp_path / "x" / ".." / "link.py")}) == ""
    assert difference(old, {"agent_module": str(tmp_path / "other.py")})


@pytest.mark.check
def test_content_is_what_the_arrays_hold(tmp_path):
    arrays = {"a": np.arange(4.0), "b": np.zeros(2)}
    np.savez(tmp_path / "one.npz", **arrays)
    np.savez_compressed(tmp_path / "two.npz", **dict(reversed(arrays.items())))
    np.savez(tmp_path / "three.npz", a=arrays["a"] + 1, b=arrays["b"])
    (tmp_path / "text.npz").write_text("no archive")
    one, two, three = (content(tmp_path / f"{name}.npz") for name in ("one", "two", "three"))
    assert one == two != three
    assert content(tmp_path / "text.npz")[0] == len("no archive")
    with pytest.raises(UserError, match=r"there is no file .*gone\.npz"):
        content(tmp_path / "gone.npz")


@pytest.mark.check
def test_sources_by_other_spellings_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", x=np.arange(3))
    (tmp_path / "link").symlink_to("a.npz")
    (tmp_path / "shards").mkdir()
    os.link("a.npz", "shards/a.npz")
    told = lambda file=None, **flags: sources(flags, file)  # noqa: E731
    first = told(dataset="a.npz")
    for spelling in ("~/a.npz", "shards/../a.npz", str(tmp_path / "link"), "shards/a.npz"):
        assert same_sources(first, told(dataset=spelling))
    assert same_sources(told(ogbench_dataset_dir="shards"), told(ogbench_dataset_dir="~/shards/"))
    np.savez("shards/b.npz", x=np.arange(3))
    assert not same_sources(first, told(ogbench_dataset_dir="shards"))
    with pytest.raises(UserError, match="there is no file"):
        told(dataset="b.npz")
    kept = told("a.npz", dataset_dir="~")
    assert same_sources(kept, told("a.npz", dataset_dir=".")) and not same_sources(kept, first)
    np.savez("a.npz", x=np.arange(4))
    assert not same_sources(kept, told("a.npz", dataset_dir="."))
    (tmp_path / "a.npz").unlink()  # It would be made again.
    assert same_sources(kept, told("a.npz", dataset_dir="."))
