"""What exact words add to vectors: R@1 and R@10 of queries with part numbers and names, and of sentences.

  python -m benchmarks.words rank INDEX --split val
  python -m benchmarks.words cost
      seconds to read the words of 100 thousand images, and milliseconds of a query

Each group of the index gets a made-up part number and supplier, each image a made-up year. Each number is in
three series (AX-0017, BX-0017, CX-0017), so its parts alone do not find it. Queries are captions of the
split, alone or with these; the images of the split are searched. A caption that is a query is also in the
index, so the captions of the query's whole group are held out of the words: these can only mislead there.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import psutil
import torch
import tyro

from data_prep.cli import run_commands
from data_prep.errors import exit_on_user_error
from data_prep.progress import progress
from data_prep.tables import markdown_table
from eval.retrieval.intervals import mean_interval, paired_difference
from eval.search.index import Index, filter_rows, open_index
from eval.search.nearest import Nearest
from eval.search.query import text_query
from eval.search.words import Words, exact_words, tokens, top

DEPTH, RRF_K, LISTED = 10, 60, 100
VECTORS, OURS = "vectors", "eval search"
SYLLABLES = ("ka", "lo", "mi", "ren", "du", "sal", "tor", "vi", "ne", "po", "gar", "bel")


class Query(NamedTuple):
    text: str
    group: int
    made_up: str  # the words of the query that its images have beside their captions


class HeldOut(Words):
    """Words of a corpus without the captions of the query's group: of its images, only `made_up` is known."""

    query: Query

    def __init__(self, index: Index, texts: list[list[str]]):
        super().__init__(index)
        self._texts = texts
        self._make()

    def texts(self) -> Iterator[list[str]]:
        return iter(self._texts)

    def among(self, words: Iterable[str]) -> list[str]:
        """Those that an image has, what is held out aside."""
        known = [word for word in dict.fromkeys(words) if word in self._ids]
        return known if known and self.scores(known).any() else []

    def known(self, text: str) -> list[str]:
        return self.among(exact_words(text))

    def scores(self, known: Sequence[str]) -> np.ndarray:
        scores, own = super().scores(known), self.index.group_of == self.query.group
        scores[own] = 0
        if made_up := [word for word in known if word in set(tokens(self.query.made_up))]:
            scores[own] = super().scores(made_up)[own]
        return scores


def rrf(cosines: np.ndarray, bm25: np.ndarray) -> np.ndarray:
    """Reciprocal rank fusion (Cormack et al. 2009, doi:10.1145/1571941.1572114) of both lists."""
    fused = np.zeros(len(cosines))
    for scores, listed in ((cosines, len(cosines)), (bm25, int((bm25 > 0).sum()))):
        order = np.argsort(-scores, kind="stable")[:listed]
        fused[order] += 1 / (RRF_K + 1 + np.arange(listed))
    return fused


def dbsf(cosines: np.ndarray, bm25: np.ndarray) -> np.ndarray:
    """Distribution-based score fusion: each list of the best is scaled by its mean and three deviations."""
    fused = np.zeros(len(cosines))
    for scores, listed in ((cosines, LISTED), (bm25, min(LISTED, int((bm25 > 0).sum())))):
        order = np.argsort(-scores, kind="stable")[:listed]
        mean, deviation = scores[order].mean(), max(scores[order].std(), 1e-9)
        fused[order] += np.clip((scores[order] - mean + 3 * deviation) / (6 * deviation), 1e-6, 1)
    return fused


def weighted(weight: float) -> Callable:
    return lambda cosines, bm25: cosines + weight * bm25 / max(bm25.max(), 1e-9)


FUSIONS = {"RRF": rrf, "DBSF": dbsf, **{f"sum, {weight}": weighted(weight) for weight in (0.3, 1.0, 2.0)}}


def query_sets(index: Index, rows: np.ndarray, limit: int) -> tuple[dict[str, list[Query]], list[list[str]]]:
    """The queries by kind, and the texts of each image with what is made up."""
    rng = np.random.default_rng(0)
    all_rows = index.rows(range(len(index)))
    group_of = index.group_of.tolist()
    groups = np.unique(group_of)
    part_of = {group: f"{'ABC'[at % 3]}X-{at // 3:04d}" for at, group in enumerate(groups.tolist())}
    names = {group: "".join(rng.choice(SYLLABLES, 4)).capitalize() for group in groups.tolist()}
    years = rng.integers(2015, 2025, len(index)).tolist()
    texts = [
        [part_of[group], names[group], str(year), *row["captions"]]
        for row, group, year in zip(all_rows, group_of, years, strict=True)
    ]
    chosen = {}
    for number in np.flatnonzero(rows).tolist():
        for caption in all_rows[number]["captions"]:
            chosen.setdefault((caption, group_of[number]), years[number])
    items = [(caption, group, year) for (caption, group), year in chosen.items()]
    items = [items[at] for at in np.sort(rng.permutation(len(items))[:limit])]
    plain = [item for item in items if not any(map(str.isdigit, item[0]))]
    sets = {
        "part number": [Query(part_of[group], group, part_of[group]) for _, group, _ in plain],
        "caption and part number": [
            Query(f"{caption} {part_of[group]}", group, part_of[group]) for caption, group, _ in plain
        ],
        "name in quotation marks": [Query(f'"{names[group]}"', group, names[group]) for _, group, _ in plain],
        "caption and year": [Query(f"{caption} {year}", group, str(year)) for caption, group, year in plain],
        "captions": [Query(caption, group, "") for caption, group, _ in plain],
        "sentences": [Query(f"icon of a {caption} on a web page", group, "") for caption, group, _ in plain],
        "captions with digits": [
            Query(caption, group, "") for caption, group, _ in items if any(map(str.isdigit, caption))
        ],
        "sentences with a digit": [
            Query(f"an icon of 2 {caption} on a web page", group, "") for caption, group, _ in plain
        ],
        "caption and a wrong year": [
            Query(f"{caption} {2015 + (year - 2014) % 10}", group, "") for caption, group, year in plain
        ],
    }
    return sets, texts


