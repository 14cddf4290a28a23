"""Checks of the steps of a file: impossible values are rejected, suspicious ones give a warning."""

import math
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from envs.npz import Arrays
from utils.errors import UserError

_CHECKED = 100_000  # Rows examined by the checks of successors and jumps: such faults occur throughout a file.
_CHECKED_BYTES = 50_000_000
_LAGS = 10
_NEARLY_ALL = 0.9
_JUMP = 5.0  # A jump is this many times the typical step …
_FAR_JUMP = 10.0  # … and this many times if it alone justifies a warning.
_FEW = 3  # Fewer rows may be a coincidence.
_NARROW = 0.1  # Actions within this share of the bounds are probably in other units.


def check_masks(path: Path, masks: Float[np.ndarray, " N"], ends: Bool[np.ndarray, " N"], one_row_each: bool) -> None:
    """Checks that masks are not inverted, that is 0 wherever no episode ends.

    Args:
        path: the file.
        masks: of the file.
        ends: True in the last rows of episodes.
        one_row_each: whether each row is a transition; otherwise the last row of an episode may be none, so that in an
            episode of two rows the first is the last transition.

    Raises:
        UserError: they are inverted.
    """
    inside = ~ends
    if not one_row_each:
        inside &= np.append(~ends[1:], False) | ~_starts(ends)
    if inside.sum() >= _FEW and (masks[inside] == 0).mean() > 0.99:
        raise UserError(
            f"'masks' in {path} is 0 in nearly all rows in which no episode ends: it is the inverse of what it must "
            "be, 0 where an episode truly terminates and 1 elsewhere; give 1 - masks, or leave it out"
        )


