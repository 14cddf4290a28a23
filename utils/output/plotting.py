"""Figures: the common style, and learning curves from the CSV files of runs."""

import colorsys
import io
import re
import textwrap
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import EngFormatter

from utils.output.intervals import wilson_interval
from utils.output.loggers import MEASURES, SUCCESS, measure_of, read_csv
from utils.system.files import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK, GREY, GRID = "#262626", "#8c8c8c", "#e6e6e6"
# At twice the resolution of a screen; the smallest text is legible at half the size.
STYLE: "dict[RcKeyType, Any]" = {
    "figure.figsize": (3.3, 2.3),
    "figure.dpi": 300,
    "savefig.dpi": 300,
    "svg.hashsalt": "otql",
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    # Okabe and Ito's colours, distinct for colour-blind readers.
    "axes.prop_cycle": cycler(color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]),
}
# Method → colour and marker, the same in all figures; colours that are legible on white and on dark pages.
METHODS = {
    "OTQL": ("#0077BB", "o"),
    "FQL": ("#D55E00", "s"),
    "QC": ("#009E73", "^"),
    "IFQL": ("#CC79A7", "D"),
    "QAM": ("#AA3377", "v"),
    "DSRL": ("#B8860B", "P"),
    "EWFM": ("#7B61C9", "X"),
    "CGQL": ("#1B9AAA", "<"),
    "BC": ("#9C6B3F", ">"),
    "FEdit": ("#C0392B", "d"),
    "FAWAC": ("#6B8E23", "p"),
    "QSM": ("#5D6DBE", "h"),
    "QAM-E": ("#E0559A", "H"),
    "QAM-F": ("#8A4FA0", "8"),
    "GFP": ("#4C8B2B", "*"),
    "OptiFlow": ("#7A7A00", "s"),
    "LPS": ("#2E6F9E", "^"),
    "MeanFlowQL": ("#B03A6B", "D"),
}
# Colours of other methods, which their names select.
OTHERS = ("#B5651D", "#3D7EA6", "#A8577E", "#5E8C8A", "#8F5BD0", "#C2554D")
MARKERS = "os^DvPX<>"
MOST = 6  # Coloured lines of a panel; all others are grey.


@dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        png: for white pages, with the caption below it.
        svg: an <svg> element for HTML pages, transparent, without the caption; text is in the page's colour.
        caption: what it shows, with the number of seeds and of episodes.
    """

    png: bytes
    svg: str
    caption: str


def method_styles(methods: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Returns name → colour and marker of its lines, whatever other methods there are.

    Variants of one method have neighbouring hues and markers of their own.

    Args:
        methods: name → its method, such as 'OTQL (lam=2)' → 'OTQL'.
    """
    styles = {}
    for method in dict.fromkeys(methods.values()):
        code = zlib.crc32(method.encode())
        colour, marker = METHODS.get(method, (OTHERS[code % len(OTHERS)], MARKERS[code % len(MARKERS)]))
        variants = [name for name, own in methods.items() if own == method]
        hue, light, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
        for place, name in zip(np.linspace(-1, 1, len(variants)), variants, strict=True):
            if len(variants) > 1:
                shade = colorsys.hls_to_rgb((hue + 0.16 * place) % 1, light + 0.1 * place, saturation)
                colour, marker = to_hex(shade), MARKERS[variants.index(name) % len(MARKERS)]
            styles[name] = {"color": colour, "marker": marker}
    return styles


def coloured(scores: Mapping[str, float]) -> set[str]:
    """Returns the names of the lines that are coloured: those of OTQL first, then those of the highest scores."""
    order = sorted(scores, key=lambda name: (not name.startswith("OTQL"), -np.nan_to_num(scores[name], nan=-np.inf)))
    return set(order[:MOST])


