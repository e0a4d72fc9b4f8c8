"""What a query scores, from counts; ties are counted in expectation over the orders that they could have.

A query has three counts: `above`, irrelevant items clearly above its best relevant one; `tied`, irrelevant
    items
within eval.retrieval.ranking.TIE of it; `matching`, relevant items within TIE of it. A model that gives all
items one score gets what a random order gets, neither 0 nor 100 %.

A new metric: a function here, in FIRST_RELEVANT or all_relevant(), and its entry in train.metrics.METRICS.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from train.metrics import DIRECTIONS

KS = (1, 5, 10)
DEPTH = 10  # of nDCG


def expected_rank(above: np.ndarray, tied: np.ndarray, matching: np.ndarray) -> np.ndarray:
    """float [queries]: 1-based rank of the first relevant item; tied / (matching + 1) tied items come before
    it.
    """
    return 1 + above + tied / (matching + 1)


def expected_hit(above: np.ndarray, tied: np.ndarray, matching: np.ndarray, k: int) -> np.ndarray:
    """float [queries]: probability of a relevant item among the first k (hit rate, the R@k of papers)."""
    free_places = np.clip(k - above, 0, None)  # for the tied and matching items
    miss = np.ones(len(above))
    for drawn in range(k):  # without replacement: no relevant item in the first `free_places`
        irrelevant_share = np.clip(tied - drawn, 0, None) / np.maximum(tied + matching - drawn, 1)
        miss = np.where(drawn < free_places, miss * irrelevant_share, miss)
    return 1 - miss


def expected_reciprocal_rank(above: np.ndarray, tied: np.ndarray, matching: np.ndarray) -> np.ndarray:
    """float [queries]: expectation of 1 / rank."""
    cases, case_of = np.unique(np.stack([above, tied, matching]), axis=1, return_inverse=True)
    values = np.empty(cases.shape[1])
    for case, (n_above, n_tied, n_matching) in enumerate(cases.T.tolist()):
        # Probability that exactly `passed` tied items come before the first relevant one.
        probability, value = n_matching / (n_tied + n_matching), 0.0
        for passed in range(n_tied + 1):
            value += probability / (n_above + passed + 1)
            if passed < n_tied:
                probability *= (n_tied - passed) / (n_tied + n_matching - passed - 1)
        values[case] = value
    return values[case_of.ravel()]


# Metrics of a query's first relevant item: functions of (above, tied, matching); a metric is their mean.
FIRST_RELEVANT: dict[str, Callable[..., np.ndarray]] = {
    **{f"R@{k}": partial(expected_hit, k=k) for k in KS},
    "mean_rank": expected_rank,
    "MRR": expected_reciprocal_rank,
}


def all_relevant(
    above: np.ndarray, tied: np.ndarray, query_of: np.ndarray, n_queries: int
) -> dict[str, np.ndarray]:
    """Metrics of all relevant items of a query, float [queries] each: mAP, nDCG@10, recall@1, recall@5,
    recall@10.

    recall@k is the share of a query's relevant items that are among the first k. Relevance is binary.

    Args:
        above, tied: int64 [pairs], items clearly above a relevant item, and items tied with it, itself
            included.
        query_of: int64 [pairs], the query of each pair.

    Source: expectations over tied orders, McSherry and Najork 2008 (doi:10.1007/978-3-540-78646-7_38).
    """
    order = np.lexsort((above, query_of))
    above, tied, query_of = above[order].astype(float), tied[order].astype(float), query_of[order]
    n_relevant = np.bincount(query_of, minlength=n_queries).astype(float)
    # Relevant items of a query with as many items above them are tied with each other: one class.
    is_first = np.r_[True, (query_of[1:] != query_of[:-1]) | (above[1:] != above[:-1])]
    starts = np.flatnonzero(is_first)
    size = np.diff(np.r_[starts, len(above)]).astype(float)  # relevant items in the class
    query, before, items = query_of[starts], above[starts], np.maximum(tied[starts], size)
    relevant_before = starts - np.searchsorted(query_of, query)  # in the classes before
    step = (size - 1) / np.maximum(items - 1, 1)
    harmonic = np.r_[0, np.cumsum(1 / np.arange(1, (before + items).max() + 1))]
    spread = harmonic[(before + items).astype(int)] - harmonic[before.astype(int)]
    precision = size / items * (step * items + (relevant_before + 1 - step * (1 + before)) * spread)
    discounts = np.r_[0, np.cumsum(1 / np.log2(np.arange(2, DEPTH + 2)))]
    gain = size / items * (discounts[_within(before + items, DEPTH)] - discounts[_within(before, DEPTH)])
    ideal_gain = np.maximum(discounts[_within(n_relevant, DEPTH)], 1e-300)
    n_relevant = np.maximum(n_relevant, 1)
    values = {
        "mAP": np.bincount(query, precision, n_queries) / n_relevant,
        f"nDCG@{DEPTH}": np.bincount(query, gain, n_queries) / ideal_gain,
    }
    for k in KS:
        expected_items = np.clip((k - before) / items, 0, 1) * size
        values[f"recall@{k}"] = np.bincount(query, expected_items, n_queries) / n_relevant
    return values


def _within(ranks: np.ndarray, depth: int) -> np.ndarray:
    return np.clip(ranks, 0, depth).astype(int)


def instance_upper_bounds(captions: np.ndarray, images: np.ndarray) -> dict[str, float]:
    """The largest possible R@1 by instance in each direction, where pair i is image i with caption i.

    Equal captions are one query or tied items, and so are equal images; ties count in expectation. A query
    string (or image) that occurs in several pairs has one ranking for all of them, which at best puts the
    most frequent of its targets first.

    Args:
        captions: int64 [n], equal for equal captions.
        images: int64 [n], equal for images with the same bytes.
    """
    bounds = {}
    for direction, queries, targets in zip(DIRECTIONS, (images, captions), (captions, images), strict=True):
        pairs, n_pairs = np.unique(np.stack([queries, targets]), axis=1, return_counts=True)
        values, n_tied = np.unique(targets, return_counts=True)
        # of all queries, if this target comes first
        hits = n_pairs / n_tied[np.searchsorted(values, pairs[1])]
        starts = np.flatnonzero(np.r_[True, pairs[0][1:] != pairs[0][:-1]])
        bounds[direction] = float(np.maximum.reduceat(hits, starts).sum() / len(queries))
    return bounds


def chance(n_relevant: np.ndarray, n_gallery: int) -> dict[str, float]:
    """R@k and mean_rank of a random order of the gallery, in expectation.

    Args:
        n_relevant: int64 [queries], relevant items of each query in a gallery of `n_gallery` items.
    """
    values = {}
    miss, drawn = np.ones(len(n_relevant)), 0
    for k in KS:
        while drawn < k:  # without replacement: P(no relevant item among k)
            miss = miss * np.clip(n_gallery - n_relevant - drawn, 0, None) / max(n_gallery - drawn, 1)
            drawn += 1
        values[f"R@{k}"] = float((1 - miss).mean())
    values["mean_rank"] = float(((n_gallery + 1) / (n_relevant + 1)).mean())
    return values
