"""The toy study: its distributions and metrics, its couplings, and the command that writes tables and pictures."""

import csv
import struct

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest

from experiments.toy import command as toy
from experiments.toy import figures
from experiments.toy.command import Job, Problem
from utils.errors import UserError
from utils.flow import euler
from utils.system.cli import last_of_each, parse
from utils.system.signals import Interrupted, PreemptionGuard

KEY = jax.random.PRNGKey(0)
SAMPLE_DATA, TRUE_SAMPLES = (jax.jit(f, static_argnums=1) for f in (toy.sample_data, toy.true_samples))
MOON, ROTATION = Problem(0.0, 1.0, 2.0), Problem(1.0, 0.0, 2.0)


def set_flags(*flags):
    for name in toy.FLAGS:
        toy.FLAGS[name].unparse()
    parse(["toy", *flags], toy.FLAGS)


def energy(points, problem):
    """Of points as NumPy arrays."""
    return np.asarray(toy.energy(jnp.asarray(points), problem))


def test_source_target_and_conditions_have_about_unit_variance():
    noise = toy.eight_gaussians(KEY, jnp.arange(20_000) % 8)
    np.testing.assert_allclose(noise.std(axis=0), 1.0, atol=0.02)
    for problem in (MOON, ROTATION):
        actions, conditions = SAMPLE_DATA(KEY, 20_000, problem)
        np.testing.assert_allclose(conditions.std(axis=0), 1.0, atol=0.01)
        assert 0.35 < actions.std(axis=0).min() < actions.std(axis=0).max() < 1
    # A condition tells which moon it is.
    actions, conditions = SAMPLE_DATA(jax.random.PRNGKey(3), 20_000, MOON)
    upper, lower = (np.asarray(actions)[np.asarray(conditions)[:, 0] == sign] for sign in (1, -1))
    np.testing.assert_allclose(upper.mean(axis=0), -lower.mean(axis=0), atol=0.03)
    assert upper[:, 1].mean() > 0.2 and len(upper) + len(lower) == 20_000


def test_energy_is_that_of_the_drawn_circles():
    on, off = toy.CENTRES + np.float32([0.9 * toy.RADIUS, 0]), toy.CENTRES + np.float32([0, 1.1 * toy.RADIUS])
    np.testing.assert_array_equal(energy(on, MOON), [1] * 4)
    np.testing.assert_array_equal(energy(off, MOON), [0] * 4)
    np.testing.assert_array_equal(energy(on, ROTATION), [0] * 4)
    # Every condition has samples of either energy, so that tilting is possible everywhere.
    for moon in (-1.0, 1.0):
        points = toy.two_moons(KEY, jnp.arange(2000) / 2000, jnp.full(2000, moon))
        assert 0.3 < toy.energy(points, MOON).mean() < 0.7


@pytest.mark.parametrize("problem", [MOON, ROTATION])
def test_true_samples_are_the_tilted_conditional(problem):
    """Against importance weights: moments of π(a|c) e^{−λE} on either half of the conditions."""
    truth = np.asarray(TRUE_SAMPLES(KEY, 8000, problem))
    assert truth.shape == (2, 4000, 2)
    actions, conditions = SAMPLE_DATA(jax.random.PRNGKey(1), 100_000, problem)
    points = np.asarray(toy.turn(actions, -toy.angles(conditions, problem)))
    weights = np.exp(-problem.lam * energy(points, problem))
    for half, negative in zip(truth, (True, False), strict=True):
        own = (np.asarray(conditions)[:, 0] < 0) == negative
        probs = weights[own] / weights[own].sum()
        np.testing.assert_allclose(half.mean(axis=0), probs @ points[own], atol=0.03)
        np.testing.assert_allclose(half.std(axis=0) ** 2, probs @ (points[own] - probs @ points[own]) ** 2, atol=0.03)
        energies = energy(half, problem)
        assert energies.mean() == pytest.approx(probs @ energy(points[own], problem), abs=0.02)


@pytest.mark.check
def test_distance_is_pots():
    x, y = jax.random.normal(KEY, (2, 200, 2)), 0.5 + jax.random.uniform(KEY, (2, 200, 2))
    angle = np.pi * np.arange(32) / 32
    directions = np.stack([np.cos(angle), np.sin(angle)])
    expected = [
        ot.sliced_wasserstein_distance(np.asarray(a), np.asarray(b), projections=directions)
        for a, b in zip(x, y, strict=True)
    ]
    assert float(toy.distance(x, y)) == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.fixture(scope="module")
