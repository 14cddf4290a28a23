"""train(): hooks, results, and calls from Python."""

import signal

import ml_collections
import pytest
from tiny_runs import POINTMAZE, assert_same_run

from utils.errors import UserError
from utils.run.config import RunConfig
from utils.run.directory import RunDirectory, RunSpec
from utils.run.train import print_result, train
from utils.system.signals import Interrupted

TINY = {"batch_size": 8, "actor_hidden_dims": (16, 16), "value_hidden_dims": (16, 16), "num_qs": 2, "flow_steps": 2}


@pytest.fixture
def config(pointmaze, tmp_path):
    """Returns a function that makes the config of tiny runs."""

    def make(group="a", **settings):
        given = {"agent": "agents/bc.py", "env_name": POINTMAZE, "dataset": str(pointmaze), "overrides": TINY}
        given |= {"offline_steps": 20, "log_interval": 5, "save_interval": 10, "eval_interval": 10, "eval_episodes": 1}
        given |= {"horizon_length": 5, "eval_workers": 1, "save_dir": str(tmp_path), "run_group": group}
        return RunConfig(**given | settings)

    return make


@pytest.mark.check
def test_hooks_are_called_with_every_row_and_checkpoint(config):
    rows, saved = [], []
    result = train(
        config(num_seeds=2),
        on_metrics=lambda run, name, step, row: rows.append((run.name, name, step, sorted(row))),
        on_checkpoint=lambda run, step, agent: saved.append((run.name, step, int(agent.step))),
    )
    assert [path.name for path in result.directories] == ["sd0", "sd1"] and result.directory == result.directories[0]
    assert [row[:3] for row in rows if row[1] == "train"] == [
        (s, "train", n) for n in (5, 10, 15, 20) for s in ("sd0", "sd1")
    ]
    assert {row[:3] for row in rows if row[1] == "eval"} == {(s, "eval", n) for n in (10, 20) for s in ("sd0", "sd1")}
    assert all("flow/loss" in row[3] for row in rows if row[1] == "train")
    assert saved == [(seed, step, step) for step in (10, 20) for seed in ("sd0", "sd1")]
    assert int(result.agent.step) == 20


def test_a_second_call_resumes_and_a_third_has_nothing_to_do(config, capsys):
    def stop(run, name, step, row):
        if name == "train" and step == 15:
            signal.raise_signal(signal.SIGINT)

    whole = train(config("whole"))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        train(config("broken"), on_metrics=stop)
    assert signal.getsignal(signal.SIGINT) == before
    broken = train(config("broken"))
    assert "resuming at step 15" in capsys.readouterr().out
    assert_same_run(whole.directory, broken.directory)
    assert train(config("broken")).directories == broken.directories
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [("return_mean", "length_mean"), ("episodes", "return_mean", "success_rate")])
def test_the_end_of_a_run_is_printed_from_files_of_older_versions_too(columns, config, tmp_path, capsys):
    run = RunDirectory(RunSpec(0, ml_collections.ConfigDict(), {}, tmp_path / "run"), {})
    values = {"episodes": "1", "return_mean": "-3.5", "length_mean": "60", "success_rate": "1.0"}
    rows = ["step", *columns], ["20", *(values[name] for name in columns)]
    (run.path / "eval.csv").write_text("".join(f"{','.join(row)}\n" for row in rows))
    print_result(run, config())
    result = "success 1.00 [0.21, 1.00], return -3.5" if "success_rate" in columns else "return -3.5"
    assert f"  result      {result} (1 episodes)\n" in capsys.readouterr().out


def test_invalid_settings_are_errors_before_any_work(config, tmp_path):
    with pytest.raises(UserError, match="no setting 'lrr'"):
        train(config(overrides={"lrr": 1.0}))
    with pytest.raises(UserError, match="--eval_episodes=-1: it must be at least 0"):
        train(config(eval_episodes=-1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bars_can_be_left_out(progress, config, capfd):
    """Without them stderr stays empty; the run is the same."""
    train(config(progress=progress))
    assert ("updates/s" in capfd.readouterr().err) == progress
