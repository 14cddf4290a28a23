"""Units of a file's actions: [-1, 1], or the environment's own, which are rescaled as the environment is.

`make_env` rescales an environment with bounds other than ±1 to actions in [-1, 1]. A file recorded from it may hold
either; `recognise` decides by the range of its actions. If both fit, the user has to state the units.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float, Real

from utils.errors import UserError

UNITS = ("auto", "scaled", "raw")
Bounds = tuple[Float[np.ndarray, " A"], Float[np.ndarray, " A"]]  # low, high
_TOLERANCE = 1e-3  # Tolerance for rounding on either bound, in units of half the range.
_REACH = 0.95  # Actions that reach this close to ±1 and never exceed it were clipped there.
_RANGES_SHOWN = 8


def to_unit(
    path: Path, actions: Real[np.ndarray, "N A"], bounds: Bounds | None, units: str
) -> tuple[Real[np.ndarray, "N A"], str]:
    """Returns actions in [-1, 1] up to rounding, and the units they were in, 'scaled' or 'raw'.

    Args:
        path: the file, for messages.
        actions: as in the file.
        bounds: of the environment; None: no environment, only [-1, 1] is valid.
        units: one of UNITS.

    Raises:
        UserError: actions are out of bounds, or 'auto' cannot tell the units.
    """
    if not actions.shape[1]:
        raise UserError(f"'actions' in {path} has no columns; it must be [N, width]")
    if bounds is None:
        if units == "raw":
            raise UserError("--dataset_actions=raw needs an environment's bounds; scale a robot's actions to [-1, 1]")
        bounds = -np.ones(actions.shape[1]), np.ones(actions.shape[1])
    low, high = (np.asarray(bound, np.float64) for bound in bounds)
    if units == "auto":
        units = recognise(path, actions, low, high)
    if units == "raw":
        _check_within(path, actions, low, high)
        actions = 2 * (actions - low) / (high - low) - 1
    else:
        _check_within(path, actions, -np.ones_like(low), np.ones_like(high))
    return actions, units


def recognise(
    path: Path, actions: Real[np.ndarray, "N A"], low: Float[np.ndarray, " A"], high: Float[np.ndarray, " A"]
) -> str:
    """Returns 'scaled' or 'raw', decided by the range of the actions.

    Actions outside one of the two boxes, [-1, 1] and the bounds, are in the units of the other. Inside both, they are
    in those of the narrower box: of the bounds if these are nowhere wider than [-1, 1], and of [-1, 1] if this is
    nowhere wider and the actions reach its ends.

    Raises:
        UserError: actions are outside both, or fit both.
    """
    least, most = actions.min(axis=0), actions.max(axis=0)
    margin = _TOLERANCE * (high - low) / 2
    in_unit = (least >= -1 - _TOLERANCE).all() and (most <= 1 + _TOLERANCE).all()
    in_bounds = (least >= low - margin).all() and (most <= high + margin).all()
    if in_unit != in_bounds:
        return "scaled" if in_unit else "raw"
    if not in_unit:
        _check_within(path, actions, low, high)
    narrower = (low > -1 + _TOLERANCE).any() or (high < 1 - _TOLERANCE).any()
    wider = (low < -1 - _TOLERANCE).any() or (high > 1 + _TOLERANCE).any()
    if narrower and not wider:
        return "raw"
    if not narrower and (not wider or max(-least.min(), most.max()) >= _REACH):
        return "scaled"
    raise UserError(
        f"{path} has actions in {ranges(least, most)}, the environment's bounds are {ranges(low, high)}: give "
        "--dataset_actions=raw if they are in the environment's units, --dataset_actions=scaled if in [-1, 1]"
    )


def _check_within(
    path: Path, actions: Real[np.ndarray, "N A"], low: Float[np.ndarray, " A"], high: Float[np.ndarray, " A"]
) -> None:
    """Checks that actions are within bounds.

    Raises:
        UserError: one is not; names the worst one.
    """
    excess = np.maximum(low - actions, actions - high) / ((high - low) / 2)
    row, column = np.unravel_index(np.argmax(excess), excess.shape)
    if excess[row, column] > _TOLERANCE:
        where = f"(row {row}, dimension {column})"
        raise UserError(
            f"{path} has actions up to {abs(actions[row, column]):.4g} in size {where}; they must be in [-1, 1]: scale "
            "them by the bounds of the action space (the environment is scaled the same way)"
            if (low == -1).all() and (high == 1).all()
            else f"{path} has an action of {actions[row, column]:.4g} {where}, which is beyond the environment's "
            f"bounds {ranges(low, high)}; correct the file"
        )


def clip_to(actions: Real[np.ndarray, "N A"], bounds: Bounds) -> tuple[Real[np.ndarray, "N A"], int]:
    """Returns actions clipped to the bounds, and how many were beyond them by more than rounding."""
    low, high = (np.asarray(bound, np.float64) for bound in bounds)
    excess = np.maximum(low - actions, actions - high) / ((high - low) / 2)
    return np.clip(actions, low, high), int((excess > _TOLERANCE).any(axis=1).sum())


def ranges(low: Real[np.ndarray, " A"], high: Real[np.ndarray, " A"]) -> str:
    """Returns '[low, high]' of each dimension, or once if all agree."""
    pairs = [f"[{one:.4g}, {other:.4g}]" for one, other in zip(low, high, strict=True)]
    if len(set(pairs)) == 1:
        return pairs[0]
    return " ".join(pairs[:_RANGES_SHOWN]) + (" …" if pairs[_RANGES_SHOWN:] else "")