def params():
    set_flags()
    return toy.NET.init(KEY, jnp.zeros((1, 1)), jnp.zeros((1, 2)), jnp.zeros((1, 1)))


def test_paths_are_those_of_the_projects_sampler(params):
    conditions, noise = jnp.ones((2, 5, 1)), toy.eight_gaussians(KEY, jnp.arange(10).reshape(2, 5) % 8)
    path = toy.euler_path(params, conditions, noise, 3)
    velocity = lambda x, t: toy.NET.apply(params, conditions, x, t)  # noqa: E731
    assert path.shape == (4, 2, 5, 2)
    np.testing.assert_array_equal(path[0], noise)
    np.testing.assert_allclose(path[-1], euler(velocity, noise, 3), atol=1e-6)


def test_metrics(params, monkeypatch):
    """A velocity that is known: a quarter turn around the origin, approached by one or more Euler steps."""
    monkeypatch.setattr(
        toy.VectorField, "apply", lambda self, params, c, x, t: jnp.pi / 2 * jnp.stack([-x[..., 1], x[..., 0]], axis=-1)
    )
    result = {name: np.asarray(value) for name, value in toy.evaluate(None, KEY, MOON, size=64).items()}
    for i, nfe in enumerate(toy.NFES):
        factor = (1 + 1j * np.pi / 2 / nfe) ** np.arange(nfe + 1)
        straightness = np.abs(np.diff(factor)).sum() / np.abs(factor[-1] - 1)
        assert result["straightness"][i] == pytest.approx(straightness, rel=1e-4)
        last = (1 + 1j * np.pi / 200) ** 100
        assert result["gap"][i] == pytest.approx(np.abs(factor[-1] - last) * np.sqrt(2), rel=0.05, abs=1e-6)
    assert result["straightness"][0] == 1 and result["straightness"][-1] == pytest.approx(np.pi / 2 / 2**0.5, rel=0.01)
    assert result["path_2"].shape == (3, 2, 32, 2) and result["path_100"].shape == (21, 2, 32, 2)
    # Two steps lead outside the ring, where no sample is in a circle.
    assert result["wanted_share"][1] == 1 and (result["distance"] > 0.5).all()


@pytest.mark.parametrize("problem", [MOON, ROTATION])
def test_pairs(problem):
    """Both methods tilt alike; the coupling alone shortens the way and, with a large α, keeps the condition."""
    drawn = {}
    for method, alpha in (("ewfm", 0.0), ("wcot", 0.0), ("wcot", 5.0)):
        draw = jax.jit(lambda key, method=method, alpha=alpha: toy.draw_pairs(key, problem, method, 128, alpha, 0.05))
        batches = [draw(key) for key in jax.random.split(KEY, 8)]
        pairs = {name: jnp.concatenate([pairs[name] for pairs, _ in batches]) for name in batches[0][0]}
        energies = np.asarray(
            toy.energy(toy.turn(pairs["actions"], -toy.angles(pairs["conditions"], problem)), problem)
        )
        way = np.sum((pairs["noise"] - pairs["actions"]) ** 2, axis=1)
        drawn[method, alpha] = {
            "energy": np.average(energies, weights=pairs["weights"]),
            "way": np.average(way, weights=pairs["weights"]),
            "match": np.mean([info.get("condition_match", 0.0) for _, info in batches]),
        }
        assert pairs["weights"].mean() == pytest.approx(1)
    energies = [values["energy"] for values in drawn.values()]
    assert np.ptp(energies) < 0.05 and 0.05 < min(energies) < 0.25
    near, strict = drawn["wcot", 0.0], drawn["wcot", 5.0]
    assert near["way"] < 0.5 * drawn["ewfm", 0.0]["way"] and near["way"] < strict["way"]
    assert strict["match"] > (0.97 if problem is MOON else 0.1) > near["match"]


