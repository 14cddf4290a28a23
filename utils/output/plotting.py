"""Learning curves from the CSV files of runs."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from jaxtyping import Float, Real
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import EngFormatter

from utils.output.loggers import read_csv
from utils.system.files import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# One column of a two-column paper, drawn at its final size; the dpi is for print.
STYLE: "dict[RcKeyType, Any]" = {
    "figure.figsize": (3.3, 2.3),
    "figure.dpi": 300,
    "savefig.dpi": 300,
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 2.5,
    # Okabe and Ito's colours, told apart by colour-blind readers.
    "axes.prop_cycle": cycler(color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]),
}


def wilson_interval(
    rate: float | Float[np.ndarray, "*b"], count: float | Real[np.ndarray, "*#b"], z: float = 1.96
) -> tuple[float | Float[np.ndarray, "*b"], float | Float[np.ndarray, "*b"]]:
    """Wilson's score interval of a success rate, 95 % at z = 1.96.

    Args:
        rate: successes / count, in [0, 1].
        count: number of episodes, > 0.

    Returns:
        (lower, upper), within [0, 1].
    """
    centre = rate + z**2 / (2 * count)
    half = z * np.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return (centre - half) / (1 + z**2 / count), (centre + half) / (1 + z**2 / count)


def to_png(figure: Figure) -> bytes:
    """The figure as PNG: the same figure gives the same bytes. For use in the figure's own `rc_context`."""
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    return png.getvalue()


def mark_online(axes: Axes, step: int) -> None:
    """A line where a run begins to learn from its own experience."""
    axes.axvline(step, color="#8c8c8c", linestyle=":", linewidth=0.8)
    axes.annotate(
        "online",
        (step, 0),
        xycoords=("data", "axes fraction"),
        xytext=(3, 3),
        textcoords="offset points",
        color="#8c8c8c",
        fontsize=6,
    )


def learning_curve(
    run_dirs: Path | Sequence[Path],
    path: Path,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    online_from: int | None = None,
) -> None:
    """Draws the eval.csv of one or more runs into the PNG `path`: the same data give the same bytes.

    Success rate over steps, or the mean return if no run has a success rate. A run drawn alone has a band, the 95 %
    Wilson interval, if eval.csv has a column `episodes`.

    Args:
        run_dirs: folders with an eval.csv (columns step, success_rate, return_mean, optionally episodes).
        labels: one per run for the legend, which two or more runs have; default the folder names.
        online_from: step to be marked, see `mark_online`.

    Raises:
        UserError: an eval.csv is missing or damaged, or `path` cannot be written.
    """
    run_dirs = [run_dirs] if isinstance(run_dirs, Path) else list(run_dirs)
    labels = labels or [run_dir.name for run_dir in run_dirs]
    tables = [read_csv(run_dir / "eval.csv") for run_dir in run_dirs]
    success = any(np.isfinite(table.get("success_rate", np.nan)).any() for table in tables)
    column = "success_rate" if success else "return_mean"
    # No pyplot: neither the caller's backend nor its figures are touched.
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
        for label, table in zip(labels, tables, strict=True):
            shown = np.isfinite(table.get(column, np.empty(0)))
            if not shown.any():
                continue
            steps, values = table["step"][shown], table[column][shown]
            # Unclipped, so that markers at 0 and 1 are whole.
            axes.plot(steps, values, marker="o", label=label, clip_on=False, zorder=3)
            if success and len(tables) == 1 and "episodes" in table:
                axes.fill_between(steps, *wilson_interval(values, table["episodes"][shown]), alpha=0.2, linewidth=0)
        if online_from:
            mark_online(axes, online_from)
        if success:
            axes.set_ylim(0, 1)
        axes.set_xlabel("Training steps")
        axes.set_ylabel("Success rate" if success else "Mean return")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if title:
            axes.set_title(title)
        if len(tables) > 1 and axes.lines:
            axes.legend()
        png = to_png(figure)
    atomic_write_bytes(path, png)
