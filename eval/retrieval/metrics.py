"""From counts to numbers: what a query's place is worth, with ties in expectation over the orders they could
have.

A query is described by three counts: `above` irrelevant items clearly above its best relevant one, `tied`
    irrelevant
items and `matching` relevant ones within eval.retrieval.ranking.TIE of it. A model that gives all items one
score so gets what guessing gets, neither 0 nor 100 %."""

import numpy as np

KS = (1, 5, 10)
DEPTH = 10  # of nDCG


def expected_rank(above: np.ndarray, tied: np.ndarray, matching: np.ndarray) -> np.ndarray:
    """float [queries]: 1-based place of the first relevant item; tied / (matching + 1) of the tied ones come
    before it.
    """
    return 1 + above + tied / (matching + 1)


def expected_hit(above: np.ndarray, tied: np.ndarray, matching: np.ndarray, k: int) -> np.ndarray:
    """float [queries]: probability that a relevant item is among the first k (the hit rate, R@k of retrieval
    papers).
    """
    places = np.clip(k - above, 0, None)  # that are left for the tied and matching ones
    miss = np.ones(len(above))
    for drawn in range(k):  # without putting back: no relevant one in the first `places` of them
        left = np.clip(tied - drawn, 0, None) / np.maximum(tied + matching - drawn, 1)
        miss = np.where(drawn < places, miss * left, miss)
    return 1 - miss


def expected_reciprocal_rank(above: np.ndarray, tied: np.ndarray, matching: np.ndarray) -> np.ndarray:
    """float [queries]: expectation of 1 / rank."""
    cases, which = np.unique(np.stack([above, tied, matching]), axis=1, return_inverse=True)
    values = np.empty(cases.shape[1])
    for case, (before, wrong, right) in enumerate(cases.T.tolist()):
        chance, value = (
            right / (wrong + right),
            0.0,
        )  # that the first relevant item comes after `passed` tied ones
        for passed in range(wrong + 1):
            value += chance / (before + passed + 1)
            if passed < wrong:
                chance *= (wrong - passed) / (wrong + right - passed - 1)
        values[case] = value
    return values[which.ravel()]


def set_measures(
    above: np.ndarray, tied: np.ndarray, query_of: np.ndarray, n_queries: int
) -> dict[str, np.ndarray]:
    """Measures of all relevant items of a query, float [queries] each: AP, nDCG@10, recall@1, recall@5,
    recall@10.

    recall@k is the share of a query's relevant items that are among the first k. Relevance is yes or no.

    Args:
        above, tied: int64 [pairs], items clearly above a relevant item, and items tied with it, itself
            included.
        query_of: int64 [pairs], the query of each pair.

    Source: expectations over tied orders, McSherry and Najork 2008 (doi:10.1007/978-3-540-78646-7_38).
    """
    order = np.lexsort((above, query_of))
    above, tied, query_of = above[order].astype(float), tied[order].astype(float), query_of[order]
    relevant = np.bincount(query_of, minlength=n_queries).astype(float)
    # Relevant items of a query with as many items above them are tied with each other: one class.
    is_first = np.r_[True, (query_of[1:] != query_of[:-1]) | (above[1:] != above[:-1])]
    starts = np.flatnonzero(is_first)
    size = np.diff(np.r_[starts, len(above)]).astype(float)  # relevant items in the class
    query, before, items = query_of[starts], above[starts], np.maximum(tied[starts], size)
    found = starts - np.searchsorted(query_of, query)  # relevant items in the classes before
    step = (size - 1) / np.maximum(items - 1, 1)
    harmonic = np.r_[0, np.cumsum(1 / np.arange(1, (before + items).max() + 1))]
    spread = harmonic[(before + items).astype(int)] - harmonic[before.astype(int)]
    precision = size / items * (step * items + (found + 1 - step * (1 + before)) * spread)
    discounts = np.r_[0, np.cumsum(1 / np.log2(np.arange(2, DEPTH + 2)))]
    gain = size / items * (discounts[_within(before + items, DEPTH)] - discounts[_within(before, DEPTH)])
    total = np.maximum(relevant, 1)
    values = {
        "AP": np.bincount(query, precision, n_queries) / total,
        f"nDCG@{DEPTH}": (
            np.bincount(query, gain, n_queries) / np.maximum(discounts[_within(relevant, DEPTH)], 1e-300)
        ),
    }
    for k in KS:
        share = np.clip((k - before) / items, 0, 1) * size
        values[f"recall@{k}"] = np.bincount(query, share, n_queries) / total
    return values


def _within(places: np.ndarray, depth: int) -> np.ndarray:
    return np.clip(places, 0, depth).astype(int)


def ceiling(mates: np.ndarray) -> float:
    """The R@1 by instance of a perfect model: 1 / k where k images look alike or share a caption.

    Args:
        mates: int64 [queries], how many items are as right as the query's own, itself included.
    """
    return float((1 / mates).mean())
