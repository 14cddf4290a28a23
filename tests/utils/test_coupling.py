"""The coupling: plans against POT and scipy, marginals, source conditions and sampling."""

from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
import scipy.optimize
import scipy.stats

from utils.coupling import (
    SOURCE_CONDITIONS,
    couple,
    principal_components,
    sample_conditional,
    solve_plan,
    squared_distances,
    systematic_resample,
    tilted_marginal,
)

# Compiled once for each shape.
solve = jax.jit(solve_plan, static_argnames="max_iterations")
BATCHES = 400
VARIANTS = [("ot", source) for source in SOURCE_CONDITIONS] + [("independent", "iid")]


def problem(size, width, marginal="random", seed=0):
    """Random noise, source conditions, actions, conditions [m, 3] and target marginal."""
    rng = np.random.default_rng([size, width, seed])
    probs = {"uniform": np.ones(size), "random": rng.exponential(size=size), "zeros": rng.exponential(size=size)}
    probs = probs[marginal]
    if marginal == "zeros":
        probs[rng.permutation(size)[: size // 2]] = 0
    probs /= probs.sum()
    conditions = rng.normal(size=(size, 3))
    source = conditions[rng.choice(size, size, p=probs)]
    arrays = rng.normal(size=(size, width)), source, np.clip(rng.normal(size=(size, width)), -1, 1), conditions, probs
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


def costs(noise, source, actions, conditions):
    """Action and condition terms of the cost, in float64."""
    noise, source, actions, conditions = (np.asarray(x, np.float64) for x in (noise, source, actions, conditions))
    return ot.dist(noise, actions), ot.dist(source, conditions)


def normalised(probs):
    """A marginal that sums to 1 in float64, as POT asks."""
    return np.asarray(probs, np.float64) / np.asarray(probs, np.float64).sum()


def config(**changes):
    """Settings of `couple`."""
    values = {"coupling": "ot", "source_conditions": "iid", "alpha": 1.0, "epsilon": 0.1, "max_iterations": 200}
    return SimpleNamespace(**values | {"threshold": 1e-3} | changes)


@cache
def compiled_couple(kind, source):
    """`couple` over a batch of keys, compiled once for each shape: the tests below share 16 rows and d = 2."""

    def run(keys, actions, conditions, probs, alpha, epsilon, mask):
        settings = config(coupling=kind, source_conditions=source, alpha=alpha, epsilon=epsilon)
        return jax.vmap(lambda key: couple(key, actions, conditions, probs, settings, mask))(keys)

    return jax.jit(run)


def draw_pairs(kind, source, actions, conditions, probs, alpha=1.0, epsilon=0.1, mask=None):
    """Noise [b, 16, 2], indices [b, 16] and diagnostics [b] of many batches, as NumPy arrays."""
    keys, mask = jax.random.split(jax.random.key(1), BATCHES), jnp.ones_like(actions) if mask is None else mask
    conditions = jnp.pad(conditions, ((0, 0), (0, 16 - conditions.shape[1])))  # one shape, one program
    arrays = compiled_couple(kind, source)(
        keys, actions, conditions, jnp.float32(probs), jnp.float32(alpha), jnp.float32(epsilon), mask
    )
    return jax.tree.map(np.asarray, arrays)


# ---- the tilted marginal


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
    valid = np.float32([1, 0, 1, 1, 0])
    probs = tilted_marginal(jnp.float32([5.0, -3.0, 100.0, -100.0, 0.0]), valid, 0.0, 10.0)
    np.testing.assert_allclose(probs, valid / 3, rtol=1e-6)


@pytest.mark.parametrize("pattern", [[1e4, -1e4, 0], [-1e4, -1e4 - 1, -1e4], [1e4, 1e4, 1e4 + 1]])
def test_extreme_advantages_stay_finite(pattern):
    """λ A = ±1e4 neither overflows nor leaves only zeros, in the marginal and in the coupling."""
    advantages = np.resize(np.float32(pattern), 16)
    probs = np.asarray(tilted_marginal(advantages, jnp.ones(16), 1.0, 10.0))
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


def test_squared_distances():
    """Against a direct computation, with and without a mask on the second argument."""
    rng = np.random.default_rng(0)
    x, y, mask = rng.normal(size=(4, 3)), rng.normal(size=(5, 3)), (rng.random((5, 3)) < 0.6).astype(float)
    difference = (x[:, None] - y[None]) ** 2
    np.testing.assert_allclose(squared_distances(x, y), difference.sum(-1), atol=1e-5)
    np.testing.assert_allclose(squared_distances(x, y, mask), (difference * mask[None]).sum(-1), atol=1e-5)


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


# ---- coupled pairs


@pytest.mark.parametrize(("kind", "source"), VARIANTS)
def test_pairs_have_the_right_marginals(kind, source):
    """Actions follow p and noise stays N(0, I), for every way to choose the source conditions; OT shortens the way."""
    _, _, actions, conditions, probs = problem(16, 2, "zeros")
    noise, index, info = draw_pairs(kind, source, actions, conditions, probs)
    actions, probs = np.asarray(actions), np.asarray(probs)
    shares = np.stack([np.bincount(row, minlength=16) for row in index]) / 16
    assert np.all(shares[:, probs == 0] == 0)
    # Batches are independent; within one, draws are stratified. The solver's threshold is a bias.
    errors = (shares.mean(0) - probs)[probs > 0]
    deviations = shares.std(0)[probs > 0] / np.sqrt(BATCHES)
    assert np.all(np.abs(errors) < 4 * deviations + 5e-4)
    for sample in (noise[:, 0, 0], noise[:, 5, 1], noise[:, 15, 0]):
        assert scipy.stats.kstest(sample, "norm").pvalue > 1e-3
    np.testing.assert_allclose(np.cov(noise.reshape(-1, 2).T), np.eye(2), atol=0.1)
    distance = np.mean(np.sum((noise - actions[index]) ** 2, -1))
    independent = 2 + np.sum(probs[:, None] * actions**2)
    if kind == "ot":
        assert distance < 0.95 * independent
    else:
        assert abs(distance / independent - 1) < 0.03
    np.testing.assert_allclose(info["effective_sample_size"], 1 / np.sum(probs**2) / 16, rtol=1e-4)
    np.testing.assert_allclose(info["distinct_actions"][:50], [len(np.unique(row)) / 16 for row in index[:50]])


def matching_bound(counts, probs):
    """The largest share of pairs with equal condition, Σ_j min(n_j / m, p_j), for drawn counts [..., m]."""
    return np.minimum(counts / len(probs), probs).sum(-1)


def test_strong_condition_term_reaches_the_matching_bound():
    """For given source conditions, the plan's mass on equal conditions comes to Σ_j min(n_j / m, p_j) as α grows.

    Conditions are equidistant here. Where some lie near others, chains of short moves cost less than one long move, and
    the optimal plan matches fewer than the bound.
    """
    noise, _, actions, _, probs = problem(64, 5)
    source, probs, conditions = (
        np.random.default_rng(0).choice(64, 64, p=normalised(probs)),
        normalised(probs),
        np.eye(64),
    )
    bound = matching_bound(np.bincount(source, minlength=64), probs)
    shares = []
    for alpha in (0.0, 1.0, 5.0):
        plan, info = solve(
            noise, conditions[source], actions, conditions, probs,
            alpha=alpha, epsilon=0.1, max_iterations=5000, threshold=1e-4,
        )  # fmt: skip
        assert info["capped"] == 0
        shares.append(np.asarray(plan)[np.arange(64), source].sum())
    assert shares[0] < 0.1 < shares[1] < bound - 0.02
    assert bound - 0.01 < shares[2] < bound + 1e-3


def test_matching_share_of_the_variants():
    """α large: i.i.d. conditions match up to their bound, systematic ones up to a higher one, the other two fully.

    In 'resampled' one row may stand several times on both sides; a pair of two of its copies matches.
    """
    _, _, actions, _, probs = problem(16, 2, "zeros")
    match = {
        source: draw_pairs("ot", source, actions, jnp.eye(16), probs, 3.0, 0.3)[-1]["condition_match"].mean()
        for source in SOURCE_CONDITIONS
    }
    iid = matching_bound(
        np.random.default_rng(0).multinomial(16, normalised(probs), size=4000), normalised(probs)
    ).mean()
    keys = jax.random.split(jax.random.key(5), BATCHES)
    draws = np.asarray(jax.vmap(systematic_resample, (0, None))(keys, probs))
    systematic = matching_bound(np.stack([np.bincount(row, minlength=16) for row in draws]), normalised(probs)).mean()
    assert systematic > iid + 0.05
    assert abs(match["iid"] - iid) < 0.02
    assert abs(match["systematic"] - systematic) < 0.02
    assert min(match["resampled"], match["weighted"]) > 0.999


@pytest.mark.parametrize(("kind", "source"), VARIANTS)
def test_no_valid_row(kind, source):
    """A batch without a valid row gives finite numbers; its pairs get zero weight in the loss."""
    actions = problem(16, 2)[2]
    noise, index, info = draw_pairs(kind, source, actions, actions, jnp.zeros(16))
    assert all(np.isfinite(leaf).all() for leaf in [noise, *info.values()])
    assert np.all((index >= 0) & (index < 16))


def test_padding_does_not_reach_the_pairs():
    """action_mask follows the rows when 'resampled' reorders them: padded values never change the pairs."""
    _, _, actions, conditions, probs = problem(16, 2, "zeros")
    for source in ("iid", "resampled"):
        mask = jnp.ones_like(actions).at[::3, 1:].set(0)
        one, two = (
            draw_pairs("ot", source, values, conditions, probs, mask=mask)[1]
            for values in (actions, jnp.where(mask == 0, 0.9, actions))
        )
        assert np.mean(one != two) < 1e-3  # the rounding of a cost moves a draw on a boundary
        assert np.mean(one != draw_pairs("ot", source, actions, conditions, probs)[1]) > 0.02


def test_couple_traces_its_float_settings():
    """Lanes vmapped over α and ε equal calls of one program with each value."""
    _, _, actions, _, probs = problem(16, 2, "zeros")
    keys, mask, conditions = jax.random.split(jax.random.key(1), BATCHES)[:20], jnp.ones((16, 2)), jnp.eye(16)
    program, alphas, epsilons = (
        compiled_couple("ot", "iid"),
        jnp.float32([0.1, 1.0, 3.0]),
        jnp.float32([0.05, 0.1, 0.5]),
    )
    _, index, info = jax.vmap(program, (None,) * 4 + (0, 0, None))(
        keys, actions, conditions, probs, alphas, epsilons, mask
    )
    matches = info["condition_match"].mean(1)
    assert matches[0] < matches[1] < matches[2]
    for i in range(3):
        _, alone, single = draw_pairs("ot", "iid", actions, conditions, probs, alphas[i], epsilons[i])
        assert np.mean(np.asarray(index[i]) != alone[:20]) < 0.01
        np.testing.assert_allclose(info["transport_cost"][i], single["transport_cost"][:20], rtol=1e-3)
    sizes = program._cache_size()
    draw_pairs("ot", "iid", actions, conditions, probs, jnp.float32(0.7), jnp.float32(0.2))
    assert program._cache_size() == sizes


def test_unknown_settings_are_refused():
    """Misspelt variants raise and name themselves."""
    actions = jnp.zeros((4, 2))
    for wrong in ({"coupling": "exact"}, {"source_conditions": "uniform"}):
        with pytest.raises(ValueError, match=next(iter(wrong.values()))):
            jax.eval_shape(lambda a, w=wrong: couple(jax.random.key(0), a, a, jnp.ones(4), config(**w)), actions)


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