def grey_style(style: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the style of a line that is not among the coloured ones."""
    return {**style, "color": GREY, "linewidth": 0.7, "zorder": 1.5, "markersize": 2}


def label_ends(axes: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Writes the name of each line beside its end, as near to it as names do not overlap; call it last.

    Args:
        ends: name, last x and y, and colour of each line.
    """
    if not ends:
        return
    from scipy.optimize import isotonic_regression  # Importing it takes most of a second.

    figure = axes.figure
    figure.draw_without_rendering()  # type: ignore[union-attr]  # The layout, which determines the height.
    gap = 8.4 / 72 * figure.dpi / axes.bbox.height
    points = axes.transAxes.inverted().transform(axes.transData.transform([(x, y) for _, x, y, _ in ends]))
    order = np.argsort(points[:, 1], kind="stable")
    steps = gap * np.arange(len(ends))
    # Least squares under 'at least a gap apart' is isotonic regression on heights less their steps.
    heights = np.clip(isotonic_regression(points[order, 1] - steps).x, 0, max(1 - steps[-1], 0)) + steps
    for index, height in zip(order, heights, strict=True):
        name, x, y, colour = ends[index]
        axes.annotate(
            name,
            (x, y),
            xytext=(1.06, height),
            textcoords="axes fraction",
            color=colour,
            fontsize=7,
            verticalalignment="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "linestyle": ":",
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def height_for(names: int) -> float:
    """Returns the height in inches of a panel whose lines have this number of names at their ends."""
    return max(2.4, 0.9 + names * 8.6 / 72)


def width_for(names: Iterable[str]) -> float:
    """Returns the inches that the longest name at a line's end takes beyond a usual one's."""
    return 0.055 * max(0, max(map(len, names), default=0) - 10)


def render(figure: Figure, caption: str) -> Drawing:
    """Renders a figure in both formats; the same figure gives the same bytes. Call it inside its `rc_context`."""
    svg = to_svg(figure)
    return Drawing(captioned_png(figure, caption), svg, caption)


def captioned_png(figure: Figure, caption: str) -> bytes:
    """Returns the figure as PNG with a caption below it, for which its height grows."""
    lines = textwrap.wrap(caption, int(19 * figure.get_figwidth()))
    figure.set_figheight(figure.get_figheight() + 0.15 * len(lines))
    figure.supxlabel("\n".join(lines), fontsize=7, x=0.01, horizontalalignment="left", color="#555555")
    return to_png(figure)


def to_svg(figure: Figure) -> str:
    """Returns the figure as an <svg> element of an HTML page, in whose colours text, axes and grid are drawn."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # Several figures of one page must not share identifiers.
    prefix = f"f{zlib.crc32(svg.encode()):08x}-"
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'xmlns(:xlink)?="[^"]*" ?', "", svg).replace("xlink:href", "href")
    svg = re.sub(rf"{INK}|#000000", "currentColor", svg).replace(GRID, f"var(--grid, {GRID})")
    width = 96 * figure.get_figwidth()
    return re.sub(
        r'<svg [^>]*?width="[\d.]+pt" height="[\d.]+pt"', f'<svg style="--width: {width:.0f}px"', svg, count=1
    ).replace("<svg style", "<svg style", 1)


def counted(counts: Mapping[str, int], unit: str) -> str:
    """Returns the usual count, and the names that have another: '3 seeds (1 for QC, BC)'."""
    usual, _ = Counter(counts.values()).most_common(1)[0]
    rest: dict[int, list[str]] = {}
    for name, count in counts.items():
        if count != usual:
            rest.setdefault(count, []).append(name)
    others = "; ".join(f"{count} for {', '.join(names)}" for count, names in sorted(rest.items()))
    return f"{usual} {unit}{'' if usual == 1 else 's'}" + (f" ({others})" if rest else "")


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


def label_axes(axes: Axes, measure: str, steps: str) -> None:
    """Labels the axes of learning curves of one of `MEASURES`; a success rate is drawn from 0 to 1."""
    if measure == SUCCESS:
        axes.set_ylim(0, 1)
    axes.set_xlabel(steps)
    axes.set_ylabel(MEASURES[measure].capitalize())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def learning_curve(
    run_dirs: Path | Sequence[Path],
    path: Path,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    online_from: int | None = None,
) -> None:
    """Draws the eval.csv of one or more runs into the PNG `path`; the same data give the same bytes.

    The curve is the success rate over steps, or the normalised score or mean return if no run has a success rate. A
    single run of the success rate gets a band, the 95 % Wilson interval, if its eval.csv has a column `episodes`.

    Args:
        run_dirs: directories with an eval.csv (columns step, one of MEASURES, optionally episodes).
        path: file to write.
        labels: names at the lines' ends, which two or more runs get, such as 'OTQL seed 0'; the first word gives the
            colour. Default: the names of the directories.
        title: of the figure.
        online_from: step at which online training starts, to be marked.

    Raises:
        UserError: an eval.csv is missing or damaged, or `path` cannot be written.
    """
    run_dirs = [run_dirs] if isinstance(run_dirs, Path) else list(run_dirs)
    labels = labels or [run_dir.name for run_dir in run_dirs]
    tables = [read_csv(run_dir / "eval.csv") for run_dir in run_dirs]
    measure = measure_of(*tables)
    styles = method_styles({label: label.split(" ")[0] for label in labels})
    bright = coloured({label: float(len(labels) - place) for place, label in enumerate(labels)})
    # Without pyplot, the caller's backend and figures stay untouched.
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6, height_for(len(tables)) - 0.1), layout="constrained")
        axes = figure.add_subplot()
        ends, episodes = [], set()
        for label, table in zip(labels, tables, strict=True):
            shown = np.isfinite(table.get(measure, np.empty(0)))
            if not shown.any():
                continue
            steps, values = table["step"][shown], table[measure][shown]
            counts = table.get("episodes", np.empty(0))[shown] if "episodes" in table else np.empty(0)
            episodes |= set(counts[np.isfinite(counts)].astype(int).tolist())
            style = styles[label] if label in bright else grey_style(styles[label])
            if len(tables) == 1:
                style = {"marker": "o"}
            # Not clipped, so that markers at 0 and 1 are drawn whole.
            (line,) = axes.plot(steps, values, **{"label": label, "clip_on": False, "zorder": 3, **style})
            ends.append((label, float(steps[-1]), float(values[-1]), str(line.get_color())))
            if measure == SUCCESS and len(tables) == 1 and len(counts):
                axes.fill_between(steps, *wilson_interval(values, counts), alpha=0.2, linewidth=0)
        if online_from:
            mark_online(axes, online_from)
        label_axes(axes, measure, "Training steps")
        if title:
            axes.set_title(title)
        if len(tables) > 1:
            label_ends(axes, ends)
        png = captioned_png(figure, _caption(len(tables), sorted(episodes), bool(axes.collections)))
    atomic_write_bytes(path, png)


def _caption(runs: int, episodes: list[int], band: bool) -> str:
    """Returns the caption of learning curves of single runs."""
    parts = ["One run (one seed)" if runs == 1 else f"{runs} runs, one seed each"]
    parts += [f"{' or '.join(map(str, episodes))} episodes per evaluation"] if episodes else []
    parts += ["band: 95 % Wilson interval of the success rate over episodes"] if band else []
    return "; ".join(parts) + "."
