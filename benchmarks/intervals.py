"""Coverage of the 95 % intervals of eval.retrieval.intervals on simulated clustered queries.

    python -m benchmarks.intervals                   the tables of intervals.md
    python -m benchmarks.intervals --repeats 500     a fifth of the time

Groups have 1 to 12 queries. A group's own hit rate is drawn from a beta distribution with mean p, so that two
queries of a group are correlated by `correlation`. Coverage is the share of simulated data sets whose
interval contains p.
"""

import argparse

import numpy as np

from data_prep.tables import markdown_table
from eval.retrieval.intervals import mean_interval, paired_difference

RATES, GROUPS, CORRELATIONS = (0.002, 0.02, 0.3, 0.99), (10, 30, 100, 600), (0.0, 0.2, 0.5, 0.9)


def group_rates(rng: np.random.Generator, n_groups: int, rate: float, correlation: float) -> np.ndarray:
    if correlation == 0:
        return np.full(n_groups, rate)
    concentration = 1 / correlation - 1
    return rng.beta(rate * concentration, (1 - rate) * concentration, n_groups)


def simulated_groups(rng: np.random.Generator, n_groups: int) -> np.ndarray:
    return np.repeat(np.arange(n_groups), rng.integers(1, 13, n_groups))


def mean_coverage(rate: float, n_groups: int, correlation: float, repeats: int) -> tuple[float, float]:
    """Coverage, and the share of data sets without a hit or without a miss: there an interval can only be
    one.
    """
    rng, covered, uniform = np.random.default_rng(0), 0, 0
    for _ in range(repeats):
        groups = simulated_groups(rng, n_groups)
        hits = rng.random(len(groups)) < group_rates(rng, n_groups, rate, correlation)[groups]
        _, low, high = mean_interval(hits.astype(float), groups)
        covered += low <= rate <= high
        uniform += bool(hits.all() or not hits.any())
    return covered / repeats, uniform / repeats


def difference_coverage(rate: float, n_groups: int, correlation: float, gain: float, repeats: int) -> float:
    """Coverage of the difference of two models that answer four fifths of the queries by the same luck."""
    rng, covered = np.random.default_rng(1), 0
    large = group_rates(rng, 1_000_000, rate, correlation)
    true = (np.clip(large + gain, 0, 1) - large).mean()
    for _ in range(repeats):
        groups = simulated_groups(rng, n_groups)
        chance = group_rates(rng, n_groups, rate, correlation)[groups]
        luck = rng.random(len(groups))
        other = np.where(rng.random(len(groups)) < 0.8, luck, rng.random(len(groups)))
        scores = (luck < chance).astype(float), (other < np.clip(chance + gain, 0, 1)).astype(float)
        _, low, high, _ = paired_difference(*scores, groups)
        covered += low <= true <= high
    return covered / repeats


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=2500)
    repeats = parser.parse_args().repeats
    rows = []
    for correlation in CORRELATIONS:
        for n_groups in GROUPS:
            cells = [mean_coverage(rate, n_groups, correlation, repeats) for rate in RATES]
            texts = [f"{coverage:.3f}" + ("*" if uniform > 0.2 else "") for coverage, uniform in cells]
            rows.append([f"{correlation:g}, {n_groups}", *texts])
    print(markdown_table(["correlation, groups", *(f"p = {100 * rate:g} %" for rate in RATES)], rows))
    print("\n* more than a fifth of these data sets have no hit, or no miss\n")
    rows = []
    for n_groups in (10, 15, *GROUPS[1:]):
        cases = [(rate, gain) for rate in (0.02, 0.3, 0.9) for gain in (0.0, 0.05)]
        texts = [f"{difference_coverage(rate, n_groups, 0.5, gain, repeats):.3f}" for rate, gain in cases]
        rows.append([str(n_groups), *texts])
    titles = [f"p = {100 * rate:g} %, gain {100 * gain:g}" for rate, gain in cases]
    print(markdown_table(["groups", *titles], rows))


if __name__ == "__main__":
    main()
