import struct
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from utils.errors import UserError
from utils.output.loggers import CsvLogger
from utils.output.plotting import learning_curve
from utils.run.loading import online_from


def write_eval(directory: Path, **columns) -> Path:
    logger = CsvLogger(directory / "eval.csv")
    for step in range(5):
        logger.log(step * 100_000, {name: values[step] for name, values in columns.items()})
    return directory


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def test_learning_curve_is_a_png_for_print_with_the_same_bytes(tmp_path):
    run_dir = write_eval(tmp_path / "sd0", success_rate=[0, 0.2, 0.5, 0.9, 1], return_mean=[0] * 5, episodes=[50] * 5)
    backend = matplotlib.get_backend()
    learning_curve(run_dir, tmp_path / "a.png")
    learning_curve(run_dir, tmp_path / "b.png")
    learning_curve([run_dir, run_dir], tmp_path / "c.png", labels=["OTQL", "FQL"])
    assert png_size(tmp_path / "a.png") == (990, 690)
    assert 5_000 < (tmp_path / "a.png").stat().st_size < 200_000
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes() != (tmp_path / "c.png").read_bytes()
    assert matplotlib.get_backend() == backend


@pytest.mark.parametrize(
    "columns,label,limits",
    [
        ({"success_rate": [0.1] * 5, "return_mean": [-9] * 5}, "Success rate", (0, 1)),
        ({"success_rate": [np.nan] * 5, "return_mean": [-9, -5, -3, -2, -1]}, "Mean return", None),
        ({"return_mean": [-9, -5, -3, -2, -1]}, "Mean return", None),
    ],
)
def test_learning_curve_shows_the_return_only_without_success(tmp_path, figures, columns, label, limits):
    learning_curve(write_eval(tmp_path, **columns), tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert axes.get_ylabel() == label
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), columns["success_rate" if limits else "return_mean"])
    if limits:
        assert axes.get_ylim() == limits
    assert not axes.collections  # no band without a number of episodes


@pytest.mark.parametrize(
    "flags,step",
    [
        ({"rollout_steps": 20, "online_steps": 80}, 20),
        ({"offline_steps": 30, "online_steps": 10}, 30),
        ({"offline_steps": 30, "online_steps": 0}, None),
        ({"offline_steps": 30}, None),
    ],
)
def test_learning_curve_says_where_online_begins(tmp_path, figures, flags, step):
    run_dir = write_eval(tmp_path, success_rate=[0, 0.2, 0.5, 0.9, 1])
    learning_curve(run_dir, tmp_path / "a.png", online_from=online_from({"flags": flags}))
    assert [line.get_xdata() for line in figures[0].axes[0].lines[1:]] == ([[step, step]] if step else [])


@pytest.mark.filterwarnings("error")
def test_learning_curve_without_evaluations(tmp_path):
    (tmp_path / "eval.csv").write_text("")
    learning_curve([tmp_path, tmp_path], tmp_path / "a.png")
    assert png_size(tmp_path / "a.png") == (990, 690)
    with pytest.raises(UserError, match=r"eval\.csv"):
        learning_curve(tmp_path / "missing", tmp_path / "b.png")
