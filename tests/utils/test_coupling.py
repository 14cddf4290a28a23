"""The coupling: the tilted marginal, plans against POT and scipy, sampling from them, principal components."""

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
import scipy.optimize
import scipy.stats
from coupling_problems import draw_pairs, normalised, problem, solve

from utils.coupling import (
    categorical,
    principal_components,
    sample_conditional,
    squared_distances,
    systematic_resample,
    tilted_marginal,
)


def costs(noise, source, actions, conditions):
    """Action and condition terms of the cost, in float64."""
    noise, source, actions, conditions = (np.asarray(x, np.float64) for x in (noise, source, actions, conditions))
    return ot.dist(noise, actions), ot.dist(source, conditions)


# ---- the tilted marginal


@pytest.mark.check
def test_tilted_marginal_equals_the_formula():
    """p_j = min(exp(λ A_j), w_max) valid_j / Σ, where nothing overflows."""
    rng = np.random.default_rng(0)
    advantages, valid = rng.normal(size=50), (rng.random(50) < 0.8).astype(float)
    for lam, w_max in [(0.4, 10.0), (2.0, 3.0), (5.0, 1.0), (1.0, 0.1)]:
        weights = np.minimum(np.exp(lam * advantages), w_max) * valid
        probs = tilted_marginal(jnp.float32(advantages), jnp.float32(valid), lam, w_max)
        np.testing.assert_allclose(probs, weights / weights.sum(), rtol=1e-5)


def test_clamp_bounds_the_weights():
    """All rows beyond the clamp share the same weight, w_max times that of a row with A = 0."""
    probs = np.asarray(tilted_marginal(jnp.float32([0.0, 3.0, 30.0]), jnp.ones(3), 1.0, 4.0))
    np.testing.assert_allclose(probs, [1 / 9, 4 / 9, 4 / 9], rtol=1e-5)


def test_lambda_zero_is_uniform_over_valid_rows():
    """λ = 0 leaves the data's distribution."""
    valid = jnp.float32([1, 0, 1, 1, 0])
    probs = tilted_marginal(jnp.float32([5.0, -3.0, 100.0, -100.0, 0.0]), valid, 0.0, 10.0)
    np.testing.assert_allclose(probs, valid / 3, rtol=1e-6)


@pytest.mark.parametrize("pattern", [[1e4, -1e4, 0], [-1e4, -1e4 - 1, -1e4], [1e4, 1e4, 1e4 + 1]])
def test_extreme_advantages_stay_finite(pattern):
    """λ A = ±1e4 neither overflows nor leaves only zeros, in the marginal and in the coupling."""
    advantages = np.resize(np.float32(pattern), 16)
    probs = np.asarray(tilted_marginal(jnp.asarray(advantages), jnp.ones(16), 1.0, 10.0))
    logits = np.minimum(advantages, np.log(10))
    expected = np.exp(logits - logits.max())
    np.testing.assert_allclose(probs, expected / expected.sum(), rtol=1e-3)
    actions = problem(16, 2)[2]
    noise, index, info = draw_pairs("ot", "iid", actions, actions, probs)
    assert all(np.isfinite(leaf).all() for leaf in [noise, *info.values()])
    assert np.all(probs[index] > 0)


def test_invalid_rows_have_no_mass():
    """The best advantage on an invalid row counts for nothing, not even in the clamp's scale; no valid row: zeros."""
    probs = np.asarray(tilted_marginal(jnp.float32([1e4, 0.0, 0.0]), jnp.float32([0, 1, 1]), 1.0, 1e30))
    np.testing.assert_allclose(probs, [0, 0.5, 0.5])
    assert np.array_equal(tilted_marginal(jnp.float32([1.0, 2.0]), jnp.zeros(2), 1.0, 10.0), [0, 0])


# ---- the plan


@pytest.mark.check
def test_squared_distances():
    """Against a direct computation, with and without a mask on the second argument."""
    rng = np.random.default_rng(0)
    x, y, mask = rng.normal(size=(4, 3)), rng.normal(size=(5, 3)), (rng.random((5, 3)) < 0.6).astype(float)
    difference = (x[:, None] - y[None]) ** 2
    x, y, y_mask = (jnp.asarray(array) for array in (x, y, mask))
    np.testing.assert_allclose(squared_distances(x, y), difference.sum(-1), atol=1e-5)
    np.testing.assert_allclose(squared_distances(x, y, y_mask), (difference * mask[None]).sum(-1), atol=1e-5)


