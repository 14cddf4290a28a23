import re
import struct
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from experiments.report import published
from utils.errors import UserError
from utils.output.loggers import CsvLogger
from utils.output.plotting import (
    GREY,
    METHODS,
    MOST,
    STYLE,
    coloured,
    counted,
    grey_style,
    label_ends,
    learning_curve,
    method_styles,
    render,
)
from utils.run.loading import online_from


def caption_of(figure) -> str:
    """The text below a figure."""
    return " ".join(figure.get_supxlabel().split())


def test_a_method_has_one_colour_whatever_others_there_are():
    few, many = (
        method_styles({"OTQL": "OTQL", "mine": "mine"}),
        method_styles({n: n for n in [*METHODS, "mine", "new"]}),
    )
    assert few["OTQL"] == many["OTQL"] and few["mine"] == many["mine"]
    looks = [tuple(many[name].values()) for name in METHODS]
    assert set(METHODS) == set(published.NAMES.values())
    assert len({colour for colour, _ in looks}) == len(METHODS)
    # Variants of a method differ from each other; those of one method do not move the other methods' colours.
    names = {"OTQL (lam=1)": "OTQL", "OTQL (lam=2)": "OTQL", "OTQL (lam=4)": "OTQL", "FQL": "FQL"}
    variants = method_styles(names)
    assert variants["FQL"] == many["FQL"] and len({style["color"] for style in variants.values()}) == 4


def test_the_colours_are_legible_on_white_and_on_dark_pages():
    def luminance(colour):
        parts = np.array(matplotlib.colors.to_rgb(colour))
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    dark = luminance("#17181a")
    for name, (colour, _) in METHODS.items():
        own = luminance(colour)
        assert 1.05 / (own + 0.05) > 2.9 and (own + 0.05) / (dark + 0.05) > 2.5, name


def test_six_names_are_coloured_and_otql_is_one_of_them():
    scores = {f"m{index}": index / 10 for index in range(9)} | {"OTQL": 0.0, "none": np.nan}
    assert coloured(scores) == {"OTQL", "m8", "m7", "m6", "m5", "m4"} and MOST == 6
    assert grey_style({"color": "red", "marker": "o"})["color"] == GREY


def test_counts_name_those_that_differ():
    assert counted({"a": 3, "b": 3}, "seed") == "3 seeds"
    assert counted({"a": 1}, "seed") == "1 seed"
    assert counted({"a": 3, "b": 3, "c": 1, "d": 2}, "seed") == "3 seeds (1 for c; 2 for d)"


def test_names_at_the_ends_of_lines_do_not_overlap_and_keep_their_order():
    heights = [0.0, 0.01, 0.5, 0.52, 0.51, 1.0, 0.99]
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(4, 2.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        label_ends(axes, [(str(height), 1.0, height, "red") for height in heights])
        figure.draw_without_rendering()
        boxes = {float(text.get_text()): text.get_window_extent() for text in axes.texts}
        # Without the leaders, which the extent of an annotation contains.
        places = [text.get_position()[1] for text in sorted(axes.texts, key=lambda text: float(text.get_text()))]
    assert set(boxes) == set(heights) and places == sorted(places)
    assert np.diff(places).min() * axes.bbox.height >= 7 / 72 * figure.dpi
    assert min(places) >= 0 and max(places) <= 1


def test_the_svg_takes_the_pages_colours_and_shares_no_identifier():
    drawings = []
    for end in (1, 2):
        with matplotlib.rc_context(STYLE):
            figure = matplotlib.figure.Figure(layout="constrained")
            figure.add_subplot().plot([0, end], [0, 1], color="#0077BB")
            drawings.append(render(figure, "3 seeds"))
            assert caption_of(figure) == "3 seeds"
    ids = [set(re.findall(r'\bid="([^"]+)"', drawing.svg)) for drawing in drawings]
    assert ids[0] and not ids[0] & ids[1]
    for drawing, own in zip(drawings, ids, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawing.svg)) <= own
        assert drawing.svg.startswith("<svg") and "http" not in drawing.svg
        assert "currentColor" in drawing.svg and "var(--grid" in drawing.svg and "#0077bb" in drawing.svg.lower()
        assert "#262626" not in drawing.svg and "#ffffff" not in drawing.svg.lower()


