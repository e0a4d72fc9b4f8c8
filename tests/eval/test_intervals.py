"""Intervals hold the truth as often as they say, also where members of a group agree."""

import numpy as np
import pytest

from eval.retrieval.intervals import mean_interval, paired_difference


def hits(rng, n_groups: int, base: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Groups of 1 to 6 queries, of which a group's own chance decides: members agree."""
    groups = np.repeat(np.arange(n_groups), rng.integers(1, 7, n_groups))
    chances = np.clip(rng.beta(0.6, 0.6, n_groups) + base, 0, 1)
    return (rng.random(len(groups)) < chances[groups]).astype(float), groups


def test_coverage_over_simulated_groups():
    rng, inside, narrow = np.random.default_rng(0), 0, 0
    for seed in range(400):
        values, groups = hits(rng, 150, 0.0)
        low, high = mean_interval(values, groups, seed=seed)[1:]
        inside += low <= 0.5 <= high
        low, high = mean_interval(values, np.arange(len(values)), seed=seed)[1:]
        narrow += low <= 0.5 <= high
    assert 0.93 <= inside / 400 <= 0.97
    assert narrow / 400 < 0.9  # what resampling single queries would have claimed


def test_paired_differences_are_tighter_and_fair():
    rng, found, wrong = np.random.default_rng(1), [], 0
    for seed in range(200):
        groups = np.repeat(np.arange(100), rng.integers(1, 5, 100))
        hard = rng.random(100)[groups]
        first, second, better = (
            (rng.random(len(groups)) < np.clip(hard + gain, 0, 1)).astype(float) for gain in (0, 0, 0.12)
        )
        wrong += paired_difference(first, second, groups, seed=seed).p < 0.05
        found.append(paired_difference(first, better, groups, seed=seed))
    assert wrong / 200 < 0.09
    assert np.mean([difference.p < 0.05 for difference in found]) > 0.6
    assert np.mean([difference.low <= 0.113 <= difference.high for difference in found]) > 0.9
    first, groups = hits(rng, 200, 0.0)
    second = np.where(rng.random(len(first)) < 0.05, 1 - first, first)
    paired = paired_difference(first, second, groups)
    apart = mean_interval(first, groups)
    assert paired.high - paired.low < (apart.high - apart.low) / 2


def test_the_value_is_the_plain_mean_and_nothing_changes_nothing():
    values, groups = hits(np.random.default_rng(2), 40, 0.0)
    assert mean_interval(values, groups).value == pytest.approx(values.mean())
    assert mean_interval(values, groups) == mean_interval(values, groups)
    same = paired_difference(values, values, groups)
    assert same == (0, 0, 0, 1)
    order = np.random.default_rng(3).permutation(len(values))
    moved = mean_interval(values[order], groups[order])
    np.testing.assert_allclose(moved, mean_interval(values, groups), atol=1e-12)