def test_coupled_flows_are_straighter_than_independent_ones():
    set_flags("--batch_size=64", "--lam=2")
    gaps, lengths = {}, {}
    for method in ("ewfm", "wcot"):
        job = Job("moon", "inside", method, 400, 3.0, 0.1)
        params, diagnostics = toy.train(job, lambda count: None)
        result = toy.evaluate(params, KEY, toy.to_problem(job), size=512)
        gaps[method], lengths[method] = result["gap"][1], result["straightness"][-1]
        assert set(diagnostics) == (set(figures.DIAGNOSTICS) if method == "wcot" else set())
        assert np.isfinite(result["distance"]).all()
    assert gaps["wcot"] < 0.5 * gaps["ewfm"] and lengths["wcot"] < lengths["ewfm"]


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs the command with tiny trainings and synthetic results; returns it and the list of jobs trained."""
    trained = []

    def evaluate(params, key, problem):
        values = {name: np.linspace(1.0, 2.0, len(toy.NFES)) + i for i, name in enumerate(figures.METRICS)}
        return values | {"path_2": np.zeros((3, 2, 4, 2)), "path_100": np.zeros((21, 2, 4, 2))}

    def train(job, progress):
        trained.append(job)
        progress(job.updates)
        return None, dict.fromkeys(figures.DIAGNOSTICS if job.method == "wcot" else (), 0.5)

    monkeypatch.setattr(toy, "evaluate", evaluate)
    monkeypatch.setattr(toy, "train", train)
    monkeypatch.setattr(toy, "reference", lambda key, problem: {n: np.ones(len(toy.NFES)) for n in figures.METRICS})

    def run(*flags):
        trained.clear()
        set_flags()
        own = f"--output={tmp_path / 'toy'}", "--alphas=0.3,0", "--epsilons=0.5"
        toy.main(["toy", *last_of_each((*own, *flags))])
        return trained

    return run


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_study_writes_all_files_and_goes_on(study, tmp_path, capsys, monkeypatch):
    output = tmp_path / "toy"
    assert len(study("--num_seeds=2")) == (2 * 2 + 2 * 3) * 2  # and 3 times true samples, which are not trained
    runs, means = read(output / "runs.csv"), read(output / "means.csv")
    assert len(runs) == 2 * len(means) == 2 * 13 * len(toy.NFES)
    (row,) = [
        r
        for r in means
        if r["method"] == "wcot" and r["updates"] == "6000" and r["energy"] == "inside" and r["nfe"] == "1"
    ]
    assert row["seeds"] == "2" and row["alpha"] == str(toy.FLAGS.alpha) and row["condition_match"] == "0.5000"
    assert row["distance"] == row["distance_low"] == row["distance_high"] == "2.0000"
    for name in ("figure1.png", "nfe.png", "sweep.png"):
        data = (output / name).read_bytes()
        assert data.startswith(b"\x89PNG") and struct.unpack(">II", data[16:24])[0] == 2160
    out = capsys.readouterr().out
    assert "| inside the circles | distance | wCOT (ours) | 2.000 ± 0.000 |" in out

    for draw in ("draw_samples", "draw_nfe", "draw_sweep"):
        monkeypatch.setattr(figures, draw, lambda *arguments: b"")
    # A finished study only draws; a damaged result is made anew; one more seed adds its own.
    assert study("--num_seeds=2") == []
    assert "26 of 26 trainings are already in" in capsys.readouterr().out
    next(output.glob("trained/rotation_outside_wcot_a0_e0.5_sd1_*.npz")).write_bytes(b"half a file")
    assert [(job.condition, job.alpha, job.seed) for job in study("--num_seeds=2")] == [("rotation", 0.0, 1)]
    assert {job.seed for job in study("--num_seeds=3")} == {2}
    # Other settings are other trainings.
    assert {job.method for job in study("--num_seeds=2", "--pages=figure", "--alpha=2")} == {"wcot"}
    assert len(study("--num_seeds=2", "--pages=sweep", "--lam=2")) == 12


def test_interrupted_study_keeps_what_is_finished(study, tmp_path, monkeypatch):
    class Signals(PreemptionGuard):
        checks = 0

        def check(self):
            Signals.checks += 1
            if Signals.checks > 3:
                raise Interrupted(15)

    monkeypatch.setattr(toy, "PreemptionGuard", Signals)
    with pytest.raises(Interrupted):
        study("--jobs=1", "--num_seeds=1", "--pages=sweep")
    assert not (tmp_path / "toy" / "runs.csv").exists()
    monkeypatch.undo()


@pytest.mark.check
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alphas=0,x"], "--alphas: could not convert string to float: 'x'; give numbers as in --alphas="),
        (["--alphas=-1"], "--alphas needs one or more numbers that are at least 0"),
        (["--epsilons=0"], "--epsilons needs one or more numbers that are at least 0.0001"),
        (["--epsilons="], "--epsilons"),
        (["--alphas=nan"], "--alphas needs"),
        (["--lam=nan"], "finite"),
        (["--epsilon=0"], "epsilon"),
        (["--pages=both"], "pages"),
        (["--updates=0"], "updates"),
        (["--alfa=1"], "alfa"),
    ],
)
def test_mistakes(study, flags, message):
    with pytest.raises(UserError) as error:
        study(*flags)
    assert message in str(error.value)


def test_output_that_is_a_file(study, tmp_path):
    (tmp_path / "toy").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        study("--num_seeds=1")
