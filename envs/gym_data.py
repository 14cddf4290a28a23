"""A dataset of any gymnasium environment, turned into the compact layout of envs/datasets.py.

The file (.npz) holds, with one row a step, `observations` [N, o], `actions` [N, a] in [-1, 1], `rewards` [N] and
`terminals` [N], and may hold `masks` [N], `timeouts` [N] and `next_observations` [N, o]. With cameras it also has
`images` [N, C, h, w, 3], uint8, and `next_images` where it has `next_observations`; where images are all that is
observed, these alone. Three conventions:

1. With `next_observations`, each row is a transition. An episode ends at a row with `terminals` or `timeouts`, and
   wherever the next row does not start at this row's next observation.
2. With `timeouts` alone (D4RL's raw files), a row with `terminals` is a transition into a state that was not
   recorded; as nothing is bootstrapped from it, its observation is repeated there. A row with `timeouts` only, or
   the last one, is a state whose action leads nowhere recorded.
3. With neither (OGBench's files), `terminals` marks the last row of each episode, a state whose action leads
   nowhere recorded. No episode counts as truly terminated unless `masks` says so.

`masks` is 0 where the value after the step is 0: a true termination. It is 1 - terminals unless given.
"""

from pathlib import Path

import numpy as np

from envs.files import Arrays, check_flags, check_images, check_width, read_npz
from utils.errors import UserError

_REQUIRED = ("actions", "rewards", "terminals")
_OPTIONAL = ("masks", "timeouts")
_TOLERANCE = 1e-3  # Rounding of a normalisation, forgiven on the bound of the actions.


def read_gym_dataset(
    path: Path,
    observation_width: int | None = None,
    action_width: int | None = None,
    image_shape: tuple[int, ...] | None = None,
) -> Arrays:
    """Reads a file and returns it in the compact layout.

    Args:
        path: the file.
        observation_width: size of the environment's state; None: the file's own, with images if there are some.
        action_width: size of its actions; None: the file's own.
        image_shape: [C, h, w, 3] of its images; None: it has none, and the file's are left out.

    Returns:
        observations, actions, rewards, masks, terminals, all float32, and images, uint8. The last transition i of an
        episode that truly terminated has masks[i] = 0 and terminals[i + 1] = 1. The last row of an episode has reward
        0, mask 1.

    Raises:
        UserError: something is wrong with the file.
    """
    observed = ("observations",) * (observation_width != 0) + ("images",) * (image_shape is not None)
    optional = ("images",) * (observation_width is None)
    following = tuple(f"next_{name}" for name in observed + optional)
    arrays = read_npz(path, observed + _REQUIRED, optional + _OPTIONAL + following)
    parts = [name for name in ("observations", "images") if name in arrays]
    if 0 < sum(f"next_{name}" in arrays for name in parts) < len(parts):
        raise UserError(f"{path} has one of 'next_observations' and 'next_images'; give both or none")
    for name in ("images", "next_images"):
        if name in arrays:
            check_images(path, arrays[name], image_shape)
    if observation_width == 0:
        arrays["observations"] = np.zeros((len(arrays["actions"]), 0))
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
    largest = float(np.abs(arrays["actions"]).max())
    if largest > 1 + _TOLERANCE:
        raise UserError(
            f"{path} has actions up to {largest:.4g} in size; they must be in [-1, 1]: "
            "scale them by the bounds of the action space (the environment is scaled the same way)"
        )
    pixels = ("images", "next_images")
    arrays = {k: array if k in pixels else np.asarray(array, np.float32) for k, array in arrays.items()}
    arrays.setdefault("masks", 1 - arrays["terminals"])
    return _to_compact(arrays)


def _to_compact(arrays: Arrays) -> Arrays:
    """Marks the ends of the episodes, and adds a state row after each transition whose successor is no row."""
    observed = {name: arrays[name] for name in ("observations", "images") if name in arrays}
    following = {name: arrays[f"next_{name}"] for name in observed if f"next_{name}" in arrays}
    ends = arrays["terminals"] > 0
    ends[-1] = True
    if following:
        for name, rows in following.items():
            ends[:-1] |= (rows[:-1] != observed[name][1:]).any(axis=tuple(range(1, rows.ndim)))
        ends |= arrays.get("timeouts", np.zeros(1)) > 0
        append = np.flatnonzero(ends)
    elif "timeouts" in arrays:
        append = np.flatnonzero(arrays["terminals"])
        ends |= arrays["timeouts"] > 0
    else:
        append = np.empty(0, dtype=np.int64)
    finals = {name: (following.get(name, rows))[append] for name, rows in observed.items()}

    terminals = ends.astype(np.float32)
    terminals[append] = 0.0  # The appended row is the last one instead.
    after = append + 1
    compact = {
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
    return compact
