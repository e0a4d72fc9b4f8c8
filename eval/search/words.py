"""Exact words: part numbers and names, which CLIP cannot read, by BM25 beside the cosines.

    text -> features -> Nearest -> cosines
    text -> exact words -> BM25 over captions, columns, file names
    cosine + WEIGHT * BM25 / its maximum -> Hits

Exact words are those of four or more characters with a digit, and all words in quotation marks. A text
without one that the index knows is ranked by its features alone. Fusing all words of sentences made their
ranking worse (benchmarks/search.md). AX-4711 finds AX-4711/2 as well, after AX-4711 itself.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from threading import Lock

import numpy as np
import torch

from data_prep.errors import UserError
from data_prep.progress import progress
from eval.search.index import Index
from eval.search.nearest import CHUNK_VALUES, Hit, Nearest

try:
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG
except ImportError:
    bm25s = None

# Cosines are within -1 to 1: an image with all exact words comes before all images without one, and the
# cosine orders images with the same words.
WEIGHT = 2.0
LEAST_CHARACTERS = 4  # of a word with a digit; "2 arrows" and "3d cube" are sentences (benchmarks/search.md)
MAX_CHARACTERS, MAX_TOKENS = 8192, 512  # of an image: what exceeds them is not searched for words
ROWS_AT_ONCE = 4096
WHOLE, PART, QUOTED = re.compile(r"\S+"), re.compile(r"[^\W_]+"), re.compile(r'"([^"]*)"|“([^”]*)”')
SURROUNDING = "\"'“”‘’`.,;:!?()[]{}<>"
END = " "  # after a whole word that ends here, not in a longer one; a word has no white space


def tokens(text: str) -> Iterator[str]:
    """Words in lower case: each as a whole, and its parts, if it has several.

    "Bolt (M8x30), AB-1234/7" is bolt, m8x30, ab-1234/7, ab, 1234, 7.
    """
    for match in WHOLE.finditer(text.lower()):
        whole = match[0].strip(SURROUNDING)
        parts = PART.findall(whole)
        if parts and parts != [whole]:
            yield whole
        yield from parts


def indexed(text: str) -> Iterator[str]:
    """What an image with this text is found by: the tokens, and what words of several parts begin with.

    "AX-4711/2" is ax-4711/2, ax, 4711, 2, and also ax-4711, and ax-4711/2 with END.
    """
    for token in tokens(text):
        yield token
        if not token.isalnum():  # has several parts, or other signs
            yield token + END
            ends = [part.end() for part in PART.finditer(token)]
            yield from (token[:end] for end in ends[1:] if end < len(token))


def exact_words(text: str) -> list[str]:
    """The tokens of a query that must match: all in quotation marks, and elsewhere those with a digit and at
    least LEAST_CHARACTERS.
    """
    quoted = " ".join(one or other for one, other in QUOTED.findall(text))
    others = [token for token in tokens(QUOTED.sub(" ", text)) if len(token) >= LEAST_CHARACTERS]
    return list(
        dict.fromkeys([*tokens(quoted), *(token for token in others if any(map(str.isdigit, token)))])
    )


class Words:
    """BM25 of the words of an index: captions, columns and file names. It is made on first use, in memory.

    Robertson and Zaragoza 2009, doi:10.1561/1500000019, with the idf of Lucene, by bm25s (Lù 2024,
    arXiv:2407.03618). k1 is 0: a word counts once, in a text of any length, so that the cosine orders images
    with the same words. With k1 1.5 and b 0.75 short captions came first (benchmarks/search.md).
    """

    def __init__(self, index: Index):
        self.index = index
        self._lock, self._ids, self._bm25 = Lock(), {}, None

    def prepare(self) -> None:
        """Make it now, where bm25s is installed: for a million images it takes 20 seconds, which no
        visitor should wait for.
        """
        if bm25s is not None:
            self._make()

    def known(self, text: str) -> list[str]:
        """The exact words of a query that an image of the index has.

        Raises:
            UserError: The query has exact words, and bm25s is not installed.
        """
        exact = exact_words(text)
        if exact:
            self._make()
        return [word for word in exact if word in self._ids]

    def unknown(self, text: str) -> list[str]:
        """The exact words of a query that no image of the index has."""
        known = self.known(text)
        return [word for word in exact_words(text) if word not in known]

    def scores(self, known: Sequence[str]) -> np.ndarray:
        """BM25 of each image, fp32 [n]; 0 where it has none of the words. A word that only begins one of the
        image scores less than the word itself.
        """
        return self._bm25.get_scores([*known, *(word + END for word in known if word + END in self._ids)])

    def having(self, word: str) -> np.ndarray:
        """int32, the numbers of the images that have a known word, or one that begins with it."""
        at, matrix = self._ids[word], self._bm25.scores
        return matrix["indices"][matrix["indptr"][at] : matrix["indptr"][at + 1]]

    def texts(self) -> Iterator[list[str]]:
        """What is searched of each image, captions last: they may be long."""
        for start in range(0, len(self.index), ROWS_AT_ONCE):
            for row in self.index.rows(range(start, min(start + ROWS_AT_ONCE, len(self.index)))):
                name = PurePosixPath(row["path"] or row["key"]).stem
                yield [name, *filter(None, row["columns"].values()), *row["captions"]]

    def _make(self) -> None:
        with self._lock:
            if self._bm25:
                return
            if bm25s is None:
                raise UserError(
                    "words with a digit or in quotation marks are looked up by bm25s, which is not"
                    " installed; pip install bm25s, or search with --vectors-only"
                )
            n, bm25 = len(self.index), bm25s.BM25(k1=0, b=0)
            texts = progress(self.texts(), total=n, desc="reading words", unit="image", leave=False, delay=1)
            documents = [self._numbered(of_image) for of_image in texts]
            if self._ids:
                bm25.index((documents, self._ids), create_empty_token=False, show_progress=False)
            self._bm25 = bm25

    def _numbered(self, texts: Sequence[str]) -> list[int]:
        numbers, left = [], MAX_CHARACTERS
        for text in texts:
            for token in indexed(text[:left]):
                numbers.append(self._ids.setdefault(token, len(self._ids)))
                if len(numbers) == MAX_TOKENS:
                    return numbers
            left -= min(left, len(text))
        return numbers


def top(
    nearest: Nearest,
    words: Words | None,
    features: torch.Tensor,
    texts: Sequence[str],
    k: int,
    rows: np.ndarray | None = None,
    grouped: bool = True,
) -> list[list[Hit]]:
    """As Nearest.top, with the exact words of the texts: Hit.words are those that an image has.

    Args:
        words: None for the features alone.
        features: fp32 [q, d], L2-normed, of the texts.
    """
    results = nearest.top(features, k, rows, grouped)
    for number, text in enumerate(texts if words else ()):
        if known := words.known(text):
            results[number] = _fused(
                nearest.index, words, known, features[number], results[number], k, rows, grouped
            )
    return results


def _fused(
    index: Index,
    words: Words,
    known: Sequence[str],
    features: torch.Tensor,
    hits: list[Hit],
    k: int,
    rows: np.ndarray | None,
    grouped: bool,
) -> list[Hit]:
    """The k best by cosine and words: each is among the k best by cosine, or has one of the words."""
    scores = words.scores(known)
    scores *= WEIGHT / scores.max()
    searched = np.ones(len(index), bool) if rows is None else rows
    matching = np.flatnonzero((scores > 0) & searched)
    cosines = np.zeros(len(index), np.float32)
    cosines[matching] = _cosines(index, matching, features)
    numbers = np.array([hit.number for hit in hits])
    cosines[numbers] = [hit.score for hit in hits]
    numbers = np.union1d(numbers, matching)
    numbers = numbers[np.argsort(-(cosines + scores)[numbers], kind="stable")]
    groups = index.group_of if grouped else np.arange(len(index))
    best = numbers[np.sort(np.unique(groups[numbers], return_index=True)[1])[:k]]
    sizes, having = np.bincount(groups[searched]), [np.isin(best, words.having(word)) for word in known]
    return [
        Hit(
            int(number),
            float(cosines[number]),
            int(sizes[groups[number]]),
            tuple(word for word, has in zip(known, having, strict=True) if has[position]),
        )
        for position, number in enumerate(best)
    ]


def _cosines(index: Index, numbers: np.ndarray, features: torch.Tensor) -> np.ndarray:
    """fp32, of these images."""
    query = features.numpy() @ index.projection.matrix if index.projection else features.numpy()
    step = max(1, CHUNK_VALUES // len(query))
    parts = [index.decoded(numbers[start : start + step]) @ query for start in range(0, len(numbers), step)]
    return np.concatenate([np.zeros(0, np.float32), *parts])
