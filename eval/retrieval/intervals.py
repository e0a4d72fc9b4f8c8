"""95 % intervals of means and of paired differences over queries that are correlated within their group.

Treating queries as independent makes intervals too narrow (1.44 points became 0.59 with six queries per
group), and percentiles of a cluster bootstrap collapse near 0 and 100 % and with few groups. Both methods
here were chosen by
simulation: benchmarks/intervals.md.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

from data_prep.tables import counted

LEVEL = 0.95
RESAMPLES, CHUNK = 2000, 100  # of the permutation test
PRIOR_CORRELATION = 0.3  # within groups, with the weight of one group; see design_effect()
UNSEEN_CORRELATION = 0.6  # within groups where all queries have one outcome
FEW_GROUPS = 20


class Interval(NamedTuple):
    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """The second model minus the first, on the same queries; `p` is two-sided."""

    value: float
    low: float
    high: float
    p: float


def mean_interval(values: np.ndarray, groups: np.ndarray, level: float = LEVEL) -> Interval:
    """The mean of `values` with its interval.

    Where all values are in 0 to 1 (hits, reciprocal ranks): Wilson's score interval on the effective sample
    size n / design effect, with a quantile of Student's t (Wilson 1927; Dean and Pagano 2015,
    doi:10.1093/jssam/smv024, compare such intervals for clustered data). It is not empty at 0 or 100 %.
    Elsewhere a t interval with the cluster-robust variance.

    Args:
        values: float [n], one per query.
        groups: int64 [n], the group of each query.
        level: probability that such an interval covers the true value.
    """
    values = np.asarray(values, float)
    sums, sizes = _by_group(values, groups)
    n, mean = sizes.sum(), float(values.mean())
    if values.min() < 0 or values.max() > 1:
        half = stats.t.ppf((1 + level) / 2, max(1, len(sums) - 1)) * np.sqrt(_variance(sums, sizes))
        # No mean is outside of the values: a mean rank is at least 1.
        return Interval(mean, float(max(values.min(), mean - half)), float(min(values.max(), mean + half)))
    # Groups in which the rarer of the two outcomes occurs; with few of them the variance itself is uncertain.
    informative = min(int((sums > 0).sum()), int((sums < sizes).sum()))
    effective_n = n / design_effect(sums, sizes, informative)
    freedom = min(len(sums) - 1, 2 * informative + 2) if informative else len(sums) - 1
    t = stats.t.ppf((1 + level) / 2, max(1, freedom))
    center = (mean + t**2 / (2 * effective_n)) / (1 + t**2 / effective_n)
    half = (
        t * np.sqrt(mean * (1 - mean) / effective_n + t**2 / (4 * effective_n**2)) / (1 + t**2 / effective_n)
    )
    return Interval(
        mean, float(max(0.0, min(mean, center - half))), float(min(1.0, max(mean, center + half)))
    )


def design_effect(sums: np.ndarray, sizes: np.ndarray, informative: int) -> float:
    """How many times larger the variance of a mean in 0 to 1 is than with independent queries, at least 1.

    The estimate is shrunk towards PRIOR_CORRELATION, with the weight of one group against `informative` ones:
    with few hits in few groups it is a matter of luck whether two of them share a group.

    Args:
        sums, sizes: float [groups].
    """
    n, mean = sizes.sum(), sums.sum() / sizes.sum()
    correlation = PRIOR_CORRELATION if informative else UNSEEN_CORRELATION
    prior = 1 + correlation * ((sizes**2).sum() / n - 1)
    independent = mean * (1 - mean) / n
    estimate = _variance(sums, sizes) / independent if independent > 0 else prior
    weight = informative / (informative + 1)
    return max(1.0, weight * estimate + (1 - weight) * prior)


def paired_difference(
    first: np.ndarray, second: np.ndarray, groups: np.ndarray, level: float = LEVEL, seed: int = 0
) -> Difference:
    """The mean of second - first with its interval, and the p-value of no difference.

    Pairing removes the difficulty of the queries, which both models share. The interval is Student's t with
    the cluster-robust variance, plus half a query that changed in each direction (Agresti and Min 2005,
    doi:10.1002/sim.1781), so that few changes do not make it empty. p is that of a permutation test that
    flips the sign of whole groups (Fisher 1935; (1 + hits) / (1 + flips), Phipson and Smyth 2010,
    arXiv:1603.05766).

    Args:
        first, second: float [n], one per query, of two models on the same queries.
        groups: int64 [n].
        seed: of the permutations.
    """
    assert len(first) == len(second) == len(groups), (len(first), len(second), len(groups))
    change = np.asarray(second, float) - np.asarray(first, float)
    sums, sizes = _by_group(change, groups)
    value = float(change.mean())
    variance = _variance(sums, sizes) + 1 / sizes.sum() ** 2
    half = stats.t.ppf((1 + level) / 2, max(1, len(sums) - 1)) * np.sqrt(variance)
    # What cannot be exceeded: of two values in 0 to 1, for example, the difference is in -1 to 1.
    largest = max(np.max(first), np.max(second)) - min(np.min(first), np.min(second), 0)
    half = min(half, max(largest, 1) - abs(value))
    rng, hits = np.random.default_rng(seed), 0
    for _ in range(0, RESAMPLES, CHUNK):
        flips = rng.choice((-1.0, 1.0), (CHUNK, len(sums)))
        hits += int((np.abs(flips @ sums) >= abs(sums.sum()) * (1 - 1e-12)).sum())
    return Difference(value, float(value - half), float(value + half), (1 + hits) / (1 + RESAMPLES))


def cautions(n_groups: int, differences: dict[str, Difference] | None = None) -> list[str]:
    """What a reader of intervals must know, as sentences; often none.

    Args:
        n_groups: groups of queries.
        differences: by the name of the metric.
    """
    sentences = []
    if n_groups < FEW_GROUPS:
        sentences.append(f"Only {counted(n_groups, 'group')} of queries: intervals are wide, and rough.")
    for name, difference in (differences or {}).items():
        excludes_zero = difference.low > 0 or difference.high < 0
        if excludes_zero != (difference.p < 1 - LEVEL):
            interval = "excludes" if excludes_zero else "includes"
            sentences.append(
                f"{name}: the interval {interval} 0 and p is {difference.p:.3f}; so close to the limit,"
                " neither decides."
            )
    return sentences


def _by_group(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each group, float [groups]."""
    assert len(values) == len(groups) > 0, (len(values), len(groups))
    _, members = np.unique(groups, return_inverse=True)
    return np.bincount(members, np.asarray(values, float)), np.bincount(members).astype(float)


def _variance(sums: np.ndarray, sizes: np.ndarray) -> float:
    """Cluster-robust variance of the mean of all values, a ratio of sums (Cochran 1977, section 6.3)."""
    n, n_groups = sizes.sum(), len(sums)
    residuals = sums - sums.sum() / n * sizes
    return float((residuals**2).sum() / n**2 * n_groups / max(1, n_groups - 1))
