"""Figures: the common style, and learning curves from the CSV files of runs."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import EngFormatter

from utils.output.intervals import wilson_interval
from utils.output.loggers import read_csv
from utils.system.files import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# One column of a two-column paper at its final size, at a resolution for print.
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
    # Okabe and Ito's colours, distinct for colour-blind readers.
    "axes.prop_cycle": cycler(color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]),
}


def to_png(figure: Figure) -> bytes:
    """Returns the figure as PNG, the same bytes for the same figure; call it inside the figure's `rc_context`."""
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    return png.getvalue()


def mark_online(axes: Axes, step: int) -> None:
    """Marks the step at which online training starts by a vertical line."""
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


def label_axes(axes: Axes, success: bool, steps: str) -> None:
    """Labels the axes of learning curves of the success rate (from 0 to 1) or of the mean return."""
    if success:
        axes.set_ylim(0, 1)
    axes.set_xlabel(steps)
    axes.set_ylabel("Success rate" if success else "Mean return")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def learning_curve(
    run_dirs: Path | Sequence[Path],
    path: Path,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    online_from: int | None = None,
) -> None:
    """Draws the eval.csv of one or more runs into the PNG `path`; the same data give the same bytes.

    The curve is the success rate over steps, or the mean return if no run has a success rate. A single run gets a band,
    the 95 % Wilson interval, if its eval.csv has a column `episodes`.

    Args:
        run_dirs: directories with an eval.csv (columns step, success_rate, return_mean, optionally episodes).
        path: file to write.
        labels: names in the legend, which two or more runs get; default: the names of the directories.
        title: of the figure.
        online_from: step at which online training starts, to be marked.

    Raises:
        UserError: an eval.csv is missing or damaged, or `path` cannot be written.
    """
    run_dirs = [run_dirs] if isinstance(run_dirs, Path) else list(run_dirs)
    labels = labels or [run_dir.name for run_dir in run_dirs]
    tables = [read_csv(run_dir / "eval.csv") for run_dir in run_dirs]
    success = any(np.isfinite(table.get("success_rate", np.nan)).any() for table in tables)
    column = "success_rate" if success else "return_mean"
    # Without pyplot, the caller's backend and figures stay untouched.
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
        for label, table in zip(labels, tables, strict=True):
            shown = np.isfinite(table.get(column, np.empty(0)))
            if not shown.any():
                continue
            steps, values = table["step"][shown], table[column][shown]
            # Not clipped, so that markers at 0 and 1 are drawn whole.
            axes.plot(steps, values, marker="o", label=label, clip_on=False, zorder=3)
            if success and len(tables) == 1 and "episodes" in table:
                axes.fill_between(steps, *wilson_interval(values, table["episodes"][shown]), alpha=0.2, linewidth=0)
        if online_from:
            mark_online(axes, online_from)
        label_axes(axes, success, "Training steps")
        if title:
            axes.set_title(title)
        if len(tables) > 1 and axes.lines:
            axes.legend()
        png = to_png(figure)
    atomic_write_bytes(path, png)
