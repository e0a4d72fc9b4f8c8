"""95 % intervals by bootstrap over groups, because queries of one group are correlated.

Resampling single queries makes intervals too narrow where groups have several members (1.44 points became
0.59)."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

RESAMPLES, CHUNK = 2000, 100


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


def mean_interval(values: np.ndarray, groups: np.ndarray, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean of `values` with its interval: percentiles over resampled groups.

    Args:
        values: float [n], one per query.
        groups: int64 [n], the group of each query.
        level: probability that such an interval covers the true value.
        seed: of the resampling.

    Source: cluster bootstrap, Field and Welsh 2007 (doi:10.1111/j.1467-9868.2007.00593.x), percentile
        interval.
    """
    sums, counts = _by_group(values, groups)
    means = []
    for weights in _resamples(len(sums), seed):
        means.append((weights @ sums) / (weights @ counts))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean(values)), float(low), float(high))


def paired_difference(
    first: np.ndarray, second: np.ndarray, groups: np.ndarray, level: float = 0.95, seed: int = 0
) -> Difference:
    """The mean of second - first with its interval, and the p-value of no difference.

    Pairing removes the difficulty of the queries, which both models share. p is that of a permutation test
    that flips the sign of whole groups (Fisher 1935; (1 + hits) / (1 + flips), Phipson and Smyth 2010,
    arXiv:1603.05766).

    Args:
        first, second: float [n], one per query, of two models on the same queries.
        groups: int64 [n].
    """
    assert len(first) == len(second) == len(groups), (len(first), len(second), len(groups))
    change = np.asarray(second, float) - np.asarray(first, float)
    value, low, high = mean_interval(change, groups, level, seed)
    sums, _ = _by_group(change, groups)
    rng, hits = np.random.default_rng(seed), 0
    for _ in range(0, RESAMPLES, CHUNK):
        flips = rng.choice((-1.0, 1.0), (CHUNK, len(sums)))
        hits += int((np.abs(flips @ sums) >= abs(sums.sum()) * (1 - 1e-12)).sum())
    return Difference(value, low, high, (1 + hits) / (1 + RESAMPLES))


def _by_group(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    assert len(values) == len(groups) > 0, (len(values), len(groups))
    _, members = np.unique(groups, return_inverse=True)
    return np.bincount(members, np.asarray(values, float)), np.bincount(members).astype(float)


def _resamples(n: int, seed: int) -> Iterator[np.ndarray]:
    """RESAMPLES draws of n groups, in chunks: how often each group is drawn, float [CHUNK, n]."""
    rng = np.random.default_rng(seed)
    for _ in range(0, RESAMPLES, CHUNK):
        drawn = rng.integers(0, n, (CHUNK, n)) + n * np.arange(CHUNK)[:, None]
        yield np.bincount(drawn.ravel(), minlength=CHUNK * n).reshape(CHUNK, n).astype(float)
