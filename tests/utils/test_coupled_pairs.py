"""The coupling's pairs: their marginals, source conditions, padding, and settings that are traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from coupling_problems import BATCHES, compiled_couple, config, draw_pairs, normalised, problem, solve

from utils.coupling import SOURCE_CONDITIONS, couple, systematic_resample

VARIANTS = [("ot", source) for source in SOURCE_CONDITIONS] + [("independent", "iid")]


@pytest.mark.check
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
