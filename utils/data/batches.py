"""Batches: windows of H steps cut from state-ordered trajectories, on the device or on the host.

The one statement of what a batch holds (m windows, H = horizon, A = action width, d = H·A):

    observations       [m, o]  s_t
    actions            [m, d]  (a_t … a_{t+H−1}) flattened
    rewards            [m]     R = Σ_{i<H} γ^i r_{t+i}
    masks              [m]     0 if one of the H steps is terminal: no bootstrap from s_{t+H}
    next_observations  [m, o]  s_{t+H}
    valid              [m]     0 if the window runs across an episode's end: no sample, zero weight everywhere
    action_mask        [m, d]  0 on actions after a true termination, which were never executed

With cameras, observations and next_observations are `Observation(state [m, o], images [m, C, h, w, 3] uint8)`
(utils/observations.py), and o may be 0.

Arrays of a dataset hold one row a state (N rows): `observations` [N, o], `actions` [N, A], `rewards` [N], `masks` [N]
and `terminals` [N], 1 on the last row of an episode: a state from which nothing was executed; with cameras also
`images` [N, C, h, w, 3] uint8.
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
from utils.observations import observe
from utils.random_streams import Stream, stream_key

Arrays = dict[str, Any]


def prepare(dataset: dict[str, np.ndarray], terminates: bool) -> dict[str, np.ndarray]:
    """Adds what sampling windows needs.

    `starts` [S] int32: the rows with a transition. Batches are drawn uniformly from these. `terminated` [N]: 1 on the
    last row of an episode that ended in a terminal state. The last row ends an episode, whatever `terminals` says.

    Args:
        dataset: arrays as stated above.
        terminates: whether the data end episodes at terminal states. False for OGBench's, whose play goes on
            after a success: there an episode's end is a time limit even if the last state is solved.
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
    """What a run records of prepared data from the file `name`: sizes, and a checksum."""
    return {
        "file": name,
        "episodes": int(data["terminals"].sum()),
        "transitions": int((data["terminals"] == 0).sum()),
        "checksum": checksum(data[k] for k in ("observations", "actions", "rewards", "masks", "images") if k in data),
    }


def checksum(arrays: Iterable[Shaped[np.ndarray, "..."]]) -> int:
    """CRC-32 of all arrays' bytes."""
    return functools.reduce(lambda crc, array: zlib.crc32(np.ascontiguousarray(array).data, crc), arrays, 0)


def gather(data: Arrays, start: Int[Array | np.ndarray, "*b"], horizon: int) -> Arrays:
    """The rows of windows that begin at `start`, NumPy or JAX alike: only indexing, no arithmetic on values.

    A window that runs over the end of the arrays repeats the last row, which ends an episode as any other end does.
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


def assemble(rows: Arrays, discount: Number, window_rule: str) -> Arrays:
    """Makes a batch (see the module's docstring) of m gathered windows.

    A window that meets an episode's end is no sample, except, under window_rule 'pad', where the episode truly
    terminated in it: its rewards are summed to the termination, it has no bootstrap, and its action tail repeats the
    last action taken (a chunk that goes on as it was is what a policy would emit) and is masked out. 'drop' is the
    public code's rule.
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


def sample_starts(
    key: PRNGKeyArray,
    step: int | Int[Array, ""],
    batch_size: int,
    count: int | Int[Array, ""],
    stream: Stream = Stream.BATCH,
) -> Int[Array, " m"]:
    """Positions in `starts`, which has `count`, of one update's batch: a function of (key, stream, step)."""
    return jax.random.randint(stream_key(key, stream, step), (batch_size,), 0, count)


def example_batch(data: dict[str, np.ndarray], horizon: int, max_rows: int = 100_000) -> Arrays:
    """An evenly spaced subset of prepared data as one batch: shapes, and statistics of the states. It has one image."""
    starts = data["starts"][:: len(data["starts"]) // max_rows + 1]
    batch = assemble(gather({k: v for k, v in data.items() if k != "images"}, starts, horizon), 1.0, "drop")
    images = data["images"][starts[:1]] if "images" in data else None
    return batch | {"observations": observe(batch["observations"], images)}


def first_observation(data: dict[str, np.ndarray]) -> Any:
    """The observation of the first row."""
    return observe(data["observations"][0], data["images"][0] if "images" in data else None)
