"""Makes demonstrations of a Panda task with its scripted expert.

    python -m envs.panda.demonstrate --env_name=OpenMicrowave-v0 --episodes=30

The file (.npz) has OGBench's layout (envs/gym_dataset.py, second convention), so that demonstrations recorded by hand
fit in its place: one row a state, with `observations`, `actions`, `rewards`, `masks` (0 where the step after it solved
the task), `terminals` (1 on an episode's last row: the solved state, with no action), `qpos`, `qvel`, and for a name
such as 'visual-OpenMicrowave-v0' `images` beside the state of the arm alone. All demonstrations are successes: an
episode that fails is drawn again, and their number stands in the .json beside the file. The file is a function of the
seed, whatever the number of workers. Rerun the same command to resume.
"""

import functools
import importlib.metadata
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from absl import flags
from tqdm import tqdm

from envs.collect import bare_main, sigint_ignored, usable_cores
from envs.npz import Arrays, read_json, write_json, write_npz
from envs.ogbench.specs import DEFAULT_DATASET_DIR
from envs.panda import TASKS, gym_hil_assets
from envs.parallel_episodes import EpisodeCache
from envs.tasks import VISUAL, make_env
from utils.errors import UserError
from utils.system.cli import parse
from utils.system.entry_point import run_main
from utils.system.locks import exclusive_lock
from utils.system.rendering import check_mujoco, choose_renderer, set_rendering_backend

if TYPE_CHECKING:
    from envs.panda.arm import PandaEnv
    from envs.panda.experts import Expert

ATTEMPTS = 100  # at one episode
NAMES = (*TASKS, *(f"{VISUAL}{name}" for name in TASKS))


def demonstrate(
    env_name: str,
    *,
    episodes: int = 30,
    seed: int = 0,
    tremor: float = 1.0,
    workers: int | None = None,
    dataset_dir: str | Path = DEFAULT_DATASET_DIR,
    output: str | Path | None = None,
) -> Path:
    """Makes a file of demonstrations, or finishes one that was begun; does nothing if it is there already.

    Args:
        env_name: 'ArrangeBoxes-v0' or 'OpenMicrowave-v0', or these with 'visual-' before them.
        episodes: number of demonstrations; the first ones of a larger file with the same seed.
        seed: another seed gives other demonstrations.
        tremor: how unsteady the demonstrator's hand is; 1 is a practised person's.
        workers: processes (default: one a core).
        dataset_dir: where '<env_name>-<episodes>ep.npz' goes ('…ep-sd<seed>-tremor<tremor>.npz' for others).
        output: path of the file instead.

    Returns:
        The path of the file.

    Raises:
        UserError: unknown task, bad number, gym-hil missing, files in the way, full disk, or a worker that died.
    """
    if env_name not in NAMES:
        raise UserError(f"there is no Panda task '{env_name}'; use {' or '.join(TASKS)}, with images {VISUAL}…")
    if env_name not in TASKS:
        set_rendering_backend()
    choose_renderer()
    check_mujoco()  # Before workers do, which could not say why they end.
    workers = usable_cores() if workers is None else workers
    least_values = (("episodes", episodes, 1), ("workers", workers, 1), ("seed", seed, 0), ("tremor", tremor, 0))
    for label, value, least in least_values:
        if not least <= value < np.inf:
            raise UserError(f"{label} is {value}; it must be at least {least}")
    gym_hil_assets()  # Without gym-hil, say so before anything is written.
    name = f"{env_name}-{episodes}ep" + (f"-sd{seed}" if seed else "") + (f"-tremor{tremor:g}" if tremor != 1 else "")
    path = Path(output).expanduser() if output else Path(dataset_dir).expanduser() / f"{name}.npz"
    if path.suffix != ".npz":
        raise UserError(f"{path} does not end in .npz; choose such a name")
    versions = {package: importlib.metadata.version(package) for package in ("mujoco", "numpy", "gym-hil")}
    settings = {"env_name": env_name, "seed": seed, "tremor": tremor, "lengths": "dm"}
    record = path.with_suffix(".json")
    with exclusive_lock(path.with_suffix(".lock")):
        if path.exists():
            found = read_json(record) or {}
            if any(found.get(key) != value for key, value in (settings | {"episodes": episodes}).items()):
                raise UserError(f"{path} holds something else; move it away or choose another --output")
            print(f"{path} is there already.", file=sys.stderr)
            return path
        folder = EpisodeCache(path.with_suffix(".parts"), settings | {"versions": versions})
        _make_missing(folder, env_name, seed, tremor, episodes, workers)
        arrays = folder.merge("train", episodes)
        failed = int(arrays.pop("failed").sum())
        write_json(record, settings | {"episodes": episodes, "failed": failed, "versions": versions})
        write_npz(path, arrays)
        folder.remove()
    print(
        f"{episodes} demonstrations, {len(arrays['actions']) - episodes} steps; {failed} failed ones were drawn again."
    )
    return path


