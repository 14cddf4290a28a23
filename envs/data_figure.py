"""A figure of a dataset: returns, lengths, rewards, actions and observations at a glance."""

from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float, Int, Real
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from envs.data_card import DataCard
from envs.npz import Arrays
from utils.output.plotting import STYLE, to_png
from utils.system.files import atomic_write_bytes

_ROWS = 100_000  # rows that quantiles are taken over
_EPISODES = 20  # episodes whose rewards are drawn
_IMAGES = 4
_COLUMNS = 60  # columns of actions or observations that are drawn
_WIDE = 200.0  # Observations of a wider range are drawn on a logarithmic axis.
_GREY = "#8c8c8c"


def draw(arrays: Arrays, card: DataCard, path: Path, title: str) -> None:
    """Draws a dataset in the compact layout (envs/datasets.py) into a PNG; the same data give the same bytes.

    Raises:
        UserError: the file cannot be written.
    """
    last = np.flatnonzero(arrays["terminals"])
    first = np.append(0, last[:-1] + 1)
    followed = arrays["terminals"] == 0
    rewards = np.where(followed, arrays["rewards"], 0).astype(np.float64)
    with matplotlib.rc_context(STYLE | {"figure.dpi": 150, "savefig.dpi": 150}):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        panels = figure.subplots(2, 3).ravel()
        figure.suptitle(f"{title}: {card.episodes} episodes, {card.transitions} transitions", fontsize=9)
        _histogram(panels[0], np.add.reduceat(rewards, first), "Return of an episode", "Episodes")
        _histogram(panels[1], last - first, "Steps of an episode", "Episodes")
        _histogram(panels[2], arrays["rewards"][followed], "Reward of a step", "Steps", log=True)
        _ranges(panels[3], arrays["actions"][followed][:_ROWS], "Action, dimension")
        panels[3].set_ylim(-1.1, 1.1)
        if arrays["observations"].shape[1]:
            _ranges(panels[4], arrays["observations"][:_ROWS], "Observation, dimension")
            if np.ptp(arrays["observations"][:_ROWS]) > _WIDE:
                panels[4].set_yscale("symlog", linthresh=1.0)
        else:
            panels[4].set_axis_off()
        if "images" in arrays:
            _images(panels[5], arrays)
        else:
            _sums(panels[5], rewards, first, last)
        png = to_png(figure)
    atomic_write_bytes(path, png)


def _histogram(axes: Axes, values: Real[np.ndarray, " n"], label: str, count: str, log: bool = False) -> None:
    """Draws the distribution of numbers."""
    low, high = float(values.min()), float(values.max())
    if low == high:  # A bar in the middle of the axis.
        low, high = low - max(1.0, abs(low) / 2), high + max(1.0, abs(high) / 2)
    bins = int(np.clip(2 * len(values) ** 0.5, 11, 41)) | 1  # Odd, so that one has the middle of the axis.
    axes.hist(values, bins=bins, range=(low, high), log=log)
    if log:
        axes.set_ylim(bottom=0.8)
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.set_xlabel(label)
    axes.set_ylabel(count)


def _ranges(axes: Axes, rows: Float[np.ndarray, "n d"], label: str) -> None:
    """Draws minimum to maximum (thin), 5 % to 95 % (thick) and median of each column."""
    shown = np.unique(np.linspace(0, rows.shape[1] - 1, min(rows.shape[1], _COLUMNS)).astype(int))
    low, fifth, middle, most, high = np.quantile(rows[:, shown], (0, 0.05, 0.5, 0.95, 1), axis=0)
    axes.vlines(shown, low, high, color=_GREY, linewidth=0.8)
    axes.vlines(shown, fifth, most, color="#0072B2", linewidth=max(1.0, min(6.0, 90 / len(shown))))
    axes.plot(shown, middle, "_", color="white", markersize=5)
    axes.set_xlim(-1, rows.shape[1])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.set_xlabel(label)
    axes.set_ylabel("min, 5 %, median, 95 %, max", fontsize=6)


def _sums(
    axes: Axes, rewards: Float[np.ndarray, " N"], first: Int[np.ndarray, " E"], last: Int[np.ndarray, " E"]
) -> None:
    """Draws the sum of rewards over the steps of some episodes."""
    for episode in np.unique(np.linspace(0, len(first) - 1, min(len(first), _EPISODES)).astype(int)):
        sums = np.cumsum(rewards[first[episode] : last[episode]])
        axes.plot(np.arange(1, len(sums) + 1), sums, color="#0072B2", alpha=0.5, linewidth=0.8)
    axes.set_xlabel("Step")
    axes.set_ylabel("Sum of rewards")


def _images(axes: Axes, arrays: Arrays) -> None:
    """Draws images of some rows, one row of images a camera."""
    shown = np.linspace(0, len(arrays["images"]) - 1, _IMAGES).astype(int)
    images = arrays["images"][shown]  # [n, C, h, w, 3]
    rows = [np.concatenate(list(images[:, camera]), axis=1) for camera in range(images.shape[1])]
    axes.imshow(np.concatenate(rows, axis=0))
    axes.set_axis_off()
    axes.set_title("Images")
