"""Makes demonstrations of a Panda task with its scripted expert.

    python -m envs.panda.demonstrate --env_name=OpenMicrowave-v0 --episodes=30

The file (.npz) has OGBench's layout (envs/gym_dataset.py, second convention), as demonstrations recorded by hand have:
one row per state, with `observations`, `actions`, `rewards`, `masks` (0 where the step solved the task), `terminals` (1
on the last row of an episode: the solved state, without an action), `qpos`, `qvel`, and for a name such as
'visual-OpenMicrowave-v0' `images` beside the state of the arm. All demonstrations are successes: failed attempts are
replaced, and the .json beside the file holds their number. The file is a function of the seed, whatever the number of
workers. Rerun the same command to resume.
"""

import functools
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from absl import flags

from envs.npz import Arrays, write_npz
from envs.ogbench.specs import DEFAULT_DATASET_DIR
from envs.panda import TASKS, gym_hil_assets
from envs.parallel_episodes import EpisodeCache, make_missing
from envs.tasks import VISUAL, make_env
from utils.errors import UserError
from utils.system.cli import parse
from utils.system.entry_point import run_main
from utils.system.files import read_json, write_json
from utils.system.locks import exclusive_lock
from utils.system.rendering import check_mujoco, choose_renderer, set_rendering_backend
from utils.system.resources import usable_cores

if TYPE_CHECKING:
    from envs.panda.arm import PandaEnv
    from envs.panda.experts import Expert

ATTEMPTS = 100  # at one episode
NOISE = "tremor"  # name of `expert_noise` in files and their names
NAMES = (*TASKS, *(f"{VISUAL}{name}" for name in TASKS))


def demonstrate(
    env_name: str,
    *,
    episodes: int = 30,
    seed: int = 0,
    expert_noise: float = 1.0,
    workers: int | None = None,
    dataset_dir: str | Path = DEFAULT_DATASET_DIR,
    output: str | Path | None = None,
) -> Path:
    """Makes a file of demonstrations, or resumes making it; does nothing if it already exists.

    Args:
        env_name: 'ArrangeBoxes-v0' or 'OpenMicrowave-v0', with 'visual-' before it for images.
        episodes: number of demonstrations; they are the first ones of a larger file with the same seed.
        seed: each seed gives other demonstrations.
        expert_noise: scale of the noise on the expert's hand; 1 is a practised person's.
        workers: number of processes (default: one per core).
        dataset_dir: folder of '<env_name>-<episodes>ep.npz'; another seed or noise is added to the name.
        output: path of the file instead.

    Returns:
        The path of the file.

    Raises:
        UserError: unknown task, invalid number, gym-hil missing, files of other settings, full disk, or a worker that
            died.
        KeyboardInterrupt: with a message that says what is kept.
    """
    if env_name not in NAMES:
        raise UserError(f"unknown Panda task '{env_name}'; use {' or '.join(TASKS)}, with images {VISUAL}…")
    if env_name not in TASKS:
        set_rendering_backend()
    choose_renderer()
    check_mujoco()  # Before the workers, which could not report it.
    workers = usable_cores() if workers is None else workers
    least_values: list[tuple[str, float, int]] = [("episodes", episodes, 1), ("workers", workers, 1), ("seed", seed, 0)]
    least_values += [("expert_noise", expert_noise, 0)]
    for label, value, least in least_values:
        if not least <= value < np.inf:
            raise UserError(f"{label} is {value}; it must be at least {least}")
    gym_hil_assets()  # Raises if gym-hil is missing, before anything is written.
    name = f"{env_name}-{episodes}ep" + (f"-sd{seed}" if seed else "")
    name += f"-{NOISE}{expert_noise:g}" if expert_noise != 1 else ""
    path = Path(output).expanduser() if output else Path(dataset_dir).expanduser() / f"{name}.npz"
    if path.suffix != ".npz":
        raise UserError(f"{path} does not end in .npz; choose such a name")
    versions = {package: importlib.metadata.version(package) for package in ("mujoco", "numpy", "gym-hil")}
    settings = {"env_name": env_name, "seed": seed, NOISE: expert_noise, "lengths": "dm"}
    record = path.with_suffix(".json")
    with exclusive_lock(path.with_suffix(".lock")):
        if path.exists():
            found = read_json(record, missing_ok=True)
            if any(found.get(key) != value for key, value in (settings | {"episodes": episodes}).items()):
                raise UserError(f"{path} was made with other settings; move it away or choose another --output")
            print(f"{path} already exists.", file=sys.stderr)
            return path
        cache = EpisodeCache(path.with_suffix(".parts"), settings | {"versions": versions})
        make = functools.partial(_episode, env_name, seed, expert_noise)
        make_missing(cache, {"train": episodes}, make, workers)
        arrays = cache.merge("train", episodes)
        failed = int(arrays.pop("failed").sum())
        write_json(record, settings | {"episodes": episodes, "failed": failed, "versions": versions})
        write_npz(path, arrays)
        cache.remove()
    steps = len(arrays["actions"]) - episodes
    print(f"{episodes} demonstrations, {steps} steps; {failed} attempts failed and were replaced.")
    return path


