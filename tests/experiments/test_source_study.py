"""The study of sources: its problem and measures against independent computations, and what its main rows show."""

import csv

import numpy as np
import pytest
from compiling import optimised
from scipy.stats import energy_distance

from experiments import source_study
from experiments.source_study import Problem, evaluate, explained, measure, train, training_noise


@pytest.fixture(scope="module")
def problem():
    return Problem()


def test_the_target_is_the_tilted_mixture(problem):
    """Moments of the target are those of the data, weighted by min(e^A, 10)."""
    states = problem.states(8, 3)
    target, data = problem.tilted(states, 4000, 0), problem.samples(states, 20_000, 5)
    weights = np.minimum(np.exp(data @ problem.direction), 10.0)
    weights /= weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(target.mean(axis=1), np.einsum("ab,abc->ac", weights, data), atol=0.05)
    assert (
        np.abs(data).max() <= 1
        and 0.9 < np.std(problem.samples(problem.states(3000, 4), 1, 6) @ problem.direction) < 1.1
    )


def test_every_row_of_the_data_is_a_sample_with_its_advantage(problem):
    data = problem.dataset(0)
    rows = slice(0, 2000, 2)
    assert len(np.unique(np.asarray(data["observations"])[::2], axis=0)) == source_study.ROWS
    np.testing.assert_allclose(
        np.asarray(data["rewards"])[rows], np.asarray(data["actions"])[rows] @ problem.direction, rtol=1e-4, atol=1e-5
    )


def test_measures():
    """The energy distance is scipy's in one dimension; a shifted, shrunken or untilted copy shows in its measure."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 400, 1))
    expected = [energy_distance(a[:, 0], b[:, 0]) ** 2 for a, b in zip(x, y + 1, strict=True)]
    own = source_study.mean_distance(y + 1)
    found = measure(x, y + 1, x, np.ones(1))["distance"]
    np.testing.assert_allclose(found, np.mean(expected / own), atol=0.01)

    centres = rng.normal(size=(50, 1, 2))
    target = centres + rng.normal(size=(50, 800, 2))
    untilted, direction = target - 1.0, np.array([1.0, 0.0])
    assert measure(target, target, untilted, direction) == pytest.approx(
        {"distance": 0, "bias": 0, "reach": 1, "spread": 1, "tilt": 1}, abs=0.01
    )
    half = 0.5 * target
    assert measure(half, target, untilted, direction)["reach"] == pytest.approx(0.5, abs=0.01)
    assert measure(half, target, untilted, direction)["spread"] == pytest.approx(0.5, abs=0.01)
    assert measure(untilted, target, untilted, direction)["tilt"] == 0
    assert measure(target + 0.3, target, untilted, direction)["bias"] == pytest.approx(0.3, abs=0.01)


def test_explained_is_out_of_sample():
    """Noise of the state's own making is found, and nothing in noise that is independent of it."""
    rng = np.random.default_rng(1)
    states, noise = rng.normal(size=(20_000, 4)), rng.normal(size=(20_000, 5))
    assert abs(explained(noise, states)) < 0.02
    assert explained(noise + np.tanh(states[:, :1]), states) == pytest.approx(0.28, abs=0.05)


@pytest.fixture(scope="module")
def trained(problem):
    """A sharp plan, with and without a source of its noise, and a source of actions; its data and held-out measures."""
    data, states, samples = problem.dataset(0), problem.states(96, 1), source_study.SAMPLES
    against = problem.tilted(states, samples, 1), problem.samples(states, samples, 2), problem.direction
    arms = ("plan, ε 0.1", "plan, ε 0.1, source of noise", "source of actions")
    with optimised():
        agents = {arm: train(source_study.ARMS[arm], data, 1, 1500)[0] for arm in arms}
    return agents, data, {arm: evaluate(agent, 2, states, *against) for arm, agent in agents.items()}


def test_acting_from_the_fitted_noise_undoes_the_skew(trained):
    """The plan's noise depends on the state, relative to its source hardly; means reach and the distance falls."""
    agents, data, found = trained
    plain, fitted = "plan, ε 0.1", "plan, ε 0.1, source of noise"
    skew = {arm: explained(*training_noise(agents[arm], data, 60, 0)) for arm in (plain, fitted)}
    print(skew, found)
    assert skew[plain] > 0.1 and skew[fitted] < 0.35 * skew[plain]
    assert found[fitted]["distance"] < 0.7 * found[plain]["distance"]
    assert found[fitted]["reach"] > found[plain]["reach"] + 0.2


def test_the_tilt_is_kept(trained):
    """Neither source loses the advantage of the target's samples."""
    _, _, found = trained
    for arm in ("plan, ε 0.1, source of noise", "source of actions"):
        assert found[arm]["tilt"] > 0.5, (arm, found[arm])


def test_the_command_writes_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr(source_study, "ROWS", 600)
    monkeypatch.setattr(source_study, "HELD_OUT", 4)
    monkeypatch.setattr(source_study, "SAMPLES", 4)
    monkeypatch.setattr(source_study, "NFES", (1, 2))
    arms = {name: source_study.ARMS[name] for name in ("independent", "source of actions, shortcut")}
    monkeypatch.setattr(source_study, "ARMS", arms)
    source_study.main(["source_study", "--updates=2", "--num_seeds=1", f"--output={tmp_path}"])
    rows = list(csv.DictReader((tmp_path / "source_study.csv").read_text().splitlines()))
    assert [(row["arm"], row["nfe"]) for row in rows] == [(arm, nfe) for arm in arms for nfe in "12"]
    assert all(np.isfinite(float(row[metric])) for row in rows for metric in source_study.METRICS)
    assert (tmp_path / "source_study.png").stat().st_size > 10_000
