"""Signs of faults in a dataset's steps that the data cannot prove: one line each, with what to do."""

import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from envs.npz import Arrays

_FEW = 5  # Fewer episodes may agree by chance.
_CHECKED = 20_000  # Rows examined by the checks of every row: such faults occur throughout a file.
_PLACEHOLDER = 1000.0  # A value this many times larger than nearly all others is no measurement.
_EXPLAINED, _UNEXPLAINED = 0.9, 0.5  # Shares of variance, R².
_STILL = 0.5
_CLIPPED = 0.95


def suspicions(path: Path, dataset: Arrays) -> list[str]:
    """Returns a line for each sign of a fault in a dataset in the compact layout (envs/datasets.py)."""
    last = np.flatnonzero(dataset["terminals"])
    first = np.append(0, last[:-1] + 1)
    followed = dataset["terminals"] == 0
    if not followed.any():
        return []
    return [
        *_time_limits(path, dataset, last, last - first),
        *_single_steps(path, last - first),
        *_repeated(path, dataset, first, last),
        *_placeholders(path, dataset, followed),
        *_still(path, dataset, followed),
        *_shifted_actions(path, dataset, followed),
        *_clipped(path, dataset["actions"][followed]),
        *_dark_images(path, dataset),
    ]


def _time_limits(path: Path, dataset: Arrays, last: Int[np.ndarray, " E"], lengths: Int[np.ndarray, " E"]) -> list[str]:
    """Finds time limits that are recorded as terminations: all episodes terminate, most after equally many steps."""
    steps = int(lengths.max())
    terminated = (dataset["masks"][np.maximum(last - 1, 0)] == 0) & (lengths > 0)
    if len(last) < _FEW or not terminated.all() or steps < 2 or (lengths == steps).mean() < 0.5:
        return []
    return [
        f"{(lengths == steps).sum()} of {len(last)} episodes of {path} terminate after exactly {steps} steps, none is "
        "cut: if that is a time limit, mark it in 'timeouts' and not in 'terminals', as values are bootstrapped there"
    ]


def _single_steps(path: Path, lengths: Int[np.ndarray, " E"]) -> list[str]:
    """Finds ends in every row."""
    if len(lengths) < _FEW or (share := float((lengths <= 1).mean())) < 0.5:
        return []
    return [f"{share:.0%} of the episodes of {path} have one step; 'terminals' must be 1 at the last step of each only"]


def _repeated(path: Path, dataset: Arrays, first: Int[np.ndarray, " E"], last: Int[np.ndarray, " E"]) -> list[str]:
    """Finds episodes that are in the file more than once."""
    names = ("actions", "observations" if dataset["observations"].shape[1] else "images")
    columns = [dataset[name] for name in names]
    keys = Counter[tuple[int, ...]]()
    for begin, end in zip(first.tolist(), last.tolist(), strict=True):
        if end > begin:
            keys[(end - begin, *(zlib.crc32(np.ascontiguousarray(rows[begin:end]).data) for rows in columns))] += 1
    copies = sum(count - 1 for (length, *_), count in keys.items() if length > 1)
    return [f"{copies} episodes of {path} are copies of others in it; keep one of each"] if copies else []


