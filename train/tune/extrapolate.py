"""From the scores of short runs to the score of a long one.

The logit of R@1 is a line over the logarithm of the effective data, for which fewer groups and fewer epochs
both count. Of six curves (line through the last two runs, power law of the error, growth from the base, ...)
and three worths of a repeated pair, it has the smallest error at all the data and almost no bias there:
benchmarks/forecast.md, measured by benchmarks/extrapolation.py on simulated trainings.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import expit, logit
from scipy.stats import norm

LEVEL = 0.8
RESAMPLES, CHUNK = 2000, 100
REUSE = 15.4  # epochs, as fitted by Muennighoff et al.; see effective_data()
# Logits for each doubling of effective data between the largest short run and what is forecast: what the line
# is wrong by beside the luck of the val split, so that 80 % intervals cover as much (benchmarks/forecast.md).
MODEL_ERROR = 0.15


class Interval(NamedTuple):
    value: float
    low: float
    high: float


class Estimate(NamedTuple):
    """In logits, with its standard deviation."""

    value: float
    deviation: float

    def interval(self, before: float | None = None) -> Interval:
        """As a score; with `before`, a logit that it is added to, as the score that it adds."""
        half = norm.ppf((1 + LEVEL) / 2) * self.deviation
        ends = np.array([self.value, self.value - half, self.value + half])
        scores = expit(ends) if before is None else expit(before + ends) - expit(before)
        return Interval(*scores.tolist())


class Line(NamedTuple):
    """What short runs say about others, in logits.

    Attributes:
        x: float [n], log2 of each run's effective data, ascending.
        y: float [n], the logit of each run's score.
        resampled: float [RESAMPLES, n], the same on resampled groups of val.
    """

    x: np.ndarray
    y: np.ndarray
    resampled: np.ndarray


def effective_data(fraction: float, epochs: float) -> float:
    """What `epochs` over a fraction of the groups are worth, in passes over all groups: a repeated pair
    teaches less than a new one (Muennighoff et al. 2023, arXiv:2305.16264, equation 5).
    """
    return fraction * (1 + REUSE * (1 - np.exp(-(epochs - 1) / REUSE)))


def logits(scores: np.ndarray, n_queries: int) -> np.ndarray:
    """With half a query's distance from 0 and 1, where logits are infinite."""
    return logit(np.clip(scores, 0.5 / n_queries, 1 - 0.5 / n_queries))


def line_through(hits: np.ndarray, groups: np.ndarray, data: np.ndarray) -> Line:
    """Args:
    hits: float [n, queries], of the short runs; their means are the scores.
    groups: int64 [queries].
    data: float [n], of effective_data(), ascending.
    """
    n_queries = hits.shape[1]
    resampled = logits(bootstrap(hits, groups), n_queries)
    return Line(np.log2(data), logits(hits.mean(axis=1), n_queries), resampled)


def bootstrap(hits: np.ndarray, groups: np.ndarray, seed: int = 0) -> np.ndarray:
    """Scores on resampled groups of val, the same groups for all runs: float [RESAMPLES, n].

    Args:
        hits, groups: see line_through().
    """
    _, members = np.unique(groups, return_inverse=True)
    sums = np.stack([np.bincount(members, each) for each in hits], axis=1)
    sizes = np.bincount(members)
    rng, scores = np.random.default_rng(seed), []
    for _ in range(0, RESAMPLES, CHUNK):
        drawn = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), CHUNK)
        scores.append((drawn @ sums) / (drawn @ sizes)[:, None])
    return np.concatenate(scores)


def score_at(line: Line, data: float) -> Estimate:
    """The score of a run with so much effective data on this val split: the difficulty of its queries, which
    all runs share, is no error of it.
    """
    x = np.log2(data)
    spread = (least_squares(line.x, line.resampled, x) - line.resampled[:, -1]).std()
    return Estimate(
        float(least_squares(line.x, line.y, x)), float(np.hypot(spread, MODEL_ERROR * (x - line.x[-1])))
    )


def gain(line: Line, data: float, more: float) -> Estimate:
    """What effective data of `more` add to the score that `data` give, in logits."""
    change = np.log2(more / data)
    value, resampled = (
        least_squares(line.x, y, change) - least_squares(line.x, y, 0.0) for y in (line.y, line.resampled)
    )
    return Estimate(float(value), float(np.hypot(resampled.std(), MODEL_ERROR * change)))


def least_squares(x: np.ndarray, y: np.ndarray, at: float) -> np.ndarray:
    """The line through (x, y) at a place; each run weighs twice as much as the one before it.

    Args:
        x: float [n].
        y: float [..., n].
    """
    weights = 2.0 ** np.arange(len(x))
    weights /= weights.sum()
    from_mean = x - weights @ x
    return y @ weights + y @ (weights * from_mean) / (weights @ from_mean**2) * (at - weights @ x)