def ways(
    query: Query, nearest: Nearest, words: HeldOut, features: torch.Tensor, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """The groups of the first DEPTH images by each way of ranking.

    Args:
        features: fp32 [d] of the query.
        rows: bool [n], the images to search.
    """
    words.query, searched, index = query, np.flatnonzero(rows), nearest.index
    cosines = index.features[searched].astype(np.float32) @ features.numpy()
    vectors = np.argsort(-cosines, kind="stable")[:DEPTH]
    (hits,) = top(nearest, words, features[None], [query.text], DEPTH, rows, grouped=False)
    found = {VECTORS: searched[vectors], OURS: np.array([hit.number for hit in hits])}
    for which, known in (
        ("all words", words.among(tokens(query.text))),
        ("exact words", words.known(query.text)),
    ):
        bm25 = words.scores(known)[searched] if known else np.zeros(len(searched))
        for name, fuse in FUSIONS.items():
            fused = np.argsort(-fuse(cosines, bm25), kind="stable")[:DEPTH] if bm25.any() else vectors
            found[f"{which}, {name}"] = searched[fused]
    return {way: index.group_of[numbers] for way, numbers in found.items()}


class Drawn(Words):
    """The words of n images, drawn by Zipf's law, and a part number of each."""

    def __init__(self, n: int, length: int):
        super().__init__(range(n))  # of an index, only its length is asked
        self._drawn = np.random.default_rng(0).zipf(1.3, (n, length)) % 30_000

    def texts(self) -> Iterator[list[str]]:
        for number, drawn in enumerate(self._drawn.tolist()):
            yield [f"AX-{number}", " ".join(f"word{letter}" for letter in drawn)]


def cost(n: int = 100_000, length: int = 20) -> None:
    """Seconds and MB to read the words of n images, and milliseconds to score a query of three words."""
    words, process = Drawn(n, length), psutil.Process()
    begun, before = time.perf_counter(), process.memory_info().rss
    words.known("AX-1")
    made, held = time.perf_counter() - begun, process.memory_info().rss - before
    begun = time.perf_counter()
    for number in range(100):
        words.scores(words.known(f"AX-{number} word5 word1"))
    asked = time.perf_counter() - begun
    print(f"{n} images of {length} words: {made:.1f} s, {held >> 20} MB; a query {10 * asked:.1f} ms")


def rank(
    folder: Annotated[Path, tyro.conf.Positional], split: str = "val", model: str = "", limit: int = 500
) -> None:
    """R@1, R@10 with 95 % intervals, and the paired difference of R@1 to vectors, by kind of query.

    Args:
        folder: An index.
        split: Its images are searched, and their captions are the queries.
        model: The model of the index, if it has moved.
        limit: Number of captions.
    """
    index = open_index(folder)
    clip, nearest, rows = index.model(model), Nearest(index), filter_rows(index, [f"split={split}"])
    sets, texts = query_sets(index, rows, limit)
    words, lines, by_way = HeldOut(index, texts), [], {}
    for kind, queries in sets.items():
        features = torch.cat(
            [text_query(clip, [q.text for q in queries[at : at + 256]]) for at in range(0, len(queries), 256)]
        )
        found = [
            ways(query, nearest, words, feature, rows)
            for query, feature in zip(progress(queries, desc=kind), features, strict=True)
        ]
        groups = np.array([query.group for query in queries])
        hits = {  # 0.0 or 1.0 [queries, DEPTH]
            way: (np.stack([of_query[way] for of_query in found]) == groups[:, None]).astype(float)
            for way in found[0]
        }
        figures = [percent(mean_interval(hits[way][:, 0], groups)) for way in (VECTORS, OURS)]
        figures += [percent(mean_interval(hits[way].max(1), groups)) for way in (VECTORS, OURS)]
        change = paired_difference(hits[VECTORS][:, 0], hits[OURS][:, 0], groups)
        lines.append([kind, str(len(queries)), *figures, percent(change)])
        for way, hit in hits.items():
            by_way.setdefault(way, []).append(f"{100 * hit[:, 0].mean():.1f}")
    metrics = [f"{metric}, {way}" for metric in ("R@1", f"R@{DEPTH}") for way in (VECTORS, OURS)]
    columns = ["queries", "number", *metrics, "R@1, difference"]
    of_ways = markdown_table(["R@1", *sets], [[way, *values] for way, values in by_way.items()])
    print(f"{rows.sum()} images of {split}\n\n{markdown_table(columns, lines)}\n\n{of_ways}")


def percent(interval) -> str:
    return f"{100 * interval.value:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


if __name__ == "__main__":
    commands = {name: f"benchmarks.words:{name}" for name in ("rank", "cost")}
    exit_on_user_error(lambda: run_commands("python -m benchmarks.words", __doc__, commands))