def _starts(ends: Bool[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """Returns the first rows of episodes."""
    return np.append(True, ends[:-1])


def check_successors(
    path: Path,
    name: str,
    rows: Shaped[np.ndarray, " N *s"],
    following: Shaped[np.ndarray, " N *s"],
    marked: Bool[np.ndarray, " N"],
    cut: Bool[np.ndarray, " N"],
) -> list[str]:
    """Checks that the next observations equal those of the next rows, except at ends.

    Args:
        path: the file.
        name: of the array `following`.
        rows: observation of each row.
        following: next observation of each row.
        marked: rows at which `terminals` or `timeouts` mark an end.
        cut: those of them with mask 1.

    Returns:
        Warnings.

    Raises:
        UserError: they equal those of other rows, or ends are marked where no episode ends.
    """
    count = min(_CHECKED, _CHECKED_BYTES // max(rows[:1].nbytes, 1))
    rows, following = (
        array[:count].reshape(len(array[:count]), math.prod(array.shape[1:])) for array in (rows, following)
    )
    inner, cut = ~marked[: len(rows) - 1], cut[: len(rows) - 1]
    if not inner.size:
        return []
    continues = (following[:-1] == rows[1:]).all(axis=1)
    breaks = int((~continues & inner).sum())
    if breaks > 0.001 * inner.sum():
        _check_lags(path, name, rows, following, inner)
    moves = continues & (rows[1:] != rows[:-1]).any(axis=1)
    # If every row is marked, as in episodes of one step, the next row may start from the last observation.
    if 0.5 < 1 - inner.mean() < 1 and moves[~inner].mean() > _NEARLY_ALL and moves.sum() >= _FEW:
        raise UserError(
            f"{path} marks an end in {1 - inner.mean():.0%} of its rows, although '{name}' there equals the next "
            "row's observation, so no episode ends; set 'terminals' and 'timeouts' only in the last row of an episode"
        )
    if inner.sum() >= _FEW and breaks > inner.sum() / 2:
        return [
            f"'{name}' in {path} differs from the next row's observation in {breaks} of {inner.sum()} rows without a "
            "marked end; each is treated as the end of an episode (for shuffled rows use --horizon_length=1)"
        ]
    if cut.sum() >= _FEW and continues[cut].mean() > _NEARLY_ALL and inner.any():
        scaled = rows.astype(np.float32) / (rows.std(axis=0) + 1e-6)
        size = np.linalg.norm(np.diff(scaled, axis=0), axis=1)
        if np.median(size[cut]) > _JUMP * np.median(size[inner]):
            return [
                f"'{name}' in {path} is, at time limits, the first observation of the next episode, as autoreset "
                "environments return it; replace it with the observation after the row's action"
            ]
    return []


def _check_lags(
    path: Path,
    name: str,
    rows: Shaped[np.ndarray, " N w"],
    following: Shaped[np.ndarray, " N w"],
    inner: Bool[np.ndarray, " N-1"],
) -> None:
    """Checks that the next observations are not those of the same row or of rows after the next."""
    for lag in (0, *range(2, min(_LAGS, len(rows)))):
        reach = max(lag, 1)
        # Rows without a marked end up to their `lag`-th successor, and for which the lag makes a difference.
        free = np.lib.stride_tricks.sliding_window_view(inner, reach).all(axis=1)
        here = np.flatnonzero(free)
        here = here[(rows[here + 1] != rows[here + lag]).any(axis=1)]
        if len(here) >= _FEW and (following[here] == rows[here + lag]).all(axis=1).mean() > _NEARLY_ALL:
            where = "of the same row" if lag == 0 else f"{lag} rows later"
            raise UserError(
                f"'{name}' in {path} holds the observation {where}, not that of the next row; "
                "replace it with the observation after the row's action"
            )


def check_jumps(
    path: Path, rows: Float[np.ndarray, "N o"], marked: Bool[np.ndarray, " N"], complete: bool
) -> list[str]:
    """Checks that no ends are missing if only `terminals` and `timeouts` mark them.

    An unmarked end is a jump from one row to the next, in most dimensions at once and much larger than the typical
    step. It is certain if jumps lead back to where episodes begin, or come at equal distances, as time limits do. If
    ends of both kinds are marked, others that lead back give a warning only.

    Args:
        path: the file.
        rows: observations.
        marked: rows at which an end is marked.
        complete: whether the file has `timeouts`, so that ends of both kinds can be marked.

    Returns:
        Warnings.

    Raises:
        UserError: ends are missing.
    """
    rows, marked = rows[:_CHECKED].astype(np.float32, copy=False), marked[:_CHECKED]
    inner = ~marked[:-1]
    steps = np.abs(np.diff(rows, axis=0))
    dims = np.flatnonzero((steps[inner] > 0).mean(axis=0) > 0.1) if inner.sum() > 2 * _FEW else np.zeros(0, int)
    if not dims.size:
        return []
    # In units of each column's larger steps.
    units = np.array([np.quantile(column[column > 0], 0.75) for column in steps[inner][:, dims].T], np.float32)
    steps, rows = steps[:, dims] / units, rows[:, dims] / units
    turning = _turns(steps, rows, inner)
    steps, rows = steps[:, ~turning], rows[:, ~turning]
    if turning.all():
        return []
    size = np.sqrt((np.minimum(steps, 100) ** 2).mean(axis=1))
    size /= np.median(size[inner & (size > 0)])
    large = inner & (size > _JUMP) & ((steps >= 2).mean(axis=1) >= 0.5)
    jumps = np.flatnonzero(large & ~np.append(False, large[:-1]) & ~np.append(large[1:], False))
    if not jumps.size or jumps.size < 0.8 * large.sum():
        return []  # Consecutive jumps are motion after rest.
    unmarked, share = inner.all(), _as_near_the_beginning(rows, marked, jumps)
    row = f"{jumps.size} times (first after row {jumps[0]})"
    advice = "mark the last row of each episode in 'terminals' (terminated) or 'timeouts' (truncated)"
    if jumps.size >= _FEW and (share < 0.5 or (unmarked and _equal_distances(jumps))):
        where = "back to where episodes begin" if share < 0.5 else "at equal distances"
        line = f"{path} marks no end where observations jump {where}, {row}; {advice}"
        if complete and not unmarked:
            return [line]
        raise UserError(f"{line}, or give 'next_observations' if no episode ends there")
    if unmarked and ((size[jumps] > _FAR_JUMP).sum() >= _FEW or share < 0.1):
        return [f"{path} marks no end, but observations jump {row}; if episodes end there, {advice}"]
    return []


def _turns(
    steps: Float[np.ndarray, "n o"], rows: Float[np.ndarray, "n+1 o"], inner: Bool[np.ndarray, " n"]
) -> Bool[np.ndarray, " o"]:
    """Returns the columns that jump only from one end of their range to the other, as angles do."""
    jumps, whole = (steps > _JUMP) & inner[:, None], np.ptp(rows, axis=0) - 2
    return jumps.any(axis=0) & ((jumps & (steps >= whole)).sum(axis=0) > _NEARLY_ALL * jumps.sum(axis=0))


def _as_near_the_beginning(
    rows: Float[np.ndarray, "N o"], marked: Bool[np.ndarray, " N"], jumps: Int[np.ndarray, " j"]
) -> float:
    """Returns the share of rows that are as close to the first rows of episodes as those after jumps."""
    scale = rows.std(axis=0) + 1e-12
    beginnings = rows[np.flatnonzero(_starts(marked))]
    distance = np.sqrt((((rows - np.median(beginnings, axis=0)) / scale) ** 2).mean(axis=1))
    return float((distance <= np.quantile(distance[jumps + 1], _NEARLY_ALL)).mean())


def _equal_distances(jumps: Int[np.ndarray, " j"]) -> bool:
    """True if the distances between jumps are multiples of the smallest one."""
    gaps = np.diff(jumps, prepend=-1)
    return bool(jumps.size >= _FEW and gaps.min() >= 5 and (gaps % gaps.min() == 0).mean() > _NEARLY_ALL)


def check_precision(path: Path, arrays: Arrays) -> list[str]:
    """Returns warnings about columns of a file's arrays that vary by less than the resolution of float32."""
    warnings = []
    for name, array in arrays.items():
        if array.dtype.kind not in "iuf" or array.dtype.itemsize <= 2 or array.dtype == np.float32:
            continue
        columns = array.reshape(len(array), math.prod(array.shape[1:]))
        rounded = columns.astype(np.float32)
        lost = (columns.min(axis=0) < columns.max(axis=0)) & (rounded.min(axis=0) == rounded.max(axis=0))
        if lost.any():
            where = f" (column {np.flatnonzero(lost)[0]})" if array.ndim > 1 else ""
            warnings.append(f"'{name}' in {path}{where} varies by less than float32 resolves; subtract its mean")
    return warnings


def check_rewards(path: Path, dataset: Arrays) -> list[str]:
    """Returns a warning if all rewards of a dataset in the compact layout are equal."""
    followed = dataset["terminals"] == 0
    rewards = dataset["rewards"][followed]
    if len(rewards) < 2 or (rewards != rewards[0]).any():
        return []
    unsolved = rewards[0] in (-1, 0) and dataset["masks"][followed].all()
    meaning = "; if they are sparse, no episode is solved" if unsolved else ""
    return [f"all rewards of {path} are {rewards[0]:g}{meaning}: there is nothing to learn from them"]


def check_actions(path: Path, dataset: Arrays) -> list[str]:
    """Returns a warning if all actions of a dataset in the compact layout are far inside the bounds, ±1."""
    actions = dataset["actions"][dataset["terminals"] == 0]
    largest = np.abs(actions).max() if actions.size else 1.0
    if largest >= _NARROW:
        return []
    advice = "are they in the units of the bounds?" if largest else "were they recorded?"
    return [f"no action of {path} exceeds {largest:.3g}, and the bounds are 1; {advice}"]
