"""The tasks of envs/panda, in the repository around this package, and the names of their states and actions."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np


def _axes(name: str, kind: str = "pos") -> list[str]:
    return [f"{name}_{axis}.{kind}" for axis in "xyz"]


def _box(name: str) -> list[str]:
    rotation = [f"{name}_rotation_{row}{column}.pos" for column in (1, 2) for row in (1, 2, 3)]
    places = [*_axes(name), *_axes(f"{name}_from_hand"), *_axes(f"{name}_to_plane")]
    return [*places, *rotation, *_axes(name, "vel"), *_axes(f"{name}_spin", "vel")]


# LeRobot passes on to a policy what ends in .pos or .vel. Units and meaning: envs/panda/arm.py.
ARM = [
    *(f"joint{i}.pos" for i in range(1, 8)),
    *(f"joint{i}.vel" for i in range(1, 8)),
    *_axes("hand"),
    *_axes("hand", "vel"),
    *_axes("lead"),
    *("gripper.pos", "gripper.vel"),
]
_OVEN = [*_axes("handle"), *_axes("handle_from_hand"), "oven_x.pos", "oven_y.pos", "oven_yaw.pos"]
STATES = {
    "ArrangeBoxes-v0": [*ARM, *_box("red"), *_box("blue")],
    "OpenMicrowave-v0": [*ARM, "door.pos", "door.vel", *_OVEN],
}
ACTIONS = [*_axes("hand", "vel"), "gripper.pos"]
FPS = 10  # An action is 0.1 s of simulated time.
CAMERAS = ("front", "wrist")  # in the order of envs.panda.arm
DESCRIPTIONS = {"ArrangeBoxes-v0": "arrange the boxes", "OpenMicrowave-v0": "open the microwave"}


def fail(message: str) -> NoReturn:
    """Ends the program with a one-line error and exit code 2, after invalid input."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def check(task: str, max_steps: int | None, image_size: int) -> None:
    """Ends the program if a setting is invalid."""
    if task not in STATES:
        fail(f"unknown task '{task}'; use {' or '.join(STATES)}")
    if max_steps is not None and max_steps < 1:
        fail("max_steps must be at least 1")
    if not 0 <= image_size <= 1440:
        fail("image_size must be between 0 (no cameras) and 1440")


def make(task: str, max_steps: int | None, image_size: int, videos: bool = False) -> Any:
    """Returns the task's environment, unwrapped; MuJoCo and the repository are imported here, not earlier.

    With `videos`, `render` draws the scene, if this machine can.
    """
    repository = Path(__file__).resolve().parents[4]
    if not (repository / "envs" / "panda").is_dir():
        fail(
            "the simulated tasks are not there; install them from the repository: pip install -e real/lerobot_env_otql"
        )
    if str(repository) not in sys.path:
        sys.path.append(str(repository))
    try:
        import gymnasium

        import envs.panda  # noqa: F401  registers the tasks
        from utils.errors import UserError
        from utils.system.rendering import rendering_backend, set_rendering_backend
    except ImportError as error:
        fail(f"the simulated tasks cannot be imported ({error}); in a shell: cd {repository}")
    try:
        draws = bool(image_size) or (videos and rendering_backend() is not None)
        if draws:
            set_rendering_backend()
        settings: dict[str, Any] = {"max_steps": max_steps, "image_size": image_size}
        settings |= {"render_mode": "rgb_array"} if draws and videos else {}
        return gymnasium.make(task, disable_env_checker=True, **settings).unwrapped
    except UserError as error:
        fail(str(error))
    except ImportError as error:
        fail(f"the simulated tasks need mujoco ({error}): pip install mujoco")


def expert(task: str, env: Any, seed: int, noise: float) -> Iterator[np.ndarray]:
    """Returns the actions [4] of the task's scripted expert for the episode that has just started."""
    from envs.panda.experts import EXPERTS

    return EXPERTS[task](env, np.random.default_rng(seed), noise).actions()