@functools.cache
def _environment(env_name: str) -> "PandaEnv":
    """Returns this process's environment of a task."""
    return cast("PandaEnv", make_env(env_name).unwrapped)


def _episode(env_name: str, seed: int, expert_noise: float, _: str, index: int) -> Arrays:
    return episode(env_name, seed, index, expert_noise)


def episode(env_name: str, seed: int, index: int, expert_noise: float = 1.0) -> Arrays:
    """Makes one demonstration, a function of the arguments.

    Returns:
        Arrays with T + 1 rows for T steps, as stated in the module's docstring, and `failed`, whose first row is the
        number of failed attempts and whose others are 0.

    Raises:
        UserError: all attempts fail: the expert is too noisy.
    """
    from envs.panda.experts import EXPERTS  # Here, as MuJoCo must not be imported before a renderer is chosen.

    env = _environment(env_name)
    for failed in range(ATTEMPTS):
        sequence = np.random.SeedSequence(entropy=seed, spawn_key=(index, failed))
        env_seed, expert_seed = (int(word) for word in sequence.generate_state(2))
        expert = EXPERTS[env_name.removeprefix(VISUAL)](env, np.random.default_rng(expert_seed), expert_noise)
        rows, success = rollout(env, expert, env_seed)
        if success:
            return rows | {"failed": failed * (np.arange(len(rows["actions"])) == 0)}
    raise UserError(f"{ATTEMPTS} attempts at {env_name} failed; lower --expert_noise={expert_noise:g}")


def rollout(env: "PandaEnv", expert: "Expert", seed: int) -> tuple[Arrays, bool]:
    """Runs one episode; returns its rows, and True if the task was solved."""
    observation, _ = env.reset(seed=seed)
    rows: list[dict[str, Any]] = []
    actions, ended = expert.actions(), False
    while not ended:
        row = {**_parts(observation), "actions": next(actions).astype(np.float32), **_physics(env)}
        observation, reward, success, truncated, _ = env.step(row["actions"])
        rows.append(row | {"rewards": reward, "masks": 1 - success, "terminals": 0})
        ended = success or truncated
    last = {**_parts(observation), "actions": np.zeros(4), "rewards": 0, "masks": 1, "terminals": 1}
    rows.append(last | _physics(env))
    dtypes: dict[str, type] = {"images": np.uint8}
    return {key: np.array([row[key] for row in rows], dtypes.get(key, np.float32)) for key in rows[0]}, success


def _parts(observation: np.ndarray | Arrays) -> Arrays:
    """Returns the arrays of the file that hold an observation."""
    if isinstance(observation, dict):
        return {"observations": observation["state"], "images": observation["images"]}
    return {"observations": observation}


def _physics(env: "PandaEnv") -> Arrays:
    """Returns the positions and velocities of all joints."""
    return {"qpos": env.data.qpos.copy(), "qvel": env.data.qvel.copy()}


def _define_flags() -> flags.FlagValues:
    """Returns the flags, in a set of their own: importing this module must not add flags to another program's."""
    values = flags.FlagValues()
    flags.DEFINE_string("env_name", None, "'ArrangeBoxes-v0' or 'OpenMicrowave-v0'.", flag_values=values)
    flags.DEFINE_integer("episodes", 30, "Demonstrations.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Seed of the demonstrations.", flag_values=values)
    flags.DEFINE_float("expert_noise", 1.0, "Noise on the expert's hand; 1: a practised person's.", flag_values=values)
    flags.DEFINE_alias("tremor", "expert_noise", flag_values=values)
    flags.DEFINE_integer("workers", None, "Number of processes; default: one per core.", flag_values=values)
    flags.DEFINE_string("dataset_dir", DEFAULT_DATASET_DIR, "Folder of the file.", flag_values=values)
    flags.DEFINE_string("output", None, "Path of the file, instead of one in --dataset_dir.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    values = _define_flags()
    if overrides := parse(argv, values):
        raise UserError(f"unknown flag --agent.{min(overrides)}; demonstrations have no agent")
    if not values.env_name:
        raise UserError(f"--env_name is missing; use {' or '.join(TASKS)}")
    names = ("episodes", "seed", "expert_noise", "workers", "dataset_dir", "output")
    given: dict[str, Any] = {name: values[name].value for name in names}
    print(f"The demonstrations are in {demonstrate(values.env_name, **given)}")


if __name__ == "__main__":
    # Workers look functions up in the importable module, not in __main__.
    from envs.panda.demonstrate import main as importable_main

    run_main(importable_main)
