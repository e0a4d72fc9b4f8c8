"""Intervals contain the true value as often as they say, near 0 and 100 % and with few groups too.

benchmarks/intervals.md has the table for all rates, numbers of groups and correlations.
"""

import numpy as np
import pytest

from benchmarks.intervals import difference_coverage, group_rates, mean_coverage, simulated_groups
from eval.retrieval.intervals import cautions, mean_interval, paired_difference


@pytest.mark.parametrize(
    ("rate", "n_groups", "correlation"),
    [(0.02, 100, 0.5), (0.3, 10, 0.5), (0.99, 100, 0.2), (0.002, 600, 0.5), (0.3, 100, 0.0)],
)
def test_coverage_of_a_mean(rate, n_groups, correlation):
    """The percentiles of a cluster bootstrap have 0.80 to 0.89 in the first three."""
    coverage, _ = mean_coverage(rate, n_groups, correlation, repeats=800)
    assert 0.93 <= coverage <= 0.99


@pytest.mark.parametrize(("n_groups", "gain"), [(15, 0.05), (100, 0.05), (600, 0.0)])
def test_coverage_of_a_paired_difference(n_groups, gain):
    assert difference_coverage(0.3, n_groups, 0.5, gain, repeats=400) >= 0.91


def test_independent_queries_would_be_called_too_certain():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        groups = simulated_groups(rng, 100)
        hits = rng.random(len(groups)) < group_rates(rng, 100, 0.3, 0.5)[groups]
        _, low, high = mean_interval(hits.astype(float), np.arange(len(groups)))
        covered += low <= 0.3 <= high
    assert covered / 400 < 0.85


def test_no_hit_and_no_miss_leave_an_interval():
    groups = np.repeat(np.arange(50), 3)
    value, low, high = mean_interval(np.zeros(150), groups)
    assert (value, low) == (0, 0)
    assert 0.03 < high < 0.08  # three of 50 groups would be 6 %
    value, low, high = mean_interval(np.ones(150), groups)
    assert (value, high) == (1, 1)
    assert 0.92 < low < 0.97


def test_p_values_of_no_difference_are_uniform_enough_and_gains_are_found():
    rng, wrong, found = np.random.default_rng(1), 0, 0
    for seed in range(200):
        groups = np.repeat(np.arange(100), rng.integers(1, 5, 100))
        difficulty = rng.random(100)[groups]
        first, second, better = (
            (rng.random(len(groups)) < np.clip(difficulty + gain, 0, 1)).astype(float)
            for gain in (0, 0, 0.12)
        )
        wrong += paired_difference(first, second, groups, seed=seed).p < 0.05
        found += paired_difference(first, better, groups, seed=seed).p < 0.05
    assert wrong / 200 < 0.09
    assert found / 200 > 0.6


def test_pairing_is_tighter_than_two_intervals():
    rng = np.random.default_rng(2)
    groups = simulated_groups(rng, 200)
    first = (rng.random(len(groups)) < group_rates(rng, 200, 0.5, 0.5)[groups]).astype(float)
    second = np.where(rng.random(len(first)) < 0.05, 1 - first, first)
    paired, single = paired_difference(first, second, groups), mean_interval(first, groups)
    assert paired.high - paired.low < (single.high - single.low) / 2


def test_values_are_plain_means_and_the_order_of_queries_does_not_matter():
    rng = np.random.default_rng(3)
    groups = simulated_groups(rng, 40)
    values = rng.random(len(groups))
    assert mean_interval(values, groups).value == pytest.approx(values.mean())
    order = rng.permutation(len(groups))
    np.testing.assert_allclose(mean_interval(values[order], groups[order]), mean_interval(values, groups))
    same = paired_difference(values, values, groups)
    assert (same.value, same.p) == (0, 1)
    assert same.low == -same.high < 0  # one query of a few hundred may always have changed
    counts = rng.integers(0, 9, len(groups)).astype(float)  # not in 0 to 1
    value, low, high = mean_interval(counts, groups)
    assert low < value < high
    assert mean_interval(np.array([0.0, 1.0]), np.zeros(2)).high > 0.99  # one group tells nothing


def test_cautions():
    assert cautions(20) == []
    assert cautions(19) == ["Only 19 groups of queries: intervals are wide, and rough."]
    agreeing = paired_difference(np.zeros(400), np.ones(400), np.arange(400))
    assert cautions(400, {"R@1": agreeing}) == []
    (sentence,) = cautions(400, {"R@1": agreeing._replace(p=0.07)})
    assert sentence.startswith("R@1: the interval excludes 0 and p is 0.070")
