"""95 % intervals: of success rates, of means over seeds, and of statistics over seeds and tasks."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Real

RESAMPLES = 10_000
Statistic = Callable[[Float[np.ndarray, "*s runs"]], Float[np.ndarray, "..."]]


def wilson_interval(
    rate: float | Float[np.ndarray, "*b"], count: float | Real[np.ndarray, "*#b"], z: float = 1.96
) -> tuple[float | Float[np.ndarray, "*b"], float | Float[np.ndarray, "*b"]]:
    """Returns Wilson's score interval of a success rate, 95 % at z = 1.96.

    Args:
        rate: successes / count, in [0, 1].
        count: number of episodes, > 0.

    Returns:
        (lower, upper), within [0, 1].
    """
    # scipy.stats.binomtest takes single counts only, and its z of 1.95996 would change recorded bounds.
    centre = rate + z**2 / (2 * count)
    half = z * np.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return (centre - half) / (1 + z**2 / count), (centre + half) / (1 + z**2 / count)


def t_interval(values: Float[np.ndarray, " seeds *b"]) -> tuple[Float[np.ndarray, "*b"], Float[np.ndarray, "*b"]]:
    """Returns the mean over seeds and half the width of its 95 % t-interval, which is NaN for one seed."""
    count, mean = len(values), np.asarray(values.mean(axis=0))
    if count == 1:
        return mean, np.full_like(mean, np.nan)
    from scipy.stats import t as student  # Importing it takes most of a second.

    return mean, np.asarray(student.ppf(0.975, count - 1) * values.std(axis=0, ddof=1) / np.sqrt(count))


def bootstrap(
    strata: Sequence[Float[np.ndarray, " _ *s"]], statistic: Statistic
) -> tuple[Float[np.ndarray, "..."] | float, Float[np.ndarray, "..."] | float] | None:
    """Returns the 95 % percentile interval of a statistic, with runs resampled within each stratum (task).

    The generator's seed is fixed: the same values give the same interval.

    Args:
        strata: each [runs, …].
        statistic: maps resamples of all strata's runs, […, runs], to […].

    Returns:
        (lower, upper), or None if a stratum has one run only, whose spread is unknown.
    """
    if not strata or min(len(stratum) for stratum in strata) < 2:
        return None
    from scipy import stats  # Importing it takes most of a second.

    found = stats.bootstrap(
        tuple(strata),
        lambda *samples, axis: statistic(np.concatenate(samples, axis=axis)),
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return found.confidence_interval.low, found.confidence_interval.high


def scalar_bootstrap(strata: Sequence[Float[np.ndarray, " _"]], statistic: Statistic) -> tuple[float, float] | None:
    """Returns `bootstrap`'s interval of a statistic that is one number."""
    ends = bootstrap(strata, statistic)
    return (float(ends[0]), float(ends[1])) if ends else None


def mean_over_runs(samples: Float[np.ndarray, "*s runs"]) -> Float[np.ndarray, "*s"]:
    """Returns the mean over runs, a `Statistic` for `bootstrap`."""
    return samples.mean(axis=-1)


def iqm(samples: Float[np.ndarray, "*s runs"]) -> Float[np.ndarray, "*s"]:
    """Returns the interquartile mean over runs, a `Statistic`: a quarter, rounded down, is cut off at each end."""
    from scipy import stats

    return np.asarray(stats.trim_mean(samples, 0.25, axis=-1))
