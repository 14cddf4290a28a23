"""Datasets of Minari as this project's tasks: episodes to arrays, and the environment that they were recorded in.

Minari stores T + 1 observations and T actions, rewards, terminations and truncations an episode. So every step is a
transition. A termination is one here, with no bootstrap, wherever in an episode it is. A truncation is a time limit, as
is the end of an episode without either.
"""

import dataclasses
import multiprocessing
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from envs import minari_store
from envs.action_units import Bounds, clip_to, ranges
from envs.npz import Arrays, check_rows
from envs.observation_layout import Joined, Layout, layout_of
from utils.errors import UserError, failure_line
from utils.system.rendering import choose_renderer

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class MinariData:
    """Content of a dataset of Minari.

    Attributes:
        path: its folder. arrays: one row a step, as a file's; see envs/gym_dataset.py.
        layout: of its observations. bounds: of its actions.
        warnings: possible faults, one line each.
    """

    path: Path
    arrays: Arrays
    layout: Layout
    bounds: Bounds
    warnings: list[str]


def open_dataset(env_name: str) -> Any:
    """Returns a `minari.MinariDataset`, which is downloaded if the local store does not have it.

    Raises:
        UserError: Minari is not installed, or does not find the dataset or cannot read it.
    """
    library, name = minari_store.import_minari(), minari_store.dataset_id(env_name)
    if not minari_store.data_folder(env_name).exists():
        try:
            print(f"Minari's local store does not hold {name}: downloading it.", file=sys.stderr, flush=True)
            _told(lambda: library.download_dataset(name))
        except Exception as error:
            hint = minari_store.suggestion(name) or f"; --env_name={minari_store.LISTING} lists what is there"
            raise UserError(
                f"{name} is not in Minari's local store {minari_store.store()}, and cannot be downloaded "
                f"({_reason(error)}){hint}"
            ) from error
    try:
        return _told(lambda: library.load_dataset(name))
    except Exception as error:
        raise UserError(
            f"cannot read Minari's dataset {name}: {_reason(error)}; get it again: minari download --force {name}"
        ) from error


def read_minari(env_name: str, scaled: bool = False) -> MinariData:
    """Reads all episodes of a dataset.

    Args:
        env_name: 'minari:<id>'. scaled: whether its actions are in [-1, 1], whatever its action space is.

    Raises:
        UserError: it is not found or invalid, or its spaces cannot be trained on.
    """
    dataset, name = open_dataset(env_name), minari_store.dataset_id(env_name)
    layout, bounds = layout_of(env_name, dataset.observation_space), box_bounds(env_name, dataset.action_space)
    path, columns, problems = minari_store.data_folder(env_name), list[Arrays](), list[str]()
    for number, episode, length in _episodes(dataset, name):
        steps = len(episode.rewards)
        if steps != length:
            raise UserError(f"episode {number} of {name} has {steps} steps and should have {length}; get it again")
        if steps:
            columns.append(_rows(episode, number, name, layout))
    if not columns:
        raise UserError(f"{name} has no steps; name another dataset")
    arrays = {key: np.concatenate([rows[key] for rows in columns]) for key in columns[0]}
    check_rows(path, arrays)
    last = np.cumsum([len(rows["rewards"]) for rows in columns]) - 1
    ended = arrays["terminals"] + arrays["timeouts"] > 0
    if unmarked := int((~ended[last]).sum()):
        problems.append(
            f"{unmarked} of {len(last)} episodes of {name} end without a termination or truncation; "
            "they are treated as cut by a time limit"
        )
    if within := int(ended.sum() - ended[last].sum()):
        problems.append(f"{within} steps of {name} mark an end inside an episode, which is split there")
    arrays["timeouts"][last] = 1 - arrays["terminals"][last]
    box = (-np.ones_like(bounds[0]), np.ones_like(bounds[1])) if scaled else bounds
    arrays["actions"], clipped = clip_to(arrays["actions"], box)
    if clipped:
        problems.append(f"{clipped} of {len(ended)} actions of {name} are beyond the action space, and are clipped")
    return MinariData(path, arrays, layout, bounds, problems)


def _episodes(dataset: Any, name: str) -> Any:
    """Yields number, content and number of steps of each episode.

    Raises:
        UserError: a file is damaged.
    """
    numbers = [int(number) for number in dataset.episode_indices]
    try:
        lengths = [int(about["total_steps"]) for about in dataset.storage.get_episode_metadata(numbers)]
        yield from zip(numbers, dataset.iterate_episodes(), lengths, strict=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot read the episodes of {name}: {_reason(error)}; get it again: minari download --force {name}"
        ) from error


