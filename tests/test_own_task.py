"""examples/own_task.py: a Gymnasium task that is not OGBench's."""

import subprocess
import sys

import matplotlib.axes
import numpy as np
from tiny_runs import TINY, run_dir

from utils.output.loggers import read_csv
from utils.output.plotting import learning_curve
from utils.system.files import ROOT


def test_example_trains_and_reports_returns(monkeypatch, tmp_path):
    flags = (*TINY, "--agent=agents/bc.py", "--offline_steps=4", "--log_interval=2", f"--save_dir={tmp_path}")
    command = [sys.executable, str(ROOT / "examples" / "own_task.py"), *flags]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr
    # 50 episodes of 200 steps, each with a last state.
    assert "pendulum.npz (file given), 50 episodes, 10000 transitions" in result.stdout
    assert "return_mean -" in result.stdout and "success_rate" not in result.stdout

    directory = run_dir(tmp_path)
    assert directory.parts[-3:] == ("gym_Pendulum-v1", "bc", "sd0")
    evaluation = read_csv(directory / "eval.csv")
    assert np.isnan(evaluation["success_rate"]).all()
    assert evaluation["length_mean"] == [200] and -2000 < evaluation["return_mean"][0] < 0
    labels, set_ylabel = [], matplotlib.axes.Axes.set_ylabel
    monkeypatch.setattr(
        matplotlib.axes.Axes, "set_ylabel", lambda axes, text: (labels.append(text), set_ylabel(axes, text))
    )
    learning_curve(directory, tmp_path / "again.png", title="gym:Pendulum-v1")
    assert labels == ["Return"]
    assert (directory / "learning_curve.png").read_bytes() == (tmp_path / "again.png").read_bytes()
