"""Videos at the end of a run, and runs without them."""

import imageio.v2 as imageio
from tiny_runs import BC, POINTMAZE, run_dir, run_main

from utils.rollout.video import rendering_backend


def test_run_films_its_policy_or_says_why_not(pointmaze, tmp_path, monkeypatch):
    """A finished run has its video; where nothing renders it finishes all the same, with the reason in one line."""
    flags = (*BC, f"--env_name={POINTMAZE}", f"--dataset={pointmaze}", "--offline_steps=10", "--video_episodes=1")
    if rendering_backend():
        silent = run_main(*flags[:-1], f"--save_dir={tmp_path / 'with'}")
        assert "finished: " in silent.out
        run_main(*flags, f"--save_dir={tmp_path / 'with'}", "--video_frame_skip=50")  # A finished run is filmed later.
        (video,) = (run_dir(tmp_path / "with") / "videos").glob("*.mp4")
        assert sum(1 for _ in imageio.get_reader(video)) > 10
    monkeypatch.setattr("utils.rollout.video.rendering_backend", lambda: None)
    outcome = run_main(*flags, f"--save_dir={tmp_path / 'without'}")
    assert "no video: MuJoCo cannot render" in outcome.err
    assert (run_dir(tmp_path / "without") / "summary.json").exists()