def _placeholders(path: Path, dataset: Arrays, followed: Bool[np.ndarray, " N"]) -> list[str]:
    """Finds single numbers that are far beyond all others of their column, as stand-ins for a missing reading are."""
    lines = []
    columns = {"rewards": dataset["rewards"][followed][:, None], "observations": dataset["observations"]}
    for name, rows in columns.items():
        if not rows.size:
            continue
        sample = rows[:: -(-len(rows) // _CHECKED)]
        usual, largest = np.quantile(np.abs(sample), 0.99, axis=0), np.maximum(rows.max(axis=0), -rows.min(axis=0))
        if (far := np.flatnonzero((usual > 0) & (largest > _PLACEHOLDER * usual))).size:
            column = int(far[0])
            where = f" (column {column})" if name == "observations" else ""
            row = int(np.abs(rows[:, column]).argmax())
            lines.append(
                f"'{name}' of {path}{where} reach {rows[row, column]:.4g}, and 99 % are within {usual[column]:.4g}: "
                "does it stand for a missing value? leave out such episodes"
            )
    return lines


def _still(path: Path, dataset: Arrays, followed: Bool[np.ndarray, " N"]) -> list[str]:
    """Finds observations that do not change."""
    # The observation after a termination may be a repeated one.
    rows = np.flatnonzero(followed & (dataset["masks"] > 0))[:_CHECKED]
    states, acts = dataset["observations"], (dataset["actions"][rows] != 0).any(axis=1)
    if not states.shape[1] or acts.sum() < _FEW:
        return []
    share = float((states[rows[acts]] == states[rows[acts] + 1]).all(axis=1).mean())
    if share <= _STILL:
        return []
    return [f"{share:.0%} of the steps of {path} leave the observation as it is; are observations recorded every step?"]


def _shifted_actions(path: Path, dataset: Arrays, followed: Bool[np.ndarray, " N"]) -> list[str]:
    """Finds actions of the row before or after, which explain an observation's changes where a row's own do not."""
    rows = np.flatnonzero(followed[1:-1] & followed[2:] & followed[:-2])[:_CHECKED] + 1
    states, actions = dataset["observations"], dataset["actions"]
    if len(rows) < 20 * (actions.shape[1] + 1) or not states.shape[1]:
        return []
    changes = states[rows + 1] - states[rows]
    moving = changes.std(axis=0) > 1e-6 * (np.abs(states[rows]).max(axis=0) + 1e-12)
    if not moving.any():
        return []
    shares = {lag: _explained(actions[rows + lag], changes[:, moving]) for lag in (-1, 0, 1)}
    for lag, other in ((-1, "before"), (1, "after")):
        if ((shares[lag] > _EXPLAINED) & (shares[0] < _UNEXPLAINED)).any():
            column = int(np.flatnonzero(moving)[((shares[lag] > _EXPLAINED) & (shares[0] < _UNEXPLAINED)).argmax()])
            return [
                f"column {column} of the observations of {path} changes with the action of the row {other}, not with "
                "the row's own: give each row the action that was taken in it"
            ]
    return []


def _explained(inputs: Float[np.ndarray, "n A"], outputs: Float[np.ndarray, "n o"]) -> Float[np.ndarray, " o"]:
    """Returns the share R² of each column's variance that a linear function of the inputs explains."""
    design = np.append(inputs, np.ones((len(inputs), 1)), axis=1).astype(np.float64)
    centred = outputs.astype(np.float64) - outputs.mean(axis=0)
    fitted = design @ np.linalg.lstsq(design, centred, rcond=None)[0]
    return 1 - ((centred - fitted) ** 2).sum(axis=0) / (centred**2).sum(axis=0)


def _clipped(path: Path, actions: Float[np.ndarray, "n A"]) -> list[str]:
    """Finds actions that were clipped and not scaled."""
    share = float((np.abs(actions) >= 0.999).mean()) if actions.size else 0.0
    if share <= _CLIPPED or len(actions) < 20:
        return []
    return [f"{share:.0%} of the actions of {path} are at their bounds; were they clipped where they had to be scaled?"]


def _dark_images(path: Path, dataset: Arrays) -> list[str]:
    """Finds images that were in [0, 1] before they became integers, or that are all alike."""
    images = dataset.get("images")
    if images is None:
        return []
    sample = images[:: max(1, len(images) // 200)]
    if sample.max() <= 1:
        return [f"no pixel of the images of {path} exceeds 1; multiply them by 255 before they become uint8"]
    if len(sample) > 1 and (sample == sample[0]).all():
        return [f"the images of {path} are all the same; was the camera recorded?"]
    return []
