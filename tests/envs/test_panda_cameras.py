"""The Panda tasks' images: what is drawn, and when; demonstrations that hold them."""

import os
import subprocess
import sys

import numpy as np
import pytest
from panda_helpers import needs_model

from envs.gym_dataset import read_gym_dataset
from envs.npz import write_npz
from envs.panda import TASKS, demonstrate
from envs.panda.open_microwave import OpenMicrowave
from utils.system.rendering import rendering_backend

pytestmark = needs_model


def draw(code, folder):
    """Runs a program that draws, in a process of its own and in `folder`, which it leaves its files in."""
    backend = rendering_backend()
    if backend is None:
        pytest.skip("no off-screen rendering here")
    code += "import os; os._exit(0)\n"  # Without the interpreter's teardown: OpenGL contexts fail noisily in it.
    environ = os.environ | {"MUJOCO_GL": backend, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_opengl_before_a_picture_is_asked_for():
    code = (
        "import sys, gymnasium, envs.panda\n"
        "assert 'mujoco' not in sys.modules\n"
        "env = gymnasium.make('ArrangeBoxes-v0', render_mode='rgb_array')\n"
        "env.reset(seed=0); env.step(env.action_space.sample())\n"
        "assert 'OpenGL' not in sys.modules and 'pygame' not in sys.modules and 'gym_hil' not in sys.modules\n"
    )
    environ = os.environ | {"MUJOCO_GL": "disable", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_renders(tmp_path):
    code = (
        "import numpy as np, envs.panda\n"
        "from envs.tasks import make_env\n"
        "for name in envs.panda.TASKS:\n"
        "    env = make_env(f'gym:{name}', render_mode='rgb_array', width=96, height=64)\n"
        "    quality = env.unwrapped.model.vis.quality\n"
        "    quality.offsamples, quality.shadowsize = 0, 256\n"
        "    env.reset(seed=0)\n"
        "    np.save(name, env.render())\n"
        "    env.close()\n"
    )
    draw(code, tmp_path)
    frames = [np.load(tmp_path / f"{name}.npy") for name in TASKS]
    assert all(frame.shape == (64, 96, 3) and frame.std() > 20 for frame in frames)


def test_cameras(tmp_path):
    """A demonstration with images takes the steps of one without; the state is the arm's; both cameras see it move."""
    code = (
        "import numpy as np\n"
        "from envs.panda import demonstrate\n"
        "from envs.tasks import make_env\n"
        "from envs.panda.experts import EXPERTS\n"
        "for prefix in ('', 'visual-'):\n"
        "    env = make_env(f'{prefix}OpenMicrowave-v0')\n"
        "    env.unwrapped.max_steps = 12\n"
        "    expert = EXPERTS['OpenMicrowave-v0'](env.unwrapped, np.random.default_rng(1))\n"
        "    rows, _ = demonstrate.rollout(env.unwrapped, expert, 0)\n"
        "    np.savez(f'{prefix}rows.npz', **rows)\n"
        "observation, _ = env.reset(seed=0)\n"
        "np.savez('first.npz', **observation._asdict())\n"
    )
    draw(code, tmp_path)
    plain, rows, first = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("rows", "visual-rows", "first"))
    assert rows.keys() == plain.keys() | {"images"}
    for key in plain.keys() - {"observations"}:
        np.testing.assert_array_equal(rows[key], plain[key])
    np.testing.assert_array_equal(rows["observations"], plain["observations"][:, :25])
    images = rows["images"]
    assert images.dtype == np.uint8 and images.shape == (13, 2, 64, 64, 3)
    assert images.std(axis=(2, 3, 4)).min() > 10
    assert np.abs(images[0].astype(int) - images[-1]).mean(axis=(1, 2, 3)).min() > 2
    np.testing.assert_array_equal(first["state"], rows["observations"][0])
    np.testing.assert_array_equal(first["images"], images[0])


def test_demonstrations_with_images_are_stored(tmp_path, monkeypatch):
    """The file holds them beside the state of the arm, whatever the number of their rows."""
    env = PandaEnvWithImages(image_size=64)

    def make_here(cache, counts, make, workers):  # Workers would not have the environment above.
        for index in range(counts["train"]):
            write_npz(cache.file("train", index), make("train", index))

    monkeypatch.setattr(demonstrate, "make_missing", make_here)
    monkeypatch.setattr(demonstrate, "_environment", lambda name: env)
    monkeypatch.setattr(demonstrate, "set_rendering_backend", lambda: None)
    path = demonstrate.demonstrate("visual-OpenMicrowave-v0", episodes=2, workers=1, output=tmp_path / "demos.npz")
    dataset = read_gym_dataset(path, 25, 4, (2, 64, 64, 3))
    assert dataset["terminals"].sum() == 2 and len(dataset["images"]) == len(dataset["observations"])
    steps = np.concatenate([np.arange(n) for n in np.diff(np.flatnonzero(dataset["terminals"]), prepend=-1)])
    np.testing.assert_array_equal(dataset["images"][:, 1, 5, 5, 0], steps % 256)


class PandaEnvWithImages(OpenMicrowave):
    """Environment whose images hold the step and need no renderer."""

    def _render_image(self, size, camera):
        return np.full((*size, 3), self._steps, np.uint8)
