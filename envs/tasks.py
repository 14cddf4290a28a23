"""Tasks by name, and their environments."""

import dataclasses
import difflib
import math
import re
from typing import TYPE_CHECKING, Any

from envs import minari_store
from utils.errors import UserError, failure
from utils.system.rendering import mujoco_errors, set_rendering_backend

if TYPE_CHECKING:
    import gymnasium
    import numpy as np

VISUAL = "visual-"  # prefix of the names of tasks with images
# OGBench's single-task domains with continuous actions, and the dataset types of each.
_DATASET_TYPES: dict[str, tuple[str, ...]] = {
    **{f"pointmaze-{size}": ("navigate", "stitch") for size in ("medium", "large", "giant", "teleport")},
    **{f"antmaze-{size}": ("navigate", "stitch", "explore") for size in ("medium", "large", "teleport")},
    "antmaze-giant": ("navigate", "stitch"),
    **{f"humanoidmaze-{size}": ("navigate", "stitch") for size in ("medium", "large", "giant")},
    **{f"antsoccer-{size}": ("navigate", "stitch") for size in ("arena", "medium")},
    **{f"cube-{size}": ("play", "noisy") for size in ("single", "double", "triple", "quadruple")},
    "cube-octuple": ("play",),
    "scene": ("play", "noisy"),
    **{f"puzzle-{size}": ("play", "noisy") for size in ("3x3", "4x4", "4x5", "4x6")},
}
PANDA_TASKS: tuple[str, ...] = ("ArrangeBoxes-v0", "OpenMicrowave-v0")
_STATES_ONLY = ("pointmaze", "antsoccer", "cube-octuple")  # Prefixes of domains without images.
_TASK_SUFFIXES = ("", *(f"-task{number}" for number in range(1, 6)))
_TASK_NAME = re.compile(r"(?P<domain>.+)-(?P<type>[a-z]+)-singletask(?P<task>(?:-task[1-5])?)-v0")

# The 40 tasks of the paper's Table 1: eight domains, five tasks each.
TABLE1_TASKS: tuple[str, ...] = tuple(
    f"{dataset}-singletask-task{number}-v0"
    for dataset in (
        "antmaze-large-navigate",
        "antmaze-giant-navigate",
        "humanoidmaze-medium-navigate",
        "humanoidmaze-large-navigate",
        "cube-double-play",
        "cube-triple-play",
        "scene-play",
        "puzzle-3x3-play",
    )
    for number in range(1, 6)
)


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: as given, such as 'cube-double-play-singletask-task2-v0' or 'gym:Pendulum-v1'.
        domain: key of the presets, such as 'cube-double', 'OpenMicrowave' or 'robot'; 'gym' for any other environment,
            'minari' for any dataset of Minari. The prefix for images does not change it.
        kind: 'manipulation', 'pointmaze', 'locomotion', 'gym', 'minari' or 'robot', which has no environment.
        env_id: gymnasium's id, such as 'cube-double-singletask-task2-v0', or Minari's of the dataset.
        dataset: OGBench's dataset, such as 'cube-double-play-v0'; None for 'gym', 'minari' and 'robot'.
        rendered: whether its observations are images that MuJoCo renders.
    """

    name: str
    domain: str
    kind: str
    env_id: str
    dataset: str | None
    rendered: bool = False

    @property
    def terminates(self) -> bool:
        """True if episodes of the data end at terminal states; play in OGBench's data continues after a success."""
        return self.dataset is None

    @property
    def video_size(self) -> int | None:
        """Width and height of a video's images in pixels; None for any other environment, which may not take a size."""
        return None if self.kind in ("gym", "minari") else 320


def task_names() -> list[str]:
    """Returns all OGBench names that `parse_task` accepts."""
    return [
        f"{prefix}{domain}-{dataset_type}-singletask{suffix}-v0"
        for domain, types in _DATASET_TYPES.items()
        for prefix in (("",) if domain.startswith(_STATES_ONLY) else ("", VISUAL))
        for dataset_type in types
        for suffix in _TASK_SUFFIXES
    ]


