"""Names for clusters of pictures, from the words of their captions."""

from collections.abc import Iterator, Sequence

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer

from data_prep.progress import progress
from eval.search.index import Index

ROWS_AT_ONCE = 8_192
LIFT, NAME_TERMS, MOST_TERMS, TERM_CHARACTERS = 2.0, 3, 8, 40
# scikit-learn's list of English stop words would do, but it also has up, down, top, bottom and fire, which
# tell pictures apart.
FUNCTION_WORDS = "a an and are as at be by for from in into is it its of on or that the their this to with"


def terms_of(index: Index, members: Sequence[np.ndarray]) -> list[list[str]]:
    """Of each cluster the words and pairs of words of its captions that tell it apart, the best first; none
    where there are none.

    By class-based TF-IDF (Grootendorst, BERTopic, 2022, arXiv:2203.05794): how often a term is in the
    cluster, times log(1 + terms per cluster / how often it is in all). A term counts once for a picture. That
    formula alone likes words that are frequent everywhere, so those come last that are not LIFT times as
    frequent in the cluster as in all."""
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
        frequent = row.data / len(numbers) >= LIFT * in_all[row.indices] / n
        best.append(apart(vocabulary[row.indices], row.data * rarity[row.indices], frequent))
    return best


def apart(terms: np.ndarray, scores: np.ndarray, first: np.ndarray) -> list[str]:
    """The best terms, at most 3 * MOST_TERMS, those of `first` before the others; none shares a word with a
    better one.
    """
    chosen, words = [], set()
    for at in np.lexsort(
        (terms, [-term.count(" ") for term in terms], -scores, ~first)
    ):  # of equals the longer
        if words.isdisjoint(terms[at].split()):
            chosen.append(str(terms[at]))
            words.update(terms[at].split())
            if len(chosen) == 3 * MOST_TERMS:
                break
    return chosen


def distinct_names(terms: Sequence[Sequence[str]]) -> list[str]:
    """A name for each cluster: its best terms, more of them where a larger cluster has that name, and its
    number as a last resort.
    """
    names: list[str] = []
    for number, best in enumerate(terms, 1):
        short = [term[:TERM_CHARACTERS] for term in best]
        choices = (
            [", ".join(short[:count]) for count in range(NAME_TERMS, max(NAME_TERMS, len(short)) + 1)]
            if short
            else []
        )
        name = next(
            (each for each in choices if each not in names),
            f"{choices[0]} ({number})" if choices else f"cluster {number}",
        )
        names.append(name if name not in names else f"{name} ({number})")
    return names
