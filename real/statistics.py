"""Offset and scale of recorded values, where resting joints are not scaled by their jitter.

Divided by its jitter, a resting joint would reach thousands in the first recording where it moves. Its deviation alone
is not conclusive: that of a gripper in metres beside joints in degrees is as small. So a dimension rests if its
deviation is less than SHARE of the largest one (0.1° to 20°: a tick or two of a servo), and it either varies as much
from frame to frame as overall (jitter; motion is smooth), or its deviation is less than FINE (0.2 mm, 0.01°: no motion
of an arm in metres or radians). Its scale is the median scale of the dimensions that move.
"""

from collections.abc import Sequence

import numpy as np

NORMS = ("mean_std", "min_max", "none")
SHARE = 5e-3
FINE = 2e-4
_JITTER = 0.5  # Mean square of the change between frames, relative to the variance: 2 for white noise.


def offset_and_scale(
    values: np.ndarray, lengths: Sequence[int] | np.ndarray, norm: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns offset and nonzero scale [w], float32, and a mask [w] of the resting dimensions.

    Args:
        values: [N, w], as recorded, of all episodes.
        lengths: number of frames of each episode.
        norm: 'mean_std', 'min_max' (to [-1, 1]) or 'none'.
    """
    values, width = values.astype(np.float64), values.shape[1]
    if norm == "none":
        return np.zeros(width, np.float32), np.ones(width, np.float32), np.zeros(width, bool)
    if norm == "mean_std":
        offset, scale = values.mean(axis=0), values.std(axis=0)
    else:
        low, high = values.min(axis=0), values.max(axis=0)
        offset, scale = (high + low) / 2, (high - low) / 2
    rests = resting(values, lengths, scale)
    return offset.astype(np.float32), scale_of_resting(scale, rests).astype(np.float32), rests


def resting(values: np.ndarray, lengths: Sequence[int] | np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Returns a mask [w] of the resting dimensions of values [N, w] with deviations `spread` [w]."""
    starts = np.cumsum([0, *lengths[:-1]])
    inside = values - np.repeat(np.add.reduceat(values, starts) / np.reshape(lengths, (-1, 1)), lengths, axis=0)
    changes = np.delete(np.diff(values, axis=0), starts[1:] - 1, axis=0)
    jitters = np.square(changes).sum(axis=0) / max(len(changes), 1) >= _JITTER * np.square(inside).mean(axis=0)
    return (spread < SHARE * max(spread.max(initial=0), FINE)) & (jitters | (spread < FINE))


def scale_of_resting(scale: np.ndarray, rests: np.ndarray) -> np.ndarray:
    """Returns scale [w], with the median of the moving dimensions for the resting ones; 1 if none moves."""
    return np.where(rests, 1.0 if rests.all() else np.median(scale[~rests]), scale)
