"""What runs log beside their CSV files."""

import math
import struct
import sys

import pytest
from tiny_runs import BC, POINTMAZE, call, interrupted, refused, run_dir, run_main
from wandb_stand_in import fake_wandb

from utils.output.loggers import TensorboardLogger, read_csv, usable_wandb


@pytest.fixture
def flags(pointmaze, tmp_path):
    """A tiny run with two evaluations."""
    own = ("--offline_steps=20", "--log_interval=5", "--eval_interval=10", "--save_interval=10", "--eval_episodes=1")
    return (*BC, f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", f"--save_dir={tmp_path / 'exp'}", *own)


def events(directory):
    """Yields the events of all files in TensorBoard's order: records of length, its CRC, data, its CRC."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def points(directory):
    """Returns tag → (step, value)s that TensorBoard shows: a session's start drops those from its step on."""
    shown = {}
    for event in events(directory):
        if event.session_log.status == 1:  # START
            shown = {tag: [p for p in own if p[0] < event.step] for tag, own in shown.items()}
        for value in event.summary.value:
            shown.setdefault(value.tag, []).append((event.step, value.simple_value))
    return shown


def test_tensorboard_shows_the_rows_of_the_csv_files(flags, interrupt_at, tmp_path):
    pytest.importorskip("tensorboardX")
    interrupt_at(15)
    interrupted(*flags, "--tensorboard")
    run_main(*flags, "--tensorboard")
    directory, expected = run_dir(tmp_path / "exp"), {}
    shown = points(directory / "tensorboard")
    for name in ("train", "eval", "timing"):
        table = read_csv(directory / f"{name}.csv")
        for column in table.keys() - {"step"}:
            rows = zip(table["step"], table[column], strict=True)
            expected[f"{name}/{column}"] = [(step, value) for step, value in rows if not math.isnan(value)]
    expected = {tag: rows for tag, rows in expected.items() if rows}
    assert {"train/flow/loss", "eval/return_mean"} <= shown.keys() == expected.keys()
    for tag, rows in expected.items():
        assert [step for step, _ in shown[tag]] == [step for step, _ in rows], tag
        assert [value for _, value in shown[tag]] == pytest.approx([value for _, value in rows], rel=1e-6), tag


def test_points_after_the_checkpoint_are_dropped_on_resuming(tmp_path):
    pytest.importorskip("tensorboardX")
    for start, steps in ((0, (5, 10, 15)), (10, (15, 20)), (20, ())):  # All within a second.
        logger = TensorboardLogger(tmp_path / "t", start)
        for step in steps:
            logger.log(step, {"train/a": float(start + step), "train/b": math.nan})
        logger.flush()
        logger.close()
        logger.close()
    assert points(tmp_path / "t") == {"train/a": [(5, 5.0), (10, 10.0), (15, 25.0), (20, 30.0)]}


def test_tensorboard_failing_costs_one_line(tmp_path, capsys):
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").write_text("")
    logger = TensorboardLogger(tmp_path / "file" / "t", 0)
    logger.log(1, {"a": 1.0})
    logger.flush()
    logger.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("TensorBoard is off for the rest of this run: NotADirectoryError")


def test_tensorboard_missing_is_said_before_any_work(flags, monkeypatch, tmp_path):
    monkeypatch.setattr("utils.run.config.find_spec", lambda name: None)
    assert "--tensorboard needs tensorboardX; install it with" in refused(*flags, "--tensorboard")
    assert not (tmp_path / "exp").exists()


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """Leaves no credentials for wandb."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_CONFIG_DIR", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.check
def test_wandb_that_cannot_be_used_is_said_once(monkeypatch, nobody, tmp_path, capsys):
    def said(mode):
        return usable_wandb(mode), capsys.readouterr().err

    monkeypatch.setitem(sys.modules, "wandb", None)
    assert said("disabled") == ("disabled", "")
    assert said("offline") == ("disabled", "wandb is off: it is not installed; pip install wandb\n")
    fake_wandb(monkeypatch)
    assert said("offline") == ("offline", "")
    off = ("disabled", "wandb is off: you are not logged in; run: wandb login, or use --wandb=offline\n")
    assert said("online") == off
    (tmp_path / ".netrc").write_text("machine other.org login user password x\n")
    assert said("online") == off
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    assert said("online") == ("online", "")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert said("online") == off
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert said("online") == ("online", "")


def test_wandb_off_is_no_failure_and_comes_before_the_work(flags, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    outcome = call(*flags, "--wandb=online", "--dataset=/nowhere.npz")
    first, last = outcome.err.splitlines()
    assert first.startswith("wandb is off: it is not installed") and "/nowhere.npz" in last
    outcome = run_main(*flags, "--wandb=online", "--offline_steps=2")
    assert outcome.err.count("wandb is off") == 1


def test_wandb_is_told_what_the_flags_say(flags, monkeypatch, nobody):
    runs = fake_wandb(monkeypatch)
    own = ("--wandb=offline", "--wandb_project=p", "--wandb_entity=e", "--wandb_tags=a, b,", "--wandb_name=n")
    run_main(*flags, *own, "--offline_steps=2")
    told = runs[0].arguments
    assert (told["project"], told["entity"], told["tags"], told["name"]) == ("p", "e", ["a", "b"], "n")
    assert told["group"] == "debug" and told["config"]["seed"] == 0
    run_main(*flags, "--offline_steps=4", "--wandb=offline")  # None of them is part of a run's identity.
    told = runs[1].arguments
    assert (told["project"], told["entity"], told["tags"]) == ("otql", None, []) and told[
        "name"
    ] == f"bc-{POINTMAZE}-sd0"
    assert told["id"] == runs[0].arguments["id"]
    run_main(*flags, *own, "--run_group=two", "--num_seeds=2", "--offline_steps=2")
    assert [run.arguments["name"] for run in runs[2:]] == ["n-bc-sd0", "n-bc-sd1"]
