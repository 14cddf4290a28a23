"""Records a dataset: runs a policy in a Gymnasium environment, and writes a file, or a dataset of Minari.

    python -m envs.record --env_name=gym:Pendulum-v1 --policy=random --episodes=50 --output=pendulum.npz
    python -m envs.record --env_name=gym:Pendulum-v1 --policy=my_policy.py:act --output=minari:pendulum/mine-v0

A policy is 'random', uniform between the bounds of the actions, or a function in a Python file. It gets the observation
as the environment gives it and, if it takes a second argument, a NumPy random generator; it returns an action in the
environment's units. Datasets of Minari are written by its DataCollector and keep the observations as they are, also
dictionaries; a file (envs/gym_dataset.py) takes vectors and images. The same seed gives the same data.
"""

import importlib.util
import inspect
import shlex
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from absl import flags

from envs import minari_store
from envs.npz import Arrays, write_npz
from envs.tasks import action_bounds, check_action_space, make_env, parse_task
from envs.wrappers import Checked, action_box
from utils.errors import UserError, failure
from utils.observations import Observation, as_observation, columns
from utils.output.loggers import ProgressBar
from utils.system.cli import parse
from utils.system.entry_point import run_main
from utils.system.files import find_modules_in
from utils.system.rendering import choose_renderer

LONGEST = 100_000  # steps of an episode that no time limit ends
Policy = Callable[[Any, np.random.Generator], Any]


def record(
    env_name: str,
    policy: str = "random",
    *,
    output: str,
    episodes: int = 100,
    seed: int = 0,
    max_episode_steps: int | None = None,
    data_format: str = "hdf5",
) -> str:
    """Records episodes and writes them.

    Args:
        env_name: 'gym:<id>'. policy: 'random', or '<file.py>:<function>'.
        output: a file that does not exist yet, or 'minari:<id>' of a dataset that does not.
        episodes: number of them. seed: of the resets and of the policy's generator.
        max_episode_steps: time limit; default: the environment's.
        data_format: of a dataset of Minari, 'hdf5' or 'arrow'.

    Returns:
        one line on what was written.

    Raises:
        UserError: an unknown environment or policy, one that fails, or an output that exists or cannot be written.
    """
    task = parse_task(env_name)
    if not env_name.startswith("gym:"):
        advice = "OGBench's: python -m envs.collect, the Panda tasks': python -m envs.panda.demonstrate"
        raise UserError(f"--env_name={env_name}: gym:<id> tasks are recorded here, {advice}")
    for name, value in {"episodes": episodes, "max_episode_steps": max_episode_steps}.items():
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: it must be at least 1")
    if seed < 0:
        raise UserError(f"--seed={seed}: it must not be negative")
    to_minari = minari_store.is_minari(output)
    _check_free(output)
    act = load_policy(policy)
    make = _collector if to_minari else _rescaled
    env = make(task.env_id, max_episode_steps, data_format)
    try:
        rows = _run(env, act, policy, episodes, seed, keep=not to_minari)
        if to_minari:
            _create(env, output, f"{policy} policy, seed {seed}")
        else:
            write_npz(Path(output).expanduser(), rows)
    finally:
        env.close()
    return f"{episodes} episodes are in {output}"


def load_policy(policy: str) -> Policy | None:
    """Returns the function that a text names, taking (observation, generator); None for 'random'.

    Raises:
        UserError: there is no such file or function, or the file fails.
    """
    if policy == "random":
        return None
    file, colon, name = policy.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise UserError(f"--policy={policy}: write random, or <file.py>:<function>")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"--policy={policy}: there is no file {path}; check the path")
    find_modules_in(path.parent)
    spec = importlib.util.spec_from_file_location(f"policy_{path.stem}", path)
    assert spec and spec.loader  # The file exists and ends in .py.
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise failure(error, f"policy file {path}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--policy={policy}: {path} has no function '{name}'; write def {name}(observation): ...")
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return lambda observation, _: function(observation)
    return function


