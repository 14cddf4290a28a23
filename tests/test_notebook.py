"""examples/notebook.py: what it shows, at a small size."""

from utils.output.loggers import read_csv
from utils.system.files import ROOT

SMALLER = {
    "range(50)": "range(2)",
    "offline_steps=10_000": "offline_steps=20",
    "eval_episodes=10": "eval_episodes=1",
    "log_interval=1_000": "log_interval=10",
    "episodes=20": "episodes=2",
}


def test_the_cells_run(tmp_path, monkeypatch):
    """Twice: the second time the run is finished, and its result is the same."""
    source = (ROOT / "examples" / "notebook.py").read_text()
    for text, smaller in SMALLER.items():
        assert source.count(text) == 1
        source = source.replace(text, smaller)
    monkeypatch.chdir(tmp_path)
    first, second = {"__name__": "first"}, {"__name__": "second"}
    exec(compile(source, "notebook.py", "exec"), first)
    assert first["chunks"].shape == (8, first["agent"].config.action_dim)
    assert first["action"].shape == (2,) and abs(first["action"]).max() <= 1
    assert first["step"] == 20 and first["settings"]["dataset"]["transitions"] == 2 * 49
    assert (tmp_path / "reacher.mp4").stat().st_size > 1000
    assert read_csv(first["result"].directory / "train.csv")["step"].tolist() == [10, 20]
    exec(compile(source, "notebook.py", "exec"), second)
    assert (second["chunks"] == first["chunks"]).all()
