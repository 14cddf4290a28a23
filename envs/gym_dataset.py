"""A dataset of any gymnasium environment, turned into the compact layout of envs/datasets.py.

The file (.npz, or HDF5 as D4RL's) holds, with one row per step, `observations` [N, o], `actions` [N, a] in [-1, 1] or
in the environment's units (envs/action_units.py), `rewards` [N] and `terminals` [N], and may hold `masks` [N],
`timeouts` [N] and `next_observations` [N, o]. With cameras it also has `images` [N, C, h, w, 3], uint8, and
`next_images` where it has `next_observations`; if only images are observed, it has no `observations`.

`masks` is 0 where the value after the step is 0: a true termination. It is 1 - `terminals` unless given. Two
conventions:

1. With `next_observations`, each row is a transition. An episode ends at a row with `terminals` or `timeouts`, and
   wherever the next row does not start at this row's next observation.
2. Without, an episode ends at a row with `terminals` or `timeouts`, and at the last row. The observation after it is
   not recorded. If it truly terminated (`masks` is 0), nothing is bootstrapped from there: the row is a transition, and
   its observation is repeated. Any other end is a state whose successor is not recorded.

A file written by a loop over `observation, action, reward, terminated` follows the second convention, and all of its
rewards are used. So do OGBench's and D4RL's files, and demonstrations, whose last row is a state with mask 1. One
exception: if a file has neither `masks` nor `timeouts`, and it has `qpos`, as OGBench's files do, or only the last rows
of its episodes have action and reward 0, then these rows are such states, too; a warning is given.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from envs.action_units import Bounds, to_unit
from envs.data_checks import check_jumps, check_masks, check_precision, check_successors
from envs.hdf5 import is_hdf5, read_hdf5
from envs.npz import Arrays, check_flags, check_images, check_rows, check_width, npz_names, read_npz
from utils.errors import UserError

_REQUIRED = ("actions", "rewards", "terminals")
_OPTIONAL = ("masks", "timeouts")
MEMORY = Path("the dataset")  # stands for the file of arrays in memory


@dataclasses.dataclass(frozen=True)
class GymFile:
    """Content of a file.

    Attributes:
        arrays: in the compact layout, see `read_gym_file`.
        ends: kind of end → number of episodes.
        unused: number of steps that cannot be used.
        unused_reward: sum of their rewards.
        units: of the file's actions, 'scaled' or 'raw'.
        warnings: possible faults, one line each.
    """

    arrays: Arrays
    ends: dict[str, int]
    unused: int
    unused_reward: float
    units: str
    warnings: list[str]


def read_gym_dataset(
    path: Path,
    observation_width: int | None = None,
    action_width: int | None = None,
    image_shape: tuple[int, ...] | None = None,
) -> Arrays:
    """Reads a file, with actions in [-1, 1], and returns it in the compact layout; see `read_gym_file`."""
    return read_gym_file(path, observation_width, action_width, image_shape).arrays


def read_gym_file(
    path: Path,
    observation_width: int | None = None,
    action_width: int | None = None,
    image_shape: tuple[int, ...] | None = None,
    bounds: Bounds | None = None,
    units: str = "scaled",
) -> GymFile:
    """Reads a file.

    Args:
        path: the file.
        observation_width: size of the environment's state; None: that of the file, with images if it has some.
        action_width: size of its actions; None: that of the file.
        image_shape: [C, h, w, 3] of its images; None: it has none, and those of the file are left out.
        bounds: of the environment's actions; None: no environment.
        units: of the file's actions, one of action_units.UNITS.

    Returns:
        The content, with observations, actions, rewards, masks, terminals, all float32, and images, uint8, in the
        compact layout. The last transition i of an episode that truly terminated has masks[i] = 0 and
        terminals[i + 1] = 1. The last row of an episode has reward 0, mask 1.

    Raises:
        UserError: the file is invalid.
    """
    observed = ("observations",) * (observation_width != 0) + ("images",) * (image_shape is not None)
    optional = ("images",) * (observation_width is None)
    following = tuple(f"next_{name}" for name in observed + optional)
    names = observed + _REQUIRED, optional + _OPTIONAL + following
    like = observation_width, action_width, image_shape, bounds, units
    if is_hdf5(path):
        return parse_arrays(path, read_hdf5(path, *names), *like)
    return parse_arrays(path, read_npz(path, *names), *like, ogbench="qpos" in npz_names(path))


def dataset_from_arrays(
    *,
    actions: Any,
    rewards: Any,
    terminals: Any,
    observations: Any = None,
    masks: Any = None,
    timeouts: Any = None,
    next_observations: Any = None,
    images: Any = None,
    next_images: Any = None,
) -> Arrays:
    """Returns a dataset for `train(config, data=…)`, one row a step, as in a file; see the module's docstring.

    Args (anything that np.asarray takes):
        actions: [N, A]. rewards: [N]. terminals: [N] of 0 and 1. observations: [N, o], unless only images are observed.
        masks, timeouts: [N] of 0 and 1. next_observations: [N, o].
        images, next_images: [N, C, h, w, 3] uint8.

    Raises:
        UserError: arrays differ in length, or hold something else than finite numbers.
    """
    given = {
        **{"observations": observations, "actions": actions, "rewards": rewards, "terminals": terminals},
        **{"masks": masks, "timeouts": timeouts, "next_observations": next_observations},
        **{"images": images, "next_images": next_images},
    }
    arrays = {name: np.asarray(array) for name, array in given.items() if array is not None}
    # Copies, since training changes them; images stay as they are.
    arrays |= {name: array.copy() for name, array in arrays.items() if "images" not in name}
    if "observations" not in arrays and "images" not in arrays:
        raise UserError("the dataset has neither observations nor images; give one of them")
    check_rows(MEMORY, arrays)
    return arrays


def parse_arrays(
    path: Path,
    arrays: Arrays,
    observation_width: int | None = None,
    action_width: int | None = None,
    image_shape: tuple[int, ...] | None = None,
    bounds: Bounds | None = None,
    units: str = "scaled",
    ogbench: bool = False,
) -> GymFile:
    """Converts the arrays of a file, or of `dataset_from_arrays`; arguments and result as in `read_gym_file`.

    Args:
        path: the file, for messages. arrays: its arrays, one row a step.
        ogbench: whether it holds 'qpos', as OGBench's files do.

    Raises:
        UserError: the arrays are invalid.
    """
    arrays = dict(arrays)
    needed = ("observations",) * (observation_width not in (0, None)) + ("images",) * (image_shape is not None)
    if missing := [name for name in needed if name not in arrays]:
        raise UserError(f"{path} lacks '{missing[0]}', which the environment's observations have")
    if image_shape is None and observation_width is not None:
        arrays = {name: array for name, array in arrays.items() if name not in ("images", "next_images")}
    parts: list[str] = [name for name in ("observations", "images") if name in arrays]
    if 0 < sum(f"next_{name}" in arrays for name in parts) < len(parts):
        raise UserError(f"{path} has one of 'next_observations' and 'next_images'; give both or none")
    for name in ("images", "next_images"):
        if name in arrays:
            check_images(path, arrays[name], image_shape)
    if observation_width == 0:
        arrays["observations"] = np.zeros((len(arrays["actions"]), 0), np.float32)
    if observation_width is None:
        check_width(path, "observations", arrays["observations"], None)
        observation_width = arrays["observations"].shape[1]
    widths = {"observations": observation_width, "next_observations": observation_width, "actions": action_width}
    for name, width in widths.items():
        if name in arrays:
            check_width(path, name, arrays[name], width)
    for name in ("terminals", "timeouts", "masks"):
        if name in arrays:
            check_flags(path, name, arrays[name])
    if arrays["rewards"].ndim != 1:
        raise UserError(f"'rewards' in {path} has shape {list(arrays['rewards'].shape)}, not [N]; flatten it")
    given = {name: array for name, array in arrays.items() if name not in ("images", "next_images")}
    warnings = check_precision(path, given)
    actions, units = to_unit(path, arrays["actions"], bounds, units)
    arrays |= {name: np.asarray(array, np.float32) for name, array in (given | {"actions": actions}).items()}
    warnings += _complete_masks(path, arrays, ogbench)
    ends, marked = _find_ends(path, arrays, parts, warnings)
    recorded = f"next_{parts[0]}" in arrays
    check_masks(path, arrays["masks"], ends, one_row_each=recorded)
    compact, unused = _to_compact(arrays, ends, recorded)
    reward = float(arrays["rewards"][unused].sum(dtype=np.float64))
    return GymFile(compact, _kinds_of_ends(compact, ends, marked), int(unused.sum()), reward, units, warnings)


def _complete_masks(path: Path, arrays: Arrays, ogbench: bool) -> list[str]:
    """Adds `masks` if the file has none; returns warnings."""
    if "masks" in arrays:
        return []
    arrays["masks"] = 1 - arrays["terminals"]
    ends, others = arrays["terminals"] > 0, arrays["terminals"] == 0
    if "timeouts" in arrays or any(name.startswith("next_") for name in arrays) or not ends.any():
        return []
    idle = (arrays["actions"] == 0).all(axis=1)
    empty = idle & (arrays["rewards"] == 0)
    reason = "it holds 'qpos', as OGBench's files do" if ogbench else ""
    # If no other step has reward 0, a 0 may mark the last one as solved.
    if empty[ends].all() and others.any() and not idle[others].any() and (arrays["rewards"][others] == 0).any():
        reason = "only the last rows of its episodes have action and reward 0"
    if not reason:
        return []
    arrays["masks"] = np.ones_like(arrays["masks"])
    return [
        f"{path}: the last row of each episode is treated as a state without a step, and no episode as terminated, as "
        f"{reason}; if that is wrong, give 'masks' (0 in rows whose step truly terminates)"
    ]


def _find_ends(
    path: Path, arrays: Arrays, parts: list[str], warnings: list[str]
) -> tuple[Bool[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """Returns the last rows of episodes, and the rows that the file marks as such."""
    marked = arrays["terminals"] > 0
    if "timeouts" in arrays:
        marked |= arrays["timeouts"] > 0
    ends = marked.copy()
    ends[-1] = True
    for name in parts:
        if (following := arrays.get(f"next_{name}")) is not None:
            ends[:-1] |= (following[:-1] != arrays[name][1:]).any(axis=tuple(range(1, following.ndim)))
            warnings += check_successors(
                path, f"next_{name}", arrays[name], following, marked, marked & (arrays["masks"] > 0)
            )
        elif name == "observations":
            warnings += check_jumps(path, arrays[name], marked, complete="timeouts" in arrays)
    return ends, marked


def _kinds_of_ends(compact: Arrays, ends: Bool[np.ndarray, " N"], marked: Bool[np.ndarray, " N"]) -> dict[str, int]:
    """Returns kind of end → number of episodes."""
    last = np.flatnonzero(compact["terminals"])
    terminated = (compact["terminals"][last - 1] == 0) & (compact["masks"][last - 1] == 0)
    marked, at_end = marked[ends], np.arange(len(last)) == len(last) - 1
    return {
        "truly terminated": int(terminated.sum()),
        "cut by a time limit": int((marked & ~terminated).sum()),
        "found where next observations break": int((~marked & ~terminated & ~at_end).sum()),
        "cut by the end of the file": int((~marked & ~terminated & at_end).sum()),
    }


def _to_compact(arrays: Arrays, ends: Bool[np.ndarray, " N"], recorded: bool) -> tuple[Arrays, Bool[np.ndarray, " N"]]:
    """Adds a state after each transition whose successor is not a row.

    Args:
        arrays: of the file.
        ends: the last rows of episodes.
        recorded: whether the file has the next observations.

    Returns:
        The compact layout, and the rows whose step is lost in it.
    """
    observed: Arrays = {name: arrays[name] for name in ("observations", "images") if name in arrays}
    append = np.flatnonzero(ends if recorded else ends & (arrays["masks"] == 0))
    terminals = ends.astype(np.float32)
    terminals[append] = 0.0  # The appended row is the last one instead.
    unused = (terminals > 0) & ((arrays["actions"] != 0).any(axis=1) | (arrays["rewards"] != 0))
    after = append + 1
    finals = {name: arrays.get(f"next_{name}", rows)[append] for name, rows in observed.items()}
    compact: Arrays = {
        **{name: np.insert(rows, after, finals[name], axis=0) for name, rows in observed.items() if append.size},
        **{name: rows for name, rows in observed.items() if not append.size},
        "actions": np.insert(arrays["actions"], after, 0.0, axis=0),
        "rewards": np.insert(arrays["rewards"], after, 0.0),
        "masks": np.insert(arrays["masks"], after, 1.0),
        "terminals": np.insert(terminals, after, 1.0),
    }
    state_only = compact["terminals"] > 0
    compact["rewards"][state_only] = 0.0
    compact["masks"][state_only] = 1.0
    return compact, unused
