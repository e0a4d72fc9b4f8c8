"""Names for clusters of images, from the words of their captions."""

from collections.abc import Iterator, Sequence

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer

from data_prep.progress import progress
from eval.search.index import Index

ROWS_AT_ONCE = 8_192
LIFT, NAME_TERMS, MAX_TERMS, TERM_CHARACTERS = 2.0, 3, 8, 40
# scikit-learn's English stop words also contain up, down, top, bottom and fire, which distinguish images.
FUNCTION_WORDS = "a an and are as at be by for from in into is it its of on or that the their this to with"


def terms_of(index: Index, members: Sequence[np.ndarray]) -> list[list[str]]:
    """The words and pairs of words that distinguish each cluster, best first; empty without captions.

    By class-based TF-IDF (Grootendorst, BERTopic, 2022, arXiv:2203.05794): frequency of a term in the
    cluster, times log(1 + terms per cluster / frequency in all). A term counts once per image. The formula
    alone favours words that are frequent everywhere, so terms that are not LIFT times as frequent in the
    cluster as in all come last.

    Args:
        members: int64, the images of each cluster.
    """
    analyze = CountVectorizer(ngram_range=(1, 2), stop_words=FUNCTION_WORDS.split()).build_analyzer()

    def terms(numbers: np.ndarray) -> Iterator[str]:
        for start in range(0, len(numbers), ROWS_AT_ONCE):
            for row in index.rows(numbers[start : start + ROWS_AT_ONCE]):
                yield from {term for caption in row["captions"] for term in analyze(caption)}

    if not any(True for numbers in members for _ in terms(numbers)):
        return [[] for _ in members]
    vectorizer = CountVectorizer(analyzer=terms)
    counts = vectorizer.fit_transform(progress(members, desc="names", unit="cluster", delay=1)).tocsr()
    in_all, vocabulary = np.asarray(counts.sum(0)).ravel(), vectorizer.get_feature_names_out()
    rarity, n = np.log1p(counts.sum() / len(members) / in_all), sum(map(len, members))
    best = []
    for numbers, row in zip(members, counts, strict=True):
        is_specific = row.data / len(numbers) >= LIFT * in_all[row.indices] / n
        best.append(_best_terms(vocabulary[row.indices], row.data * rarity[row.indices], is_specific))
    return best


def _best_terms(terms: np.ndarray, scores: np.ndarray, is_specific: np.ndarray) -> list[str]:
    """At most 3 * MAX_TERMS terms, specific ones first; none shares a word with a better one."""
    best, words = [], set()
    lengths = [-term.count(" ") for term in terms]  # of equal scores, the longer term comes first
    for position in np.lexsort((terms, lengths, -scores, ~is_specific)):
        term = str(terms[position])
        if words.isdisjoint(term.split()):
            best.append(term)
            words.update(term.split())
            if len(best) == 3 * MAX_TERMS:
                break
    return best


def distinct_names(terms: Sequence[Sequence[str]]) -> list[str]:
    """A name for each cluster: its best terms, more of them if the name is taken, at last with its number."""
    names: list[str] = []
    for number, best in enumerate(terms, 1):
        short = [term[:TERM_CHARACTERS] for term in best]
        lengths = range(NAME_TERMS, max(NAME_TERMS, len(short)) + 1) if short else ()
        choices = [", ".join(short[:length]) for length in lengths]
        fallback = f"{choices[0]} ({number})" if choices else f"cluster {number}"
        name = next((choice for choice in choices if choice not in names), fallback)
        names.append(name if name not in names else f"{name} ({number})")
    return names
