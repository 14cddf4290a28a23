import numpy as np
import pytest
from scipy import stats

from utils.output.intervals import (
    bootstrap,
    iqm,
    mean_over_runs,
    scalar_bootstrap,
    t_interval,
    wilson_interval,
)


@pytest.mark.check
def test_wilson_interval():
    lower, upper = wilson_interval(np.array([0.0, 0.5, 1.0]), np.array([50.0, 50.0, 50.0]))
    np.testing.assert_allclose(lower, [0, 0.3664, 0.9287], atol=1e-4)
    np.testing.assert_allclose(upper, [0.0713, 0.6336, 1], atol=1e-4)


def test_wilson_interval_agrees_with_scipy():
    for successes, episodes in ((0, 50), (7, 50), (3, 16), (25, 25)):
        expected = stats.binomtest(successes, episodes).proportion_ci(method="wilson")
        np.testing.assert_allclose(wilson_interval(successes / episodes, episodes), expected, atol=1e-5)


def by_hand(strata, statistic, resamples=4_000):
    """The stratified percentile bootstrap, one resample a loop."""
    generator = np.random.default_rng(7)
    values = [statistic(np.concatenate([generator.choice(own, len(own)) for own in strata])) for _ in range(resamples)]
    return np.quantile(values, [0.025, 0.975])


def middle_half(values):
    cut = len(values) // 4
    return np.mean(sorted(values)[cut : len(values) - cut])


def test_bootstrap_agrees_with_one_by_hand_and_resamples_within_tasks():
    values = np.random.default_rng(3).normal(size=12)
    got = bootstrap([values], mean_over_runs)
    np.testing.assert_allclose(got, by_hand([values], np.mean), atol=0.04)
    assert got == bootstrap([values], mean_over_runs)
    # No spread within tasks: none in the interval, however far the tasks are apart.
    np.testing.assert_allclose(bootstrap([np.zeros(3), np.ones(3)], mean_over_runs), [0.5, 0.5])
    assert bootstrap([values, np.ones(1)], mean_over_runs) is None
    lower, upper = bootstrap([np.stack([values, values + 1], axis=1)], mean_over_runs)
    np.testing.assert_allclose([lower[0], upper[0]], got)
    np.testing.assert_allclose([lower[1], upper[1]], np.array(got) + 1)


def test_the_interval_of_an_iqm_agrees_with_one_by_hand():
    generator = np.random.default_rng(5)
    strata = [np.clip(generator.normal(centre, 0.1, size), 0, 1) for centre, size in ((0.2, 5), (0.6, 8), (0.9, 4))]
    np.testing.assert_allclose(iqm(np.concatenate(strata)), middle_half(np.concatenate(strata)))
    np.testing.assert_allclose(scalar_bootstrap(strata, iqm), by_hand(strata, middle_half), atol=0.02)


def test_interval_is_students():
    mean, half = t_interval(np.array([[1.0, 4.0], [2.0, 4.0], [3.0, 4.0]]))
    np.testing.assert_allclose(mean, [2, 4])
    np.testing.assert_allclose(half, [4.3027 / 3**0.5, 0], atol=1e-4)
    assert np.isnan(t_interval(np.ones((1, 2)))[1]).all()
