from functools import partial
from time import sleep

import imageio.v3 as imageio
import numpy as np
import pytest
from counting_env import CountingEnv

from utils.rollout import video
from utils.rollout.evaluator import Evaluator
from utils.rollout.video import FAILURE, RUNNING, SUCCESS, VideoUnavailable, record, rendering_backend
from utils.system import rendering

HORIZON = 4


def policy(observations, episodes, chunks):
    return np.zeros((len(observations), 2 * HORIZON))


@pytest.fixture
def any_backend(monkeypatch):
    """For environments that render without OpenGL."""
    monkeypatch.setattr(video, "rendering_backend", lambda: "off")


def test_record(tmp_path, any_backend):
    path = tmp_path / "new" / "episodes.mp4"
    result = record(CountingEnv, policy, 5, 0, path, HORIZON, frame_skip=3)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with Evaluator(CountingEnv, HORIZON, num_workers=1) as evaluator:  # the evaluation's own first episodes
        np.testing.assert_array_equal(evaluator.evaluate(policy, 6, seed=0)["return"][:5], result["return"])
    frames = imageio.imread(path)
    # A first frame, one each 3 steps and the last; then two seconds. 21 x 30 and the border: made even.
    count = 1 + -(-max(result["length"]) // 3) + 30
    assert frames.shape == (count, 2 * 34, 3 * 42, 3)
    assert 0 < result["success_rate"] < 1
    for i, success in enumerate(result["success"]):
        row, column = divmod(i, 3)
        corner = frames[:, row * 34 + 2, column * 42 + 2].astype(int)
        assert np.abs(corner[-1] - (SUCCESS if success else FAILURE)).max() < 40  # the codec shifts colours
        if result["length"][i] > 6:
            assert np.abs(corner[0] - RUNNING).max() < 40


def test_images_keep_the_last_frame_of_a_finished_episode():
    episodes = [np.full((length, 4, 6, 3), 10 * length, np.uint8) for length in (1, 3)]
    images = [image.copy() for image in video._grid_images(episodes, np.array([1.0, 0.0]), hold=2)]
    assert len(images) == 5 and images[0].shape == (16, 36, 3)
    for time, image in enumerate(images):
        assert (image[6:10, 6:12] == 10).all() and (image[6:10, 24:30] == 30).all()
        assert tuple(image[0, 0]) == SUCCESS
        assert tuple(image[0, -1]) == (RUNNING if time < 2 else FAILURE)


def test_no_renderer(tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "no-such-backend")
    assert rendering_backend() is None
    with pytest.raises(VideoUnavailable, match="MUJOCO_GL=no-such-backend; unset it"):
        record(CountingEnv, policy, 1, 0, tmp_path / "episodes.mp4", HORIZON)
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(rendering, "_renders", lambda backend: False)
    with pytest.raises(VideoUnavailable, match="install"):
        record(CountingEnv, policy, 1, 0, tmp_path / "episodes.mp4", HORIZON)
    assert not list(tmp_path.iterdir())


def test_each_backend_is_probed_once_and_a_crash_is_survived(monkeypatch):
    monkeypatch.setattr(rendering, "PROBE", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setenv("MUJOCO_GL", "crashes")
    assert rendering_backend() is None
    monkeypatch.setattr(rendering, "PROBE", "pass")
    assert rendering_backend() is None  # cached
    monkeypatch.setenv("MUJOCO_GL", "works")
    assert rendering_backend() == "works"


@pytest.mark.parametrize(
    ("faults", "message"), [({"render_mode": None}, "returns no image"), ({"fault": "raise"}, "gripper fell off")]
)
def test_an_environment_that_cannot_be_rendered(tmp_path, any_backend, faults, message):
    with pytest.raises(VideoUnavailable, match=message) as caught:
        record(partial(CountingEnv, **faults), policy, 5, 0, tmp_path / "episodes.mp4", HORIZON)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.check
@pytest.mark.parametrize(("shape", "kind"), [((3, 16, 20), "uint8"), ((16, 20, 3), "float64"), ((16, 20), "uint8")])
def test_frames_that_are_no_images(shape, kind):
    env = video._FrameSaver(CountingEnv())
    env.env.render = lambda: np.zeros(shape, kind)
    with pytest.raises(TypeError, match=r"render\(\) returns \[.*\] (uint8|float64), not \[height, width, 3\] uint8"):
        env._frame()


def test_a_signal_ends_the_recording(tmp_path, any_backend):
    """While the episodes run, and while their images are encoded, some 30 of which show the end."""
    calls = []

    def check(last=None):
        calls.append(None)
        if len(calls) == last:
            raise KeyboardInterrupt

    path = tmp_path / "episodes.mp4"
    record(CountingEnv, policy, 1, 0, path, HORIZON, check=check)
    path.unlink()
    for last in (3, len(calls) - 12):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            record(CountingEnv, policy, 1, 0, path, HORIZON, check=partial(check, last))
    assert not list(tmp_path.iterdir())


def test_a_renderer_that_hangs(tmp_path, any_backend):
    with pytest.raises(VideoUnavailable, match=r"the environment, the reset of episode 0 .*: no answer for 0.3 s"):
        record(Hangs, policy, 1, 0, tmp_path / "episodes.mp4", HORIZON, timeout=0.3)


class Hangs(CountingEnv):
    """Renders for ever."""

    def render(self):
        sleep(1000)


def test_ogbench(tmp_path):
    if rendering_backend() is None:
        pytest.skip("MuJoCo cannot render here: neither EGL nor OSMesa")
    ogbench = pytest.importorskip("ogbench")
    name = "antmaze-medium-navigate-singletask-task1-v0"
    make_env = partial(ogbench.make_env_and_datasets, name, env_only=True, max_episode_steps=6)
    record(make_env, lambda *batch: np.zeros((1, 8)), 2, 0, tmp_path / "episodes.mp4", 1)
    frames = imageio.imread(tmp_path / "episodes.mp4")
    assert frames.shape == (3 + 30, 212, 424, 3)
    assert frames[0, 6:206, 6:206].std() > 20  # there is something to see
