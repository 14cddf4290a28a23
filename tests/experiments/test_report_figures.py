"""The figures of a report: which lines are coloured and named, what captions say, and the numbers behind them."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from written_runs import SCENE, groups_of, write_run

from experiments.report import published
from experiments.report.aggregate import Aggregate, aggregate_table, draw_aggregate, profile, task_ranks
from experiments.report.command import make_palette, write_report
from experiments.report.curves import Palette, draw_curves
from experiments.report.nfe import draw_nfe, find_points
from utils.output.plotting import GREY, METHODS, MOST

OTHER = "scene-play-singletask-task2-v0"
NOISY = "scene-noisy-singletask-task1-v0"  # Has no published curves.
AGENTS = ("bc", "cgql", "dsrl", "ewfm", "fawac", "fedit", "fql", "ifql", "otql")
HEADER = "step,seed,episodes,flow_steps,best_of_n,threshold,success_rate,low,high,return_mean,length_mean"


def figure_of(figures, index: int = 0):
    figure = figures[index]
    return figure, " ".join(figure.get_supxlabel().split())


def coloured_lines(axes) -> set[str]:
    return {line.get_label() for line in axes.lines if line.get_color() != GREY and len(line.get_xdata())}


def many(tmp_path, env: str = NOISY, agents=AGENTS):
    for rank, agent in enumerate(agents):
        write_run(tmp_path, (0, rank / 10, rank / 10, rank / 10 if agent != "otql" else 0), env=env, agent=agent)
    return groups_of(tmp_path)


@pytest.mark.check
def test_at_most_six_lines_are_coloured_and_all_are_named(tmp_path, figures):
    groups = many(tmp_path)
    draw_curves(NOISY, groups, make_palette(groups))
    figure, caption = figure_of(figures)
    axes = figure.axes[0]
    assert coloured_lines(axes) == {"OTQL", "IFQL", "FQL", "FEdit", "FAWAC", "EWFM"}
    names = {published.NAMES[agent] for agent in AGENTS}
    assert {text.get_text() for text in axes.texts} == {line.get_label() for line in axes.lines} == names
    assert "1 seed" in caption and "25 episodes per evaluation" in caption and "Grey" in caption
    # Unfinished runs do not add colours.
    for seed in range(1, 3):
        for agent in AGENTS:
            write_run(tmp_path, (0, 0, 0, 0), env=NOISY, agent=agent, seed=seed, finished=False)
    groups = groups_of(tmp_path)
    draw_curves(NOISY, groups, make_palette(groups))
    assert len(coloured_lines(figures[1].axes[0])) == MOST


def test_a_method_keeps_its_colour_when_others_are_added(tmp_path, figures):
    groups = many(tmp_path / "few", agents=("bc", "fql", "otql"))
    draw_curves(NOISY, groups, make_palette(groups))
    more = groups + many(tmp_path / "more", OTHER, agents=("cgql", "qc", "mine"))
    draw_curves(NOISY, more[:3], make_palette(more))
    few, many_ = ({line.get_label(): line.get_color() for line in figure.axes[0].lines} for figure in figures)
    assert few == many_ and few["OTQL"] == METHODS["OTQL"][0]
    # Also in the published panel.
    write_run(tmp_path / "published", (0, 0.2, 0.4, 0.5), agent="fql")
    groups = groups_of(tmp_path / "published")
    draw_curves(SCENE, groups, make_palette(groups))
    assert {line.get_color() for line in figures[2].axes[1].lines} == {METHODS["FQL"][0], GREY}


def test_curves_have_bands_and_the_published_ones_a_panel(tmp_path, figures):
    for seed in range(3):
        write_run(tmp_path, (0, 0.2, 0.4, 0.5 + seed / 10), agent="fql", seed=seed)
    write_run(tmp_path, (0, 0.3, 0.4, 0.5), agent="otql")
    write_run(tmp_path, (0, 0.3, 0.4, 0.5), agent="otql", seed=1, finished=False)
    groups = groups_of(tmp_path)
    draw_curves(SCENE, groups, make_palette(groups))
    figure, caption = figure_of(figures)
    own, other = figure.axes
    lines = {line.get_label(): line for line in own.lines}
    np.testing.assert_allclose(lines["FQL"].get_ydata(), [0, 0.2, 0.4, 0.6])
    assert lines["OTQL (unfinished)"].get_linestyle() == ":" and lines["OTQL"].get_linestyle() == "-"
    assert len(own.collections) == 1  # a band where there are several seeds
    np.testing.assert_allclose(own.collections[0].get_datalim(own.transData).bounds[3], 0.7)
    dashed = {line.get_label(): line for line in other.lines}
    assert dashed.keys() == published.curves()[SCENE].keys() == {text.get_text() for text in other.texts}
    np.testing.assert_array_equal(dashed["FQL"].get_ydata(), published.curves()[SCENE]["FQL"].mean)
    assert caption.startswith(
        "Mean success rate over 1 seed (3 for FQL); 25 episodes per evaluation; band: 95 % bootstrap"
    )
    assert "Dotted: unfinished" in caption and "Published" in caption


def scores(tmp_path):
    """Runs of three methods on two tasks; method → task → a score a seed."""
    generator, result = np.random.default_rng(1), {}
    for agent, level in (("bc", 0.2), ("otql", 0.8), ("fql", 0.5)):
        for task in (SCENE, OTHER):
            values = np.clip(generator.normal(level, 0.15, 4), 0, 1).round(2)
            result.setdefault(published.NAMES[agent], []).append(values)
            for seed, value in enumerate(values):
                write_run(tmp_path, [value] * 4, env=task, agent=agent, seed=seed)
    return result


def resampled(strata, statistic, count=3_000):
    generator = np.random.default_rng(11)
    draws = [statistic([generator.choice(own, len(own)) for own in strata]) for _ in range(count)]
    return np.quantile(draws, [0.025, 0.975], axis=0)


@pytest.mark.check
def test_the_aggregate_agrees_with_a_computation_of_its_own(tmp_path):
    values = scores(tmp_path)
    aggregate = Aggregate.of(groups_of(tmp_path))
    for label, score in aggregate.iqms().items():
        middle = lambda parts: np.mean(sorted(np.concatenate(parts))[2:-2])  # noqa: E731
        assert score.mean == pytest.approx(middle(values[label]))
        np.testing.assert_allclose(score.interval, resampled(values[label], middle), atol=0.02)

    def ranks(parts):
        means = np.array([part.mean() for part in parts]).reshape(3, 2)
        better = (means[None] > means[:, None] + 1e-9).sum(1)
        equal = (abs(means[None] - means[:, None]) <= 1e-9).sum(1)
        return (better + (equal + 1) / 2).mean(1)

    strata = [part for label in aggregate.groups for part in values[label]]
    found = aggregate.ranks()
    np.testing.assert_allclose([rank for rank, _ in found.values()], ranks(strata))
    np.testing.assert_allclose(np.transpose([ends for _, ends in found.values()]), resampled(strata, ranks), atol=0.26)


def test_ranks_of_equal_scores_are_shared_and_have_no_interval_for_single_seeds(tmp_path):
    for agent, value in (("bc", 0.2), ("otql", 0.8), ("fql", 0.8)):
        write_run(tmp_path, [value] * 4, agent=agent)
    groups = groups_of(tmp_path)
    assert Aggregate.of(groups).ranks() == {"BC": (3.0, None), "FQL": (1.5, None), "OTQL": (1.5, None)}
    assert task_ranks(groups) == {"BC": 3.0, "FQL": 1.5, "OTQL": 1.5}
    rows = [[cell.text + cell.rest for cell in row] for row in aggregate_table(groups).rows]
    assert rows[2] == ["BC", "0.20 (single seeds)", "3.0", "1 × 1"]


def test_the_profile_is_the_share_of_runs_above_each_threshold(tmp_path, figures):
    np.testing.assert_allclose(profile(np.array([0.1, 0.5, 0.5, 1.0]))[[0, 5, 25, 49, 50]], [1, 0.75, 0.25, 0.25, 0])
    scores(tmp_path)
    groups = groups_of(tmp_path)
    drawing = draw_aggregate(groups, make_palette(groups))
    (left, right), caption = figures[0].axes, drawing.caption
    assert [text.get_text() for text in left.get_yticklabels()] == ["BC", "FQL", "OTQL"]
    assert to_hex(left.get_yticklabels()[2].get_color()) == METHODS["OTQL"][0].lower()
    assert len(right.lines) == len(right.collections) == 3
    assert caption.startswith("2 tasks, 4 seeds each: 8 runs a method.") and "25 episodes" in caption
    assert (
        draw_aggregate([g for g in groups if not (g.method == "BC") ^ (g.env_name == SCENE)], Palette({}, {})) is None
    )


def evaluate(directory, *rows: str) -> None:
    (directory / "evaluations.csv").write_text("\n".join([HEADER, *rows]) + "\n")


def test_success_against_nfe_is_that_of_evaluations_as_trained_otherwise(tmp_path, figures):
    for seed, shift in enumerate((0.0, 0.2)):
        directory = write_run(tmp_path, [0.5] * 4, seed=seed, nfe=3, config={"flow_steps": 2, "threshold": 0.01})
        evaluate(
            directory,
            f"24000,0,50,2,5,0.01,{0.5 + shift},0,1,0,0",
            f"24000,1,150,2,5,0.01,{0.7 + shift},0,1,0,0",  # pooled with the one before
            f"24000,0,50,1,1,0.01,{0.1 + shift},0,1,0,0",
            "24000,0,50,1,1,0.02,1.0,0,1,0,0",  # another setting
            "18000,0,50,1,1,0.01,1.0,0,1,0,0",  # another step
        )
    write_run(tmp_path, [0.4] * 4, agent="fql", nfe=1, config={"best_of_n": 1})
    groups = groups_of(tmp_path)
    points, damaged = find_points(groups)
    found = {(point.label, point.nfe, point.best_of_n): point for point in points}
    assert not damaged and found.keys() == {("OTQL", 3, 5), ("OTQL", 2, 1), ("FQL", 1, 1)}
    np.testing.assert_allclose(found["OTQL", 3, 5].scores, [0.65, 0.85])
    assert found["OTQL", 3, 5].episodes == 200 and found["OTQL", 2, 1].episodes == 50
    np.testing.assert_allclose(found["OTQL", 2, 1].interval, [0.1, 0.3])
    one = found["FQL", 1, 1]
    assert one.training and one.episodes == 75 and one.interval[0] < 0.4 < one.interval[1]
    draw_nfe(SCENE, points, make_palette(groups))
    figure, caption = figure_of(figures)
    assert {text.get_text() for text in figure.axes[0].texts} == {"OTQL, N 5", "OTQL, N 1", "FQL, N 1"}
    assert (
        caption.startswith("Mean over 1 seed (2 for OTQL); 50 to 200 episodes per point and seed") and "Open" in caption
    )
    markers = {line.get_marker() for line in figure.axes[0].lines} - {"None"}
    assert len(markers) == 2  # one for each N


def test_a_damaged_evaluations_csv_is_told(tmp_path, capsys):
    evaluate(write_run(tmp_path, [0.5] * 4, seed=0, config={"threshold": 0.01}), "24000,0,50,2,five,0.01,0.5,0,1,0,0")
    evaluate(write_run(tmp_path, [0.5] * 4, seed=1, config={"threshold": 0.01}), "24000,0,50,2,1,0.01,0.5,0,1,0,0")
    text = write_report([tmp_path], tmp_path / "report", 3)
    assert "sd0/evaluations.csv is damaged" in capsys.readouterr().err
    assert "sd0/evaluations.csv is damaged" in text
    assert "sd1" not in text.partition("Missing, failed")[2]


@pytest.mark.parametrize(("metric", "name"), [("normalized_score", "normalised score"), ("return_mean", "return")])
def test_runs_without_success_are_compared_by_the_measure_they_have(tmp_path, figures, metric, name):
    for agent in ("otql", "bc"):
        for seed in range(2):
            write_run(tmp_path, (0.1, 0.2, 0.3, 0.4 + seed), env="minari:a/b-v0", agent=agent, seed=seed, metric=metric)
    text = write_report([tmp_path], tmp_path / "report", 1)
    assert f"| minari:a/b-v0 ({name}) |" in text and f"({name})" in text.split("Runs, cost and notes")[1]
    figure, caption = figure_of(figures)
    assert caption.startswith(f"Mean {name} over 2 seeds") and figure.axes[0].get_ylabel() == name.capitalize()