def _check_free(output: str) -> None:
    """Checks that nothing would be overwritten.

    Raises:
        UserError: the output exists, or has an unknown name.
    """
    if minari_store.is_minari(output):
        minari_store.import_minari()
        place = minari_store.data_folder(output).parent
        if place.exists():
            raise UserError(f"--output={output}: {place} exists; choose another name or version")
    elif Path(output).suffix != ".npz":
        raise UserError(f"--output={output}: write <file>.npz, or minari:<id> such as minari:pendulum/mine-v0")
    elif Path(output).expanduser().exists():
        raise UserError(f"--output={output} exists; choose another name")


def _made(env_id: str, limit: int | None) -> gymnasium.Env:
    """Makes the environment as it is, without rescaled actions.

    Raises:
        UserError: it cannot be made, or its actions are not continuous and bounded.
    """
    choose_renderer()
    what = f"cannot make the gymnasium environment '{env_id}'"
    try:
        env = gymnasium.make(env_id, max_episode_steps=limit, disable_env_checker=True)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}") from error
    except Exception as error:
        raise failure(error, f"{what}: it") from error
    if not isinstance(env.action_space, gymnasium.spaces.Box) or len(env.action_space.shape) != 1:
        raise UserError(f"'gym:{env_id}' has actions in {env.action_space}; it must be a Box with one axis")
    check_action_space(f"gym:{env_id}", action_box(env))
    return env


def _collector(env_id: str, limit: int | None, data_format: str) -> gymnasium.Env:
    """Returns the environment within Minari's DataCollector; images are stored without loss."""
    library = minari_store.import_minari()
    env = _made(env_id, limit)
    spec = env.unwrapped.spec
    if spec is not None and callable(entry := spec.entry_point):
        # Minari stores the name that the environment is recovered by.
        spec.entry_point = f"{entry.__module__}:{getattr(entry, '__qualname__', '')}"
        if "<" in spec.entry_point:
            raise UserError(f"'gym:{env_id}' is registered by a function without a name; give 'module:Class' instead")
    try:
        return Checked(library.DataCollector(env, data_format=data_format, jpeg_encoding=False))
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"Minari's DataCollector cannot start: {' '.join(str(error).split())}") from error


def _rescaled(env_id: str, limit: int | None, _: str) -> gymnasium.Env:
    """Returns the environment as training takes it."""
    return make_env(f"gym:{env_id}", max_episode_steps=limit)


def _run(env: gymnasium.Env, act: Policy | None, name: str, episodes: int, seed: int, keep: bool) -> Arrays:
    """Runs episodes; returns the rows of a file if they are to be kept, with actions in [-1, 1]."""
    low, high = (np.asarray(bound, np.float64) for bound in action_bounds(env))
    rescaled = env.has_wrapper_attr("own_bounds")
    rows: dict[str, list[Any]] = {}
    with ProgressBar(episodes, description="recording", unit=" episodes") as bar:
        for episode in range(episodes):
            reset_seed, policy_seed = np.random.SeedSequence([seed, episode]).generate_state(2)
            random = np.random.default_rng(policy_seed)
            observation, _ = env.reset(seed=int(reset_seed))
            steps, over = 0, False
            while not over:
                action = _action(act, name, observation, random, low, high)
                unit = 2 * (action - low) / (high - low) - 1
                given = (unit if rescaled else action).astype(action_box(env).dtype)
                following, reward, terminated, truncated, _ = env.step(given)
                if keep:
                    row = _row(observation, following) | {"actions": unit, "rewards": reward}
                    for key, value in (row | {"terminals": terminated, "timeouts": truncated}).items():
                        rows.setdefault(key, []).append(value)
                observation, steps, over = following, steps + 1, terminated or truncated
                if steps == LONGEST and not over:
                    raise UserError(f"an episode has not ended after {LONGEST} steps; give --max_episode_steps")
            bar.update(1)
    images = ("images", "next_images")
    return {key: np.asarray(values, np.uint8 if key in images else np.float32) for key, values in rows.items()}