def parse_task(env_name: str) -> Task:
    """Returns the task of a name.

    Args:
        env_name: OGBench's name with dataset type and 'singletask' (without a number: OGBench's default task of the
            domain) or one of PANDA_TASKS, each with 'visual-' before it for images; 'gym:' and the id of any gymnasium
            environment; 'minari:' and the id of a dataset of Minari; or 'robot:' and any name.

    Raises:
        UserError: unknown or goal-conditioned name; the message suggests names.
    """
    if env_name.startswith("gym:"):
        if env_name == "gym:":
            raise UserError("'gym:' needs the id of an environment, for example gym:Pendulum-v1")
        return Task(env_name, "gym", "gym", env_name.removeprefix("gym:"), None)
    if minari_store.is_minari(env_name):
        return Task(env_name, "minari", "minari", minari_store.dataset_id(env_name), None)
    if env_name.startswith("robot:"):
        if not re.fullmatch(r"[\w.-]+", env_name.removeprefix("robot:")):
            raise UserError("'robot:' needs a name of letters, digits, '_', '-' and '.', for example robot:pick_cube")
        return Task(env_name, "robot", "robot", "", None)
    plain = env_name.removeprefix(VISUAL)
    rendered = plain != env_name
    if plain in PANDA_TASKS:  # Gymnasium imports the module before the colon, which registers the task.
        return Task(env_name, plain.removesuffix("-v0"), "gym", f"envs.panda:{env_name}", None, rendered)
    match = _TASK_NAME.fullmatch(plain)
    states_only = rendered and plain.startswith(_STATES_ONLY)
    if match and match["type"] in _DATASET_TYPES.get(match["domain"], ()) and not states_only:
        domain = match["domain"]
        kind = {"cube": "manipulation", "scene": "manipulation", "puzzle": "manipulation", "pointmaze": "pointmaze"}
        return Task(
            name=env_name,
            domain=domain,
            kind=kind.get(domain.split("-")[0], "locomotion"),
            env_id=f"{VISUAL * rendered}{domain}-singletask{match['task']}-v0",
            dataset=f"{VISUAL * rendered}{domain}-{match['type']}-v0",
            rendered=rendered,
        )
    raise UserError(_unknown(env_name))