@pytest.mark.check
@pytest.mark.parametrize(
    ("size", "width", "marginal", "alpha", "epsilon"),
    [
        (1, 5, "uniform", 1.0, 0.1),
        (2, 25, "random", 1.0, 0.1),
        (16, 5, "zeros", 0.0, 0.1),
        (64, 5, "random", 3.0, 0.2),
        (64, 25, "zeros", 1.0, 0.05),
        (64, 105, "uniform", 0.5, 0.02),
        (256, 105, "zeros", 1.0, 0.1),
        (512, 25, "random", 1.0, 0.1),
    ],
)
def test_plan_agrees_with_pot_sinkhorn(size, width, marginal, alpha, epsilon):
    """Marginals to 1e-3, entries as POT's with ε relative to the action term alone, diagnostics as computed here."""
    arrays = problem(size, width, marginal)
    plan, info = solve(*arrays, alpha=alpha, epsilon=epsilon, max_iterations=2000, threshold=1e-4)
    plan, probs = np.asarray(plan, np.float64), normalised(arrays[-1])
    assert np.isfinite(plan).all()
    assert np.all(plan >= 0)
    assert np.abs(plan.sum(1) - 1 / size).sum() < 1e-3
    assert np.abs(plan.sum(0) - probs).sum() < 1e-3
    assert np.all(plan[:, probs == 0] == 0)
    assert info["capped"] == 0

    action_cost, condition_cost = costs(*arrays[:4])
    keep = probs > 0
    cost = (action_cost + alpha**2 * condition_cost)[:, keep]
    uniform = np.full(size, 1 / size)
    method = "sinkhorn_log" if alpha > 1 else "sinkhorn"
    reference = ot.sinkhorn(
        uniform, probs[keep], cost, epsilon * action_cost.mean(), method=method, numItermax=10_000, stopThr=1e-6
    )
    assert np.abs(plan[:, keep] - reference).sum() < 5e-3
    np.testing.assert_allclose(info["marginal_error"], np.abs(plan.sum(0) - probs).sum(), atol=1e-5)
    ratio = np.sum(plan * action_cost) / (uniform @ action_cost @ probs)
    np.testing.assert_allclose(info["transport_cost"], ratio, rtol=1e-3)


@pytest.mark.parametrize(("width", "marginal"), [(5, "random"), (25, "zeros"), (105, "uniform")])
def test_small_epsilon_agrees_with_linear_programming(width, marginal):
    """The plan's cost comes within 1 % of the exact optimum of POT's network simplex, and not below it."""
    arrays = problem(48, width, marginal)
    # Potentials are 1 / ε = 500 times ε, and so are float32's errors in log Γ: about 1e-4 is the least to be had.
    plan, info = solve(*arrays, alpha=0.7, epsilon=2e-3, max_iterations=20_000, threshold=5e-4)
    action_cost, condition_cost = costs(*arrays[:4])
    cost = action_cost + 0.49 * condition_cost
    optimum = np.sum(cost * ot.emd(np.full(48, 1 / 48), normalised(arrays[-1]), cost))
    assert info["capped"] == 0
    assert optimum * (1 - 1e-3) < np.sum(cost * np.asarray(plan)) < optimum * 1.01


def test_vanishing_epsilon_gives_the_assignment():
    """Equal weights, α = 0: each noise goes to the action scipy assigns to it."""
    noise, source, actions, conditions, probs = problem(32, 5, "uniform")
    plan, _ = solve(
        noise, source, actions, conditions, probs, alpha=0.0, epsilon=1e-3, max_iterations=50_000, threshold=1e-4
    )
    rows, columns = scipy.optimize.linear_sum_assignment(costs(noise, source, actions, conditions)[0])
    assert np.array_equal(np.asarray(plan).argmax(1), columns)
    assert np.asarray(plan)[rows, columns].sum() > 0.9


def test_source_marginal():
    """A source marginal with zeros is met too: such rows are empty, the others exact."""
    noise, _, actions, conditions, probs = problem(32, 5, "zeros")
    plan, _ = solve(
        noise, conditions, actions, conditions, probs, alpha=1.0, epsilon=0.1, max_iterations=500, threshold=1e-4,
        source_probs=jnp.asarray(probs),
    )  # fmt: skip
    plan = np.asarray(plan)
    probs = np.asarray(probs)
    assert np.abs(plan.sum(1) - probs).sum() < 1e-3
    assert np.abs(plan.sum(0) - probs).sum() < 1e-3
    assert np.all(plan[probs == 0] == 0)


def test_plan_reports_the_iteration_cap():
    """Too few iterations for a small ε: `capped`, with the marginal error to show for it."""
    arrays = problem(64, 5)
    for max_iterations, capped in [(10, 1), (5000, 0)]:
        _, info = solve(*arrays, alpha=1.0, epsilon=0.01, max_iterations=max_iterations, threshold=1e-3)
        assert info["capped"] == capped
        assert (info["marginal_error"] > 1e-3) == bool(capped)
        assert (info["iterations"] == max_iterations) == bool(capped)


def test_padding_has_no_say_in_the_plan():
    """Values under a zero of action_mask change neither the plan nor ε; values under a one do."""
    noise, source, actions, conditions, probs = (np.asarray(x) for x in problem(32, 6))
    mask = np.ones_like(actions)
    mask[::3, 4:] = 0

    def plan_of(values):
        return np.asarray(
            solve(
                noise, source, values, conditions, probs, alpha=1.0, epsilon=0.1, max_iterations=200, threshold=1e-4,
                action_mask=mask,
            )[0]
        )  # fmt: skip

    plan = plan_of(actions)
    np.testing.assert_allclose(plan_of(np.where(mask == 0, 0.7, actions)), plan, atol=1e-6)
    assert np.abs(plan_of(np.where(mask == 1, 0.7, actions)) - plan).sum() > 0.1
    cost = (((noise[:, None] - actions[None]) ** 2) * mask[None]).sum(-1).astype(np.float64)
    reference = ot.sinkhorn(
        np.full(32, 1 / 32), normalised(probs), cost + costs(noise, source, actions, conditions)[1], 0.1 * cost.mean()
    )
    assert np.abs(plan - reference).sum() < 5e-3