def _make_missing(folder: EpisodeCache, env_name: str, seed: int, tremor: float, episodes: int, workers: int) -> None:
    """Makes the episodes that the folder lacks, in this process if there is one worker."""
    done = {index for _, index in folder.done() if index < episodes}
    missing = [index for index in range(episodes) if index not in done]
    jobs = [(env_name, seed, index, tremor, folder.file("train", index)) for index in missing]
    with tqdm(desc=env_name, total=episodes, initial=len(done), unit="episode") as bar:
        for _ in map(_make_part, jobs) if workers == 1 else _in_parallel(jobs, workers):
            bar.update()


def _in_parallel(jobs: list[tuple], workers: int) -> Iterator[None]:
    """Does the jobs in processes; yields as each one is done."""
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(min(workers, len(jobs) or 1), context, _end_with_parent) as pool:
        try:
            with bare_main(), sigint_ignored():
                running = [pool.submit(_make_part, job) for job in jobs]
            for job in futures.as_completed(running):
                yield job.result()
        except BrokenProcessPool:
            raise UserError("a worker died (out of memory?); run the same command again to go on") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Ends this worker should the parent be killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # This is a worker.

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _make_part(job: tuple[str, int, int, float, Path]) -> None:
    """Makes one demonstration and writes its file."""
    env_name, seed, index, tremor, path = job
    write_npz(path, episode(env_name, seed, index, tremor))


@functools.cache
def _environment(env_name: str) -> "PandaEnv":
    """This process's environment of a task."""
    return cast("PandaEnv", make_env(env_name).unwrapped)


def episode(env_name: str, seed: int, index: int, tremor: float = 1.0) -> Arrays:
    """Makes one demonstration, a function of its arguments.

    Returns:
        Arrays with T + 1 rows for T steps, as stated in the module's docstring, and `failed`, whose first row counts
        the failed attempts and whose others are 0.

    Raises:
        UserError: the expert fails time and again: its hand shakes too much.
    """
    from envs.panda.experts import EXPERTS  # Here, as MuJoCo must not be imported before a renderer is chosen.

    env = _environment(env_name)
    for failed in range(ATTEMPTS):
        sequence = np.random.SeedSequence(entropy=seed, spawn_key=(index, failed))
        env_seed, expert_seed = (int(word) for word in sequence.generate_state(2))
        expert = EXPERTS[env_name.removeprefix(VISUAL)](env, np.random.default_rng(expert_seed), tremor)
        rows, success = rollout(env, expert, env_seed)
        if success:
            return rows | {"failed": failed * (np.arange(len(rows["actions"])) == 0)}
    raise UserError(
        f"{ATTEMPTS} attempts at {env_name} failed: the expert's hand shakes too much (--tremor={tremor:g})"
    )


def rollout(env: "PandaEnv", expert: "Expert", seed: int) -> tuple[Arrays, bool]:
    """One episode: its rows, and whether it ended solved."""
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
    """What an observation of the environment is in the file."""
    if isinstance(observation, dict):
        return {"observations": observation["state"], "images": observation["images"]}
    return {"observations": observation}


def _physics(env: "PandaEnv") -> Arrays:
    """Position and velocity of all joints."""
    return {"qpos": env.data.qpos.copy(), "qvel": env.data.qvel.copy()}


def _define_flags() -> flags.FlagValues:
    """Returns the flags, in a set of their own: importing this module must not add flags to another program's."""
    values = flags.FlagValues()
    flags.DEFINE_string("env_name", None, "'ArrangeBoxes-v0' or 'OpenMicrowave-v0'.", flag_values=values)
    flags.DEFINE_integer("episodes", 30, "Demonstrations.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Seed of the demonstrations.", flag_values=values)
    flags.DEFINE_float("tremor", 1.0, "How unsteady the hand is; 1: a practised person's.", flag_values=values)
    flags.DEFINE_integer("workers", None, "Processes; default: the cores there are.", flag_values=values)
    flags.DEFINE_string("dataset_dir", DEFAULT_DATASET_DIR, "Where the file goes.", flag_values=values)
    flags.DEFINE_string("output", None, "The file, instead of one in --dataset_dir.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    values = _define_flags()
    if overrides := parse(argv, values):
        raise UserError(f"demonstrations know no --agent.{min(overrides)}")
    if not values.env_name:
        raise UserError(f"--env_name is missing; use {' or '.join(TASKS)}")
    asked: dict[str, Any] = {
        name: values[name].value for name in ("episodes", "seed", "tremor", "workers", "dataset_dir", "output")
    }
    print(f"The demonstrations are in {demonstrate(values.env_name, **asked)}")


if __name__ == "__main__":
    # Workers look their functions up in the importable module, not in __main__.
    from envs.panda.demonstrate import main as importable_main

    run_main(importable_main)
