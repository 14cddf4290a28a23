"""Offset and scale of recorded numbers, such that a joint that rests gets no scale of its own jitter.

Divided by its jitter, a resting joint would be thousands in the first recording where it moves. Its deviation alone
does not tell: a gripper in metres beside joints in degrees deviates as little. So a number rests if it deviates by less
than SHARE of what the one that moves most does (0.1° to 20°: a tick or two of a servo), and either changes from frame
to frame as much as at all (jitter; motion is smooth), or deviates by less than FINE (0.2 mm, 0.01°: no motion of an
arm in metres or radians). Its scale is the median one of the numbers that move, in whose units it will move later.
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
    """Returns offset and scale [w], float32, no scale zero, of values [N, w], and bool [w]: which of them rest.

    Args:
        values: as recorded, of all episodes.
        lengths: frames of each episode.
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
    """Returns which numbers rest, bool [w], of values [N, w] of episodes; `spread` [w]: how they deviate."""
    starts = np.cumsum([0, *lengths[:-1]])
    inside = values - np.repeat(np.add.reduceat(values, starts) / np.reshape(lengths, (-1, 1)), lengths, axis=0)
    changes = np.delete(np.diff(values, axis=0), starts[1:] - 1, axis=0)
    jitters = np.square(changes).sum(axis=0) / max(len(changes), 1) >= _JITTER * np.square(inside).mean(axis=0)
    return (spread < SHARE * max(spread.max(initial=0), FINE)) & (jitters | (spread < FINE))


def scale_of_resting(scale: np.ndarray, rests: np.ndarray) -> np.ndarray:
    """Returns scale [w] with the median of those that move for those that rest; 1 if none moves."""
    return np.where(rests, 1.0 if rests.all() else np.median(scale[~rests]), scale)