# ---- sampling


@pytest.mark.check
def test_sample_conditional_draws_from_the_rows():
    """Frequencies follow each row, whatever its total; a column without mass is never drawn."""
    rng = np.random.default_rng(0)
    plan = rng.exponential(size=(6, 9)) * rng.exponential(size=(6, 1))
    plan[:, [0, 4, 8]] = 0
    plan[0, 1:3] = 0
    keys = jax.random.split(jax.random.key(0), 20_000)
    draws = np.asarray(jax.vmap(sample_conditional, (0, None))(keys, jnp.float32(plan)))
    for row in range(6):
        counts, expected = np.bincount(draws[:, row], minlength=9), plan[row] / plan[row].sum() * 20_000
        assert np.all(counts[plan[row] == 0] == 0)
        assert scipy.stats.chisquare(counts[plan[row] > 0], expected[plan[row] > 0]).pvalue > 1e-3
    pair = np.corrcoef(draws[:, 4], draws[:, 5])[0, 1]  # rows are drawn independently
    assert abs(pair) < 0.03


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24, 1.0])
def test_sample_conditional_at_the_ends(monkeypatch, u):
    """The extreme uniform numbers give the first and the last column that has mass."""
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype: jnp.full(shape, u, dtype))
    plan = jnp.float32([[0, 0.1, 0.2, 0], [0.3, 0, 0, 0], [0, 0, 0, 1e-8]])
    expected = [1, 0, 3] if u == 0 else [2, 0, 3]
    assert np.array_equal(sample_conditional(jax.random.key(0), plan), expected)


@pytest.mark.check
def test_categorical_draws_as_jax_does():
    """The draws of jax.random.choice, to the bit; what has no mass is not drawn."""
    probs = jnp.asarray([0.0, 0.5, 0.0, 0.3, 0.2, 0.0] * 30) / 30
    for seed in range(3):
        index = categorical(jax.random.key(seed), probs)
        np.testing.assert_array_equal(index, jax.random.choice(jax.random.key(seed), 180, (180,), p=probs))
        assert np.all(np.asarray(probs)[index] > 0)


def test_systematic_resample():
    """Counts within one of m·p on every draw, right on average, in random order; never a zero."""
    rng = np.random.default_rng(0)
    probs = normalised(rng.exponential(size=20) * (np.arange(20) % 3 > 0))
    keys = jax.random.split(jax.random.key(0), 2000)
    draws = np.asarray(jax.vmap(systematic_resample, (0, None))(keys, jnp.float32(probs)))
    counts = np.stack([np.bincount(row, minlength=20) for row in draws])
    assert np.all(np.abs(counts - 20 * probs) < 1 + 1e-4)
    assert np.all(counts[:, probs == 0] == 0)
    np.testing.assert_allclose(counts.mean(0), 20 * probs, atol=0.06)
    first = np.bincount(draws[:, 0], minlength=20)
    assert scipy.stats.chisquare(first[probs > 0], 2000 * probs[probs > 0]).pvalue > 1e-3


# ---- principal components

components = jax.jit(principal_components, static_argnums=1)


@pytest.mark.parametrize(("size", "width"), [(30, 8), (12, 50)])
def test_principal_components_equal_numpy(size, width):
    """Scores of a singular value decomposition, scaled to unit variance, up to their signs."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(size, width)) * 2.0 ** -np.arange(width) + 5
    scores = np.asarray(components(jnp.float32(features), 4))
    left, singular, right = np.linalg.svd(features - features.mean(0), full_matrices=False)
    expected = (features - features.mean(0)) @ right[:4].T
    np.testing.assert_allclose(expected, left[:, :4] * singular[:4], atol=1e-9)
    expected /= expected.std(0)
    np.testing.assert_allclose(scores, expected * np.sign((scores * expected).sum(0)), atol=2e-3)
    np.testing.assert_allclose(scores.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(scores.T @ scores / size, np.eye(4), atol=1e-4)


def test_principal_components_of_what_does_not_vary():
    """No noise is blown up to unit variance: equal features, and directions beyond the rank, are zero."""
    rng = np.random.default_rng(1)
    assert np.all(np.asarray(components(jnp.full((10, 6), 3.7), 4)) == 0)
    flat = rng.normal(size=(20, 2)) @ rng.normal(size=(2, 9)) + 4
    scores = np.asarray(components(jnp.float32(flat), 5))
    np.testing.assert_allclose(scores.std(0), [1, 1, 0, 0, 0], atol=1e-4)
    assert components(jnp.float32(flat[:3]), 5).shape == (3, 3)
