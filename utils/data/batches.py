"""Batches: windows of H steps cut from state-ordered trajectories, on the device or on the host.

A `Batch` holds m windows, with H = horizon, A = action width and d = H·A:

    observations       [m, o]  s_t
    actions            [m, d]  (a_t … a_{t+H−1}) flattened
    rewards            [m]     R = Σ_{i<H} γ^i r_{t+i}
    masks              [m]     0 if one of the H steps is terminal: no bootstrap from s_{t+H}
    next_observations  [m, o]  s_{t+H}
    valid              [m]     0 if the window crosses an episode's end: not a sample, zero weight in every loss
    action_mask        [m, d]  0 on actions after a true termination, which were never executed

With cameras, observations and next_observations are `Observation(state [m, o], images [m, C, h, w, 3] uint8)`
(utils/observations.py), and o may be 0.

The arrays of a dataset have one row per state, N in all:

    observations       [N, o]
    images             [N, C, h, w, 3] uint8, with cameras only
    actions            [N, A]
    rewards            [N]     of the action
    masks              [N]     0 if the transition is terminal
    terminals          [N]     1 on the last row of an episode, a state from which no action was executed

`prepare` adds, for sampling:

    starts             [S]     int32, rows with a transition; windows are drawn uniformly from them
    terminated         [N]     1 on the last row of an episode that ended in a terminal state
"""

import functools
import zlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, Shaped

from utils.arrays import Number
from utils.errors import UserError
from utils.observations import observe
from utils.random_streams import Stream, stream_key

Arrays = dict[str, Any]  # of a dataset, or of windows gathered from it
Batch = dict[str, Any]
FIELDS = ("observations", "actions", "rewards", "masks", "next_observations", "valid", "action_mask")  # of a batch


def prepare(dataset: dict[str, np.ndarray], terminates: bool) -> dict[str, np.ndarray]:
    """Adds `starts` and `terminated` to a dataset, whose last row ends an episode whatever `terminals` says.

    Args:
        dataset: arrays as in the module's docstring.
        terminates: True if episodes end at terminal states. False for OGBench's play data, which continue after a
            success: an episode's end is a time limit there, even if the last state is solved.
    """
    after_terminal = np.concatenate([[0.0], 1.0 - dataset["masks"][:-1]])
    terminals = np.append(dataset["terminals"][:-1], np.float32(1))
    names = ("observations", "images", "actions", "rewards", "masks")
    return {k: dataset[k] for k in names if k in dataset} | {
        "terminals": terminals,
        "terminated": (after_terminal * terminals * float(terminates)).astype(np.float32),
        "starts": np.flatnonzero(terminals == 0).astype(np.int32),
    }


def describe(data: dict[str, np.ndarray], name: str) -> dict[str, Any]:
    """Returns a run's record of prepared data from the file `name`: sizes, and a checksum."""
    return {
        "file": name,
        "episodes": int(data["terminals"].sum()),
        "transitions": int((data["terminals"] == 0).sum()),
        "checksum": checksum(data[k] for k in ("observations", "actions", "rewards", "masks", "images") if k in data),
    }


def checksum(arrays: Iterable[Shaped[np.ndarray, "..."]]) -> int:
    """Returns the CRC-32 of all arrays' bytes."""
    return functools.reduce(lambda crc, array: zlib.crc32(np.ascontiguousarray(array).data, crc), arrays, 0)


def gather(data: Arrays, start: Int[Array | np.ndarray, "*b"], horizon: int) -> Arrays:
    """Gathers the rows of windows from NumPy or JAX arrays by indexing alone.

    A window that exceeds the arrays repeats their last row, which is an episode's end like any other.

    Args:
        data: prepared arrays.
        start: first row of each window.
        horizon: H.

    Returns:
        observations and next_observations [*b, o] (and images), terminated [*b, H], and the others [*b, H, ...].
    """
    last = len(data["terminals"]) - 1
    steps = (start[..., None] + np.arange(horizon)).clip(max=last)
    parts = [name for name in ("observations", "images") if name in data]
    return {
        **{name: data[name][start] for name in parts},
        **{f"next_{name}": data[name][(start + horizon).clip(max=last)] for name in parts},
        "terminated": data["terminated"][(steps + 1).clip(max=last)],
        **{k: data[k][steps] for k in ("actions", "rewards", "masks", "terminals")},
    }


def assemble(rows: Arrays, discount: Number, window_rule: str) -> Batch:
    """Makes a batch (see the module's docstring) of m gathered windows.

    A window that crosses an episode's end is not a sample. Under window_rule 'pad' it is one if the episode truly
    terminated: rewards are summed up to the termination, there is no bootstrap, and the action tail repeats the last
    action (what a policy would most likely emit) and is masked out. 'drop' is the public code's rule.
    """
    executed = jnp.cumprod(1.0 - rows["terminals"], axis=1)  # [m, H]
    count, horizon = executed.sum(axis=1).astype(jnp.int32), executed.shape[1]
    valid = executed[:, -1]
    if window_rule == "pad":
        # The row after the last executed step is the episode's last state.
        final = jnp.take_along_axis(rows["terminated"], jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        valid = jnp.maximum(valid, final * (count > 0))
    elif window_rule != "drop":
        raise ValueError(f"window_rule {window_rule!r} is not 'pad' or 'drop'")
    held = jnp.minimum(jnp.arange(horizon), jnp.maximum(count - 1, 0)[:, None])
    actions = jnp.take_along_axis(rows["actions"], held[..., None], axis=1)
    return {
        "observations": observe(rows["observations"], rows.get("images")),
        "actions": actions.reshape(len(actions), -1),
        "rewards": jnp.sum(rows["rewards"] * executed * discount ** jnp.arange(horizon), axis=1),
        "masks": jnp.where(executed > 0, rows["masks"], 1.0).min(axis=1),
        "next_observations": observe(rows["next_observations"], rows.get("next_images")),
        "valid": valid,
        "action_mask": jnp.repeat(executed, actions.shape[-1], axis=1),
    }


def check_fields(batch: Batch, needed: Iterable[str] = FIELDS) -> None:
    """Checks that a batch has all fields.

    Raises:
        UserError: names the missing ones.
    """
    if missing := [name for name in needed if name not in batch]:
        advice = (
            "see utils/data/batches.py, or train(config, data=dataset_from_arrays(…)), which makes batches of arrays"
        )
        raise UserError(f"the batch lacks {', '.join(missing)}; {advice}")


def sample_starts(
    key: PRNGKeyArray,
    step: int | Int[Array, ""],
    batch_size: int,
    count: int | Int[Array, ""],
    stream: Stream = Stream.BATCH,
) -> Int[Array, " m"]:
    """Draws the positions, among the `count` of `starts`, of one update's batch: a function of (key, stream, step)."""
    return jax.random.randint(stream_key(key, stream, step), (batch_size,), 0, count)


def example_batch(data: dict[str, np.ndarray], horizon: int, max_rows: int = 100_000) -> Batch:
    """Returns an evenly spaced subset of prepared data as a batch, but with images of one row only."""
    starts = data["starts"][:: len(data["starts"]) // max_rows + 1]
    batch = assemble(gather({k: v for k, v in data.items() if k != "images"}, starts, horizon), 1.0, "drop")
    images = data["images"][starts[:1]] if "images" in data else None
    return batch | {"observations": observe(batch["observations"], images)}


def first_observation(data: dict[str, np.ndarray]) -> Any:
    """Returns the observation of the first row."""
    return observe(data["observations"][0], data["images"][0] if "images" in data else None)