def _unknown(env_name: str) -> str:
    """Returns an error message that suggests names."""
    if env_name.startswith("powderworld"):
        return f"'{env_name}' has discrete actions, which are not supported; try scene-play-singletask-v0"
    single = re.sub(r"(-oraclerep)?-v0$", "-singletask-v0", env_name)
    if "singletask" not in env_name and single in task_names():
        numbered = single.replace("singletask", "singletask-task1")
        return f"'{env_name}' is goal-conditioned; use {single} or {numbered} to -task5-v0"
    near = difflib.get_close_matches(env_name, [*task_names(), *PANDA_TASKS], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "use a name such as scene-play-singletask-task1-v0"
    return f"there is no environment '{env_name}'; {hint} (or gym:<id> for another gymnasium environment)"


def make_env(
    env_name: str,
    *,
    render_mode: str | None = None,
    width: int | None = None,
    height: int | None = None,
    max_episode_steps: int | None = None,
) -> "gymnasium.Env":
    """Makes the environment of a task. `functools.partial(make_env, name)` can be sent to a spawned process.

    OGBench's episodes are functions of `reset(seed=...)` and the actions. Actions are in [-1, 1] in every dimension:
    gymnasium environments with other finite bounds are rescaled. Observations are vectors or, with images,
    `Observation`s (utils/observations.py): OGBench's without a state, the Panda tasks' with that of the arm. The
    environment of a dataset of Minari gives its observations joined (envs/observation_layout.py).

    Args:
        env_name: see `parse_task`.
        render_mode: gymnasium's, such as 'rgb_array'.
        width: of rendered images (pixels); OGBench's tasks with images keep that of their observations.
        height: of rendered images (pixels).
        max_episode_steps: step limit, besides that of the task.

    Raises:
        UserError: unknown name, a robot, an environment that fails, unsupported spaces, or images without a renderer.
    """
    if max_episode_steps is not None:
        from gymnasium.wrappers import TimeLimit

        env = make_env(env_name, render_mode=render_mode, width=width, height=height)
        return TimeLimit(env, max_episode_steps)
    task = parse_task(env_name)
    if task.kind == "robot":
        raise UserError(f"{env_name} has no simulation, only data: it cannot be stepped or rendered")
    kwargs: dict[str, Any] = {"render_mode": render_mode, "width": width, "height": height}
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if task.rendered:
        set_rendering_backend()
    if task.kind == "minari":
        from envs.minari_data import make_minari_env

        with mujoco_errors():
            return make_minari_env(env_name, kwargs)
    if task.kind == "gym":
        with mujoco_errors():
            return _make_gym_env(task, kwargs)
    from envs.ogbench import import_ogbench

    import_ogbench()
    import gymnasium

    from envs.wrappers import SeededReset, with_images

    if task.kind == "manipulation":
        kwargs.pop("render_mode", None)  # These always render arrays, and gymnasium warns about any mode.
    if task.rendered:
        kwargs = {}  # Their observations are the rendered images.
    return with_images(SeededReset(gymnasium.make(task.env_id, disable_env_checker=True, **kwargs)))


def _make_gym_env(task: Task, kwargs: dict[str, Any]) -> "gymnasium.Env":
    """Makes a gymnasium environment other than OGBench's, with actions in [-1, 1]."""
    from utils.system.rendering import choose_renderer

    choose_renderer()
    import gymnasium

    from envs.wrappers import Cameras, Checked, action_box, in_unit_box, with_images

    what = f"cannot make the gymnasium environment '{task.env_id}'"
    try:
        env = gymnasium.make(task.env_id, disable_env_checker=True, **kwargs)
        env = with_images(env if task.domain != "gym" else Checked(env))
        spaces = {"actions": env.action_space}
    except UserError:
        raise
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}") from error
    except Exception as error:
        expected = "it must have an observation_space and an action_space" if "_space'" in str(error) else ""
        raise failure(error, f"{what}: it", expected) from error
    if not isinstance(env, Cameras):
        spaces = {"observations": env.observation_space} | spaces
    for label, space in spaces.items():
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            images = ", or have uint8 images (envs/wrappers.py)" if label == "observations" else ""
            raise UserError(f"'{task.name}' has {label} in {space}; it must be a Box with one axis{images}")
    check_action_space(task.name, action_box(env))
    return in_unit_box(env)


def check_action_space(name: str, space: "gymnasium.spaces.Box") -> None:
    """Checks that actions can be rescaled: real numbers between finite bounds that differ.

    Raises:
        UserError: they cannot; names the dimension.
    """
    if space.dtype.kind != "f":
        raise UserError(f"'{name}' has actions of {space.dtype}; it must take real numbers; wrap it so that it does")
    for index, (low, high) in enumerate(zip(space.low.tolist(), space.high.tolist(), strict=True)):
        where = f"(dimension {index} is in [{low:g}, {high:g}])"
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError(f"'{name}' has unbounded actions {where}; wrap it so that they are bounded")
        if not low < high:
            raise UserError(f"'{name}' has actions without a range {where}; wrap it without that dimension")


def action_bounds(env: "gymnasium.Env") -> tuple["np.ndarray", "np.ndarray"]:
    """Returns the bounds of the actions (low [a], high [a]) before `make_env` rescaled them to [-1, 1]."""
    if env.has_wrapper_attr("own_bounds"):
        return env.get_wrapper_attr("own_bounds")
    from envs.wrappers import action_box

    actions = action_box(env)
    return actions.low, actions.high