def _row(observation: Any, following: Any) -> dict[str, Any]:
    """Returns the observations of a step by the names of a file's arrays; an empty state has none."""
    parts = columns(as_observation(observation)) | {
        f"next_{name}": part for name, part in columns(as_observation(following)).items()
    }
    blank = isinstance(observation, Observation) and not observation.state.size
    return {name: part for name, part in parts.items() if not (blank and name.endswith("observations"))}


def _action(
    act: Policy | None, name: str, observation: Any, random: np.random.Generator, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Returns an action in the environment's units.

    Raises:
        UserError: the policy fails, or returns something else than finite numbers of the right shape and range.
    """
    if act is None:
        return random.uniform(low, high)
    try:
        action = np.asarray(act(observation, random), np.float64)
    except Exception as error:
        raise failure(error, f"policy {name}") from error
    if action.shape != low.shape or not np.isfinite(action).all():
        shown = f"shape {list(action.shape)}" if action.shape != low.shape else "numbers that are not finite"
        raise UserError(f"policy {name} returned {shown}; an action has shape {list(low.shape)}")
    if (excess := np.maximum(low - action, action - high) / (high - low)).max() > 1e-6:
        where = int(excess.argmax())
        raise UserError(
            f"policy {name} returned {action[where]:.4g} in dimension {where}, beyond [{low[where]:.4g}, "
            f"{high[where]:.4g}]; clip it"
        )
    return np.clip(action, low, high)


def _create(env: gymnasium.Env, output: str, algorithm: str) -> None:
    """Moves what was collected into Minari's store.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It asks for an author and a link, which a local dataset does not need.
            env.get_wrapper_attr("create_dataset")(minari_store.dataset_id(output), algorithm_name=algorithm)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {output}: {' '.join(str(error).split())}") from error


def _define_flags() -> flags.FlagValues:
    """Returns the flags, in a set of their own: importing this module must not add flags to another program's."""
    values = flags.FlagValues()
    flags.DEFINE_string("env_name", None, "'gym:<id>'.", flag_values=values)
    flags.DEFINE_string("policy", "random", "'random', or '<file.py>:<function>'.", flag_values=values)
    flags.DEFINE_string("output", None, "<file>.npz, or minari:<id>.", flag_values=values)
    flags.DEFINE_integer("episodes", 100, "Episodes.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Seed of resets and of the policy's generator.", flag_values=values)
    flags.DEFINE_integer("max_episode_steps", None, "Time limit; default: the environment's.", flag_values=values)
    flags.DEFINE_enum("data_format", "hdf5", ["hdf5", "arrow"], "Of a dataset of Minari.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    values = _define_flags()
    if overrides := parse(argv, values):
        raise UserError(f"unknown flag --agent.{min(overrides)}; a recording has no agent")
    for name, example in {"env_name": "gym:Pendulum-v1", "output": "data.npz"}.items():
        if not values[name].value:
            raise UserError(f"--{name} is missing; for example --{name}={example}")
    names = ("policy", "output", "episodes", "seed", "max_episode_steps", "data_format")
    given: dict[str, Any] = {name: values[name].value for name in names}
    print(record(values.env_name, **given))
    output, task = values.output, f"--env_name={values.env_name}"
    if minari_store.is_minari(output):
        describe, train = [output], [f"--env_name={output}"]
    else:
        describe, train = [output, task, "--actions=scaled"], [task, f"--dataset={output}", "--dataset_actions=scaled"]
    print(f"  describe  python -m envs.inspect {shlex.join(describe)}")
    print(f"  train     python main.py {shlex.join(train)}", flush=True)


if __name__ == "__main__":
    run_main(main)
