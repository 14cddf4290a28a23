"""Videos of episodes in a grid, rendered off screen in a separate process."""

import functools
import math
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np

from utils.errors import UserError
from utils.observations import Observation
from utils.output.animation import FORMATS, looping_image
from utils.rollout.evaluator import Evaluator, Policy, Result, episode_seed
from utils.rollout.worker_pool import DEFAULT_TIMEOUT, WorkerError
from utils.system.files import atomic_write_bytes
from utils.system.rendering import no_rendering, rendering_backend

BORDER = 6  # pixels around each episode
RUNNING, SUCCESS, FAILURE = (110, 110, 110), (40, 180, 70), (210, 50, 50)  # colours of the border, RGB
HOLD_SECONDS = 2  # duration of the last image, which shows all outcomes


class VideoUnavailable(UserError):
    """Error of recording a video; the message is one line with the reason."""


def record(
    make_env: Callable[[], gymnasium.Env],
    policy: Policy,
    num_episodes: int,
    seed: int,
    path: str | Path | Sequence[str | Path],
    horizon: int,
    *,
    frame_skip: int = 3,
    fps: int = 15,
    timeout: float = DEFAULT_TIMEOUT,
    check: Callable[[], None] = lambda: None,
) -> Result:
    """Writes a video of the first episodes of the evaluation with this seed, in a grid.

    The border of an episode is grey while it runs, then green for success and red for failure.

    Args:
        make_env, policy, num_episodes, seed, horizon: see `Evaluator`; the policy gets batches of 1.
        path: file, or several files of the same video, each written once it is complete. '.gif' and '.webp' loop and
            are reduced to 2 MB (utils/output/animation.py); all others are mp4.
        frame_skip: environment steps per frame, at least 1.
        fps: frames per second; 15 at a frame_skip of 3 shows OGBench's arms (20 steps/s) 2.25 times too fast.
        timeout, check: see `Evaluator`; any exception that `check` raises ends the recording.

    Returns:
        the result of `Evaluator.evaluate` for these episodes.

    Raises:
        VideoUnavailable: MuJoCo cannot render here, the environment cannot be rendered, or ffmpeg is missing.
        UserError: `path` cannot be written.
    """
    backend = _waiting(rendering_backend, check)
    if backend is None:
        raise VideoUnavailable(no_rendering())
    # JAX warns of the fork that starts ffmpeg, but no code of JAX runs between fork and exec.
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
    try:
        imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise VideoUnavailable("there is no ffmpeg; install it or reinstall imageio-ffmpeg") from error
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = functools.partial(_FrameSaver.make, make_env, frame_skip, folder)
        try:
            environ = {"MUJOCO_GL": backend}  # Before the worker imports mujoco.
            patience: dict[str, Any] = {"timeout": timeout, "check": check}
            with Evaluator(make, horizon, num_workers=1, envs_per_worker=1, environ=environ, **patience) as evaluator:
                result = evaluator.evaluate(policy, num_episodes, seed)
        except WorkerError as error:
            raise VideoUnavailable(f"the episodes could not be rendered: {str(error).splitlines()[0]}") from error
        episodes = [np.load(folder / f"{episode_seed(seed, i)}.npy", mmap_mode="r") for i in range(num_episodes)]
        success, hold = result.get("success", np.zeros(num_episodes)), HOLD_SECONDS * fps

        def images() -> Iterator[np.ndarray]:
            for image in _grid_images(episodes, success, hold):
                check()
                yield image

        for file in map(Path, [path] if isinstance(path, str | Path) else path):
            kind = file.suffix.removeprefix(".").lower()
            data = looping_image(images, kind, fps) if kind in FORMATS else _mp4(images(), fps, folder / "video.mp4")
            atomic_write_bytes(file, data)
    return result


def _waiting(function: Callable[[], Any], check: Callable[[], None]) -> Any:
    """Returns the result of `function`, which may take long; exceptions of `check`, called meanwhile, end the wait."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    while thread.is_alive():
        check()
        thread.join(0.1)
    return results[0]


def _mp4(images: Iterable[np.ndarray], fps: int, path: Path) -> bytes:
    """Returns images as an mp4; `path` is a file to encode it in."""
    # The grid's sides are even, as the codec demands; the default of 16 would rescale the images.
    writer: Any  # ImageIO's types lack append_data.
    with imageio.get_writer(path, fps=fps, macro_block_size=2) as writer:
        for image in images:
            writer.append_data(image)
    return path.read_bytes()


def _grid_images(episodes: list[np.ndarray], success: np.ndarray, hold: int) -> Iterator[np.ndarray]:
    """Yields the images of the video.

    Args:
        episodes: frames of each episode, uint8 [t_i, h, w, 3]; the last one stays after its end.
        success: [num_episodes], > 0 for success.
        hold: number of repetitions of the last image.

    Yields:
        uint8 [height, width, 3], both even.
    """
    _, height, width, _ = episodes[0].shape
    height, width = height + 2 * BORDER + height % 2, width + 2 * BORDER + width % 2
    columns = len(episodes) if len(episodes) <= 3 else math.ceil(math.sqrt(len(episodes)))
    image = np.zeros((math.ceil(len(episodes) / columns) * height, columns * width, 3), np.uint8)
    for time in range(max(map(len, episodes)) + hold):
        for i, frames in enumerate(episodes):
            row, column = divmod(i, columns)
            tile = image[row * height : (row + 1) * height, column * width : (column + 1) * width]
            over = time >= len(frames) - 1
            tile[:] = RUNNING if not over else SUCCESS if success[i] > 0 else FAILURE
            frame = frames[min(time, len(frames) - 1)]
            tile[BORDER : BORDER + frame.shape[0], BORDER : BORDER + frame.shape[1]] = frame
        yield image


class _FrameSaver(gymnasium.Wrapper):
    """Wrapper that renders the first, the last and every `frame_skip`-th step, to '<seed of the reset>.npy'."""

    _frame_skip: int
    _folder: Path

    @classmethod
    def make(cls, make_env: Callable[[], gymnasium.Env], frame_skip: int, folder: Path) -> "_FrameSaver":
        """Wraps the environment of `make_env`, in a worker: only `make_env` is sent to it."""
        env = cls(make_env())
        env._frame_skip, env._folder = frame_skip, folder
        return env

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        result = self.env.reset(seed=seed, options=options)
        # Anti-aliasing and sharp shadows dominate the time of software rendering. A policy's images keep them.
        model = getattr(self.env.unwrapped, "model", None)
        if model is not None and not isinstance(result[0], Observation):
            model.vis.quality.offsamples, model.vis.quality.shadowsize = 0, 1024
        self._path, self._steps, self._frames = self._folder / f"{seed}.npy", 0, [self._frame()]
        return result

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        result = self.env.step(action)
        self._steps += 1
        ended = result[2] or result[3]
        if ended or self._steps % self._frame_skip == 0:
            self._frames.append(self._frame())
        if ended:
            np.save(self._path, np.stack(self._frames))
        return result

    def _frame(self) -> np.ndarray:
        """Returns an image of the current state, uint8 [h, w, 3]."""
        frame = self.env.render()
        if not isinstance(frame, np.ndarray):
            raise TypeError("the environment's render() returns no image; make it with render_mode='rgb_array'")
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            got = f"{list(frame.shape)} {frame.dtype}"
            raise TypeError(f"the environment's render() returns {got}, not [height, width, 3] uint8")
        return frame
