import errno
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from wandb_stand_in import fake_wandb

from utils.errors import UserError
from utils.output.loggers import CsvLogger, ProgressBar, WandbLogger, read_csv


def row(step: int) -> dict[str, float]:
    rng = np.random.default_rng(step)
    return {"loss": rng.standard_normal(), "f32": np.float32(rng.random()), "q": np.nan if step % 3 else 1e-310}


def test_csv_reads_back_bit_for_bit(tmp_path):
    logger = CsvLogger(tmp_path / "new" / "train.csv")
    for step in range(6):
        logger.log(step, row(step))
    table = read_csv(logger.path)
    assert list(table) == ["step", "loss", "f32", "q"]
    np.testing.assert_array_equal(table["step"], np.arange(6))
    for name in ("loss", "f32", "q"):
        np.testing.assert_array_equal(table[name], [float(row(step)[name]) for step in range(6)])


@pytest.mark.check
@pytest.mark.parametrize("saved,killed", [(1, 1), (1, 9), (4, 5), (7, 10)])
def test_csv_resumed_equals_unbroken(tmp_path, saved, killed):
    unbroken, broken = CsvLogger(tmp_path / "a.csv"), CsvLogger(tmp_path / "b.csv")
    for step in range(10):
        unbroken.log(step, row(step))
    for step in range(killed):
        if step == saved:
            position = broken.position()
        broken.log(step, row(step))
    if saved == killed:
        position = broken.position()
    with open(broken.path, "ab") as file:
        file.write(b"9,0.")  # killed within a row
    resumed = CsvLogger(broken.path, position)
    for step in range(saved, 10):
        resumed.log(step, row(step))
    assert broken.path.read_bytes() == unbroken.path.read_bytes()
    assert resumed.position() == unbroken.position() == unbroken.path.stat().st_size


@pytest.mark.parametrize("position", [0, None])
def test_csv_starts_anew(tmp_path, position):
    CsvLogger(tmp_path / "a.csv").log(1, {"old": 1.0})
    CsvLogger(tmp_path / "a.csv", position).log(2, {"new": 2.0})
    assert (tmp_path / "a.csv").read_text() == "step,new\n2,2.0\n"


@pytest.mark.parametrize("left", ["step,x\n1,1.0\n2,2", "step,x\n1,1.0\n2,2" + "0" * 40, "", None])
def test_csv_altered_since_the_checkpoint_warns_and_goes_on(tmp_path, capsys, left):
    path = tmp_path / "a.csv"
    if left is not None:
        path.write_text(left)
    CsvLogger(path, 40).log(5, {"x": 5.0})
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert path.read_text() == ("step,x\n1,1.0\n5,5.0\n" if left else "step,x\n5,5.0\n")


def test_csv_columns_are_those_of_the_first_row(tmp_path):
    logger = CsvLogger(tmp_path / "a.csv")
    logger.log(1, {"a,b": 1.0, "late": np.nan})
    logger.log(2, {"late": 2.0})
    with pytest.raises(ValueError, match="unknown"):
        logger.log(3, {"unknown": 3.0})
    table = read_csv(logger.path)
    np.testing.assert_array_equal(table["a,b"], [1, np.nan])
    np.testing.assert_array_equal(table["late"], [np.nan, 2])


def test_csv_on_a_full_disk():
    with pytest.raises(UserError, match=r"^No space left on device: cannot write /dev/full; .*$"):
        CsvLogger(Path("/dev/full")).log(1, {"a": 1.0})


def test_csv_position_is_durable(tmp_path, monkeypatch):
    logger = CsvLogger(tmp_path / "a.csv")

    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="No space left"):
        logger.position()


def test_csv_in_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^File exists: "):
        CsvLogger(tmp_path / "file" / "a.csv")


def test_read_csv_of_odd_files(tmp_path):
    path = tmp_path / "a.csv"
    for text, rows in (("", 0), ("step,a\n", 0), ("step,a\n1,2\n3,", 1)):
        path.write_text(text)
        assert len(read_csv(path).get("step", [])) == rows
    for text in ("step,a\n1,x\n", "step,a\n1\n", "step,a\n1,2\n1\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="damaged"):
            read_csv(path)
    with pytest.raises(UserError, match="No such file"):
        read_csv(tmp_path / "missing.csv")


def test_progress_without_a_terminal_prints_few_lines(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with ProgressBar(total=10_000, initial=4_000, description="sd0") as bar:
        for _ in range(60):
            bar.update(100, {"loss": np.float32(0.12345)})
    lines = stderr.getvalue().splitlines()
    assert len(lines) == 2 and "\r" not in stderr.getvalue()
    assert lines[0].startswith("sd0: 4000/10000 [") and lines[1].startswith("sd0: 10000/10000 [")
    assert "loss=0.123" in lines[1] and "updates/s" in lines[1]


def test_progress_on_a_terminal_draws_a_bar(monkeypatch):
    stderr = io.StringIO()
    stderr.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stderr)
    with ProgressBar(total=10) as bar:
        bar.update(5)
    assert "\r" in stderr.getvalue() and "50%|" in stderr.getvalue()


def wandb_logger(mode: str, run_dir: Path) -> WandbLogger:
    return WandbLogger(mode, run_dir, group="g", name="sd0", config={"seed": 0})


def test_wandb_disabled_imports_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    logger = wandb_logger("disabled", tmp_path)
    logger.log(1, {"a": 1.0})
    logger.close()
    assert not list(tmp_path.iterdir())


def test_wandb_missing_costs_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    logger = wandb_logger("online", tmp_path)
    logger.log(1, {"a": 1.0})
    logger.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("wandb is off for the rest of this run: ModuleNotFoundError")


@pytest.mark.parametrize("fails", ["init", "define_metric", "log", "finish"])
def test_wandb_failing_costs_one_line(tmp_path, monkeypatch, capsys, fails):
    fake_wandb(monkeypatch, fails)
    logger = wandb_logger("online", tmp_path)
    logger.log(1, {"a": 1.0})
    logger.log(2, {"a": 1.0})
    logger.close()
    logger.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("RuntimeError: network is down")


def test_wandb_resumed_run_is_the_same_and_steps_may_repeat(tmp_path, monkeypatch):
    runs = fake_wandb(monkeypatch)
    for steps in ((1, 2), (2, 3)):
        logger = wandb_logger("online", tmp_path / "sd0")
        for step in steps:
            logger.log(step, {"a": np.float32(1)})
    wandb_logger("online", tmp_path / "sd1")
    first, resumed, other = (run.arguments["id"] for run in runs)
    assert first == resumed != other
    assert runs[1].rows == [{"step": 2, "a": 1.0}, {"step": 3, "a": 1.0}]


def test_wandb_offline_writes_into_the_run_directory(tmp_path):
    pytest.importorskip("wandb")
    loggers = [wandb_logger("offline", tmp_path / name) for name in ("sd0", "sd1")]
    for logger in loggers:
        logger.log(1, {"a": 1.0})
    for name, logger in zip(("sd0", "sd1"), loggers, strict=True):
        assert logger._backend is not None
        logger.close()
        assert list((tmp_path / name / "wandb").glob("offline-run-*/run-*.wandb"))