def test_more_than_six_runs_are_grey_but_named(tmp_path, figures):
    names = [f"run {index}" for index in range(9)]
    directories = [
        write_eval(tmp_path / name, success_rate=[0, 0.1, 0.2, 0.3, place / 10], episodes=[50] * 5)
        for place, name in enumerate(names)
    ]
    learning_curve(directories, tmp_path / "a.png")
    axes = figures[0].axes[0]
    assert [line.get_color() == GREY for line in axes.lines] == [False] * 6 + [True] * 3
    assert {text.get_text() for text in axes.texts} == set(names)
    assert caption_of(figures[0]) == "9 runs, one seed each; 50 episodes per evaluation."


def test_a_single_run_has_its_interval_and_says_so(tmp_path, figures):
    learning_curve(write_eval(tmp_path, success_rate=[0, 0.2, 0.5, 0.9, 1], episodes=[50] * 5), tmp_path / "a.png")
    assert len(figures[0].axes[0].collections) == 1
    text = caption_of(figures[0])
    assert "one seed" in text and "50 episodes" in text and "95 % Wilson interval" in text


def write_eval(directory: Path, **columns) -> Path:
    logger = CsvLogger(directory / "eval.csv")
    for step in range(5):
        logger.log(step * 100_000, {name: values[step] for name, values in columns.items()})
    return directory


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def test_learning_curve_is_a_png_for_print_with_the_same_bytes(tmp_path):
    run_dir = write_eval(tmp_path / "sd0", success_rate=[0, 0.2, 0.5, 0.9, 1], return_mean=[0] * 5, episodes=[50] * 5)
    backend = matplotlib.get_backend()
    learning_curve(run_dir, tmp_path / "a.png")
    learning_curve(run_dir, tmp_path / "b.png")
    learning_curve([run_dir, run_dir], tmp_path / "c.png", labels=["OTQL", "FQL"])
    width, height = png_size(tmp_path / "a.png")
    assert width == 1080 and height > 720  # 300 dots an inch, with a caption
    assert 5_000 < (tmp_path / "a.png").stat().st_size < 200_000
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes() != (tmp_path / "c.png").read_bytes()
    assert matplotlib.get_backend() == backend


@pytest.mark.parametrize(
    "columns,label,limits",
    [
        ({"success_rate": [0.1] * 5, "return_mean": [-9] * 5}, "Success rate", (0, 1)),
        ({"success_rate": [np.nan] * 5, "return_mean": [-9, -5, -3, -2, -1]}, "Return", None),
        ({"return_mean": [-9, -5, -3, -2, -1]}, "Return", None),
    ],
)
def test_learning_curve_shows_the_return_only_without_success(tmp_path, figures, columns, label, limits):
    learning_curve(write_eval(tmp_path, **columns), tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert axes.get_ylabel() == label
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), columns["success_rate" if limits else "return_mean"])
    if limits:
        assert axes.get_ylim() == limits
    assert not axes.collections  # no band without a number of episodes


@pytest.mark.parametrize(
    "flags,step",
    [
        ({"rollout_steps": 20, "online_steps": 80}, 20),
        ({"offline_steps": 30, "online_steps": 10}, 30),
        ({"offline_steps": 30, "online_steps": 0}, None),
        ({"offline_steps": 30}, None),
    ],
)
def test_learning_curve_says_where_online_begins(tmp_path, figures, flags, step):
    run_dir = write_eval(tmp_path, success_rate=[0, 0.2, 0.5, 0.9, 1])
    learning_curve(run_dir, tmp_path / "a.png", online_from=online_from({"flags": flags}))
    assert [line.get_xdata() for line in figures[0].axes[0].lines[1:]] == ([[step, step]] if step else [])


@pytest.mark.filterwarnings("error")
def test_learning_curve_without_evaluations(tmp_path):
    (tmp_path / "eval.csv").write_text("")
    learning_curve([tmp_path, tmp_path], tmp_path / "a.png")
    assert png_size(tmp_path / "a.png")[0] == 1080
    with pytest.raises(UserError, match=r"eval\.csv"):
        learning_curve(tmp_path / "missing", tmp_path / "b.png")