def _rows(episode: Any, number: int, name: str, layout: Layout) -> Arrays:
    """Returns one row a step of an episode."""
    steps = len(episode.rewards)
    try:
        states = layout.states(episode.observations, steps + 1)
        rows: Arrays = {"observations": states[:-1], "next_observations": states[1:]}
        if layout.images:
            images = layout.stacked_images(episode.observations, steps + 1)
            rows |= {"images": images[:-1], "next_images": images[1:]}
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"episode {number} of {name} does not hold {steps + 1} observations of its observation space, one more "
            f"than its steps ({_reason(error)}); get it again"
        ) from error
    flags = {"terminals": episode.terminations, "timeouts": episode.truncations}
    rows |= {"actions": np.asarray(episode.actions), "rewards": np.asarray(episode.rewards, np.float64)}
    rows |= {key: np.asarray(array).astype(np.float32) for key, array in flags.items()}
    wrong = {key: array.shape for key, array in rows.items() if len(array) != steps}
    if wrong or rows["actions"].ndim != 2:
        raise UserError(f"episode {number} of {name} has arrays of several lengths ({wrong}); get it again")
    return rows


def box_bounds(env_name: str, space: gymnasium.Space) -> Bounds:
    """Returns the bounds (low [A], high [A]) of an action space.

    Raises:
        UserError: it is no Box of real numbers with one axis and finite bounds.
    """
    from envs.tasks import check_action_space

    if not isinstance(space, Box) or len(space.shape) != 1:
        kind = (
            "discrete actions" if isinstance(space, gymnasium.spaces.Discrete | gymnasium.spaces.MultiDiscrete) else ""
        )
        raise UserError(
            f"'{env_name}' has {kind or 'actions'} in {space}; it must be a Box with one axis, of continuous actions"
        )
    check_action_space(env_name, space)
    return space.low, space.high


def make_minari_env(env_name: str, kwargs: dict[str, Any]) -> gymnasium.Env:
    """Makes the environment that a dataset names for evaluation, else that it was recorded in.

    Actions are in [-1, 1], observations joined as the dataset's are.

    Args:
        env_name: 'minari:<id>'. kwargs: for `gymnasium.make`, such as render_mode.

    Raises:
        UserError: there is none, it cannot be made, or its spaces are not the dataset's.
    """
    from envs.wrappers import Checked, in_unit_box

    dataset = open_dataset(env_name)
    layout, bounds = layout_of(env_name, dataset.observation_space), box_bounds(env_name, dataset.action_space)
    choose_renderer()
    env = Checked(_recover(dataset, kwargs))
    own, own_bounds = layout_of(env_name, env.observation_space), box_bounds(env_name, env.action_space)
    if (own.state, own.images) != (layout.state, layout.images):
        raise UserError(
            f"the environment of {dataset.id} has the observations {own.describe()}, the dataset {layout.describe()}; "
            "train with --eval_episodes=0, or save the arrays for --env_name=gym:<id> --dataset=<file.npz>"
        )
    if own_bounds[0].shape != bounds[0].shape or not np.allclose(own_bounds, bounds):
        raise UserError(
            f"the environment of {dataset.id} has actions in {ranges(*own_bounds)}, the dataset in {ranges(*bounds)}; "
            "train with --eval_episodes=0"
        )
    return in_unit_box(env if own.plain else Joined(env, own))


def _recover(dataset: Any, kwargs: dict[str, Any]) -> gymnasium.Env:
    """Makes the environment of a `minari.MinariDataset`.

    Raises:
        UserError: the dataset names none, or it cannot be made; the line names packages that it asks for.
    """
    try:
        if "env_spec" not in (about := dataset.storage.metadata) and "eval_env_spec" not in about:
            raise UserError(
                f"{dataset.id} names no environment to evaluate in; train on it with --eval_episodes=0, "
                "or save its arrays for --env_name=gym:<id> --dataset=<file.npz>"
            )
        return _told(lambda: dataset.recover_environment(eval_env=True, disable_env_checker=True, **kwargs))
    except UserError:
        raise
    except Exception as error:
        asked = dataset.storage.metadata.get("requirements") or []
        advice = f"the dataset asks for: pip install {' '.join(map(str, asked))}" if asked else ""
        if isinstance(error, ModuleNotFoundError) and error.name and not asked:
            advice = f"install {error.name.split('.')[0].replace('_', '-')}, or train with --eval_episodes=0"
        raise UserError(failure_line(error, f"cannot make the environment of {dataset.id}: it", advice)) from error


def _told(call: Callable[[], Result]) -> Result:
    """Calls Minari, with its warnings as lines on stderr, of the main process only."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = call()
    if multiprocessing.parent_process() is None:
        for text in dict.fromkeys(_plain(str(one.message)) for one in caught if one.category is UserWarning):
            print(f"warning: {text}", file=sys.stderr, flush=True)
    return result


def _plain(text: str) -> str:
    """Returns a text in one line, without the codes of colours."""
    return " ".join(re.sub(r"\x1b\[\d+m", "", text).split())


def _reason(error: BaseException) -> str:
    """Returns an error in one line."""
    return f"{type(error).__name__}: {_plain(str(error))[:200]}"
