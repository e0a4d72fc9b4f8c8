"""Retrieval metrics from features, by counting: no matrix of all images by all texts is ever held.

The definition: text queries are the distinct captions. What is relevant to a query is every member of its
    group; a
query's rank is 1 + the number of irrelevant items above its best relevant one, where items whose scores are
within TIE stand in any order with equal chance. R@k is the share of queries with a rank of k or better: the
hit rate.

    scores tile [rows, texts] = image_features[rows] @ text_features.T      one fp32 product for both directions
"""

from dataclasses import dataclass

import numpy as np
import torch

from data_prep.errors import NotFinite
from eval.retrieval.metrics import KS, expected_hit, expected_rank, expected_reciprocal_rank
from train.world import World

# The same product differs by up to 5e-7 between tile shapes; scores closer than this are tied.
TIE = 1e-6
ROWS, COLUMNS = 512, 4096  # of the scores held at once: 8 MB, and large enough for a product at full speed


class Relevance:
    """Which texts are relevant to which images: those that a member of the image's group has as a caption.

    Args:
        image_groups: int64 [n_images].
        text_of, group_of: int64 [pairs], "text text_of[i] is a caption in group group_of[i]".
    """

    def __init__(self, image_groups: np.ndarray, text_of: np.ndarray, group_of: np.ndarray):
        pairs = np.unique(np.stack([group_of, text_of]), axis=1)
        self._texts = pairs[1]
        self._starts = np.searchsorted(pairs[0], image_groups, side="left")
        self.texts_per_image = np.searchsorted(pairs[0], image_groups, side="right") - self._starts
        self.n_images, self.n_texts = len(image_groups), int(text_of.max()) + 1
        groups, sizes = np.unique(image_groups, return_counts=True)
        at = np.searchsorted(groups, pairs[0]).clip(max=len(groups) - 1)
        members = np.where(groups[at] == pairs[0], sizes[at], 0)
        self.images_per_text = np.bincount(pairs[1], weights=members, minlength=self.n_texts).astype(np.int64)
        assert self.texts_per_image.min() > 0, "an image without a relevant text cannot be a query"
        assert self.images_per_text.min() > 0, "a text without a relevant image cannot be a query"

    @classmethod
    def diagonal(cls, n: int) -> "Relevance":
        """The instance definition of model cards: text i belongs to image i, and to no other."""
        return cls(np.arange(n), np.arange(n), np.arange(n))

    def all_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 images and texts of every relevant pair, sorted by image."""
        rows, columns = self.pairs(0, self.n_images)
        return rows.numpy(), columns.numpy()

    def pairs(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 rows (from 0 at `start`) and columns of the relevant entries in the tile of images start to
        stop.
        """
        counts = self.texts_per_image[start:stop]
        rows = np.repeat(np.arange(stop - start), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        columns = self._texts[np.repeat(self._starts[start:stop], counts) + within]
        return torch.from_numpy(rows), torch.from_numpy(columns)


@dataclass(frozen=True)
class Ranks:
    """Counts of one direction, int64 [queries]; see eval.retrieval.metrics for what becomes of them."""

    above: np.ndarray  # irrelevant items clearly above the best relevant one
    tied: np.ndarray  # irrelevant items tied with it
    matching: np.ndarray  # relevant items tied with it, itself included

    @property
    def pessimistic(self) -> np.ndarray:
        """1-based ranks with ties counted against the query."""
        return 1 + self.above + self.tied

    @property
    def optimistic(self) -> np.ndarray:
        """1-based ranks with ties counted for the query."""
        return 1 + self.above


def ranks(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    relevance: Relevance,
    world: World | None = None,
    tile: int = 0,
) -> tuple[Ranks, Ranks]:
    """Ranks image_to_text and text_to_image.

    Args:
        image_features: fp32 [n_images, d], L2-normed, all of them on every rank; texts likewise.
        world: its ranks share the tiles, and all get the result.
        tile: images scored at once.
    """
    world, tile = world or World(), tile or ROWS
    n_images, n_texts = len(image_features), len(text_features)
    assert (n_images, n_texts) == (relevance.n_images, relevance.n_texts), (
        n_images,
        n_texts,
        relevance.n_images,
        relevance.n_texts,
    )
    tiles = [(start, min(start + tile, n_images)) for start in range(0, n_images, tile)][
        world.rank :: world.world_size
    ]
    device = image_features.device

    # The best relevant score of every query, from the relevant pairs alone; TIE covers how they round.
    best_of_image = torch.full([n_images], -torch.inf, device=device)
    best_of_text = torch.full([n_texts], -torch.inf, device=device)
    for start, stop in tiles:
        rows, columns = (index.to(device) for index in relevance.pairs(start, stop))
        for part in torch.arange(len(rows), device=device).split(1 << 10):
            row, column = rows[part] + start, columns[part]
            score = (image_features[row] * text_features[column]).sum(1)
            best_of_image.scatter_reduce_(0, row, score, "amax")
            best_of_text.scatter_reduce_(0, column, score, "amax")
    world.max(best_of_image)
    world.max(best_of_text)

    # Counts of irrelevant items at or above, and clearly above, each query's best; and of relevant ones at
    # it.
    image_counts = torch.zeros(3, n_images, dtype=torch.int64, device=device)
    text_counts = torch.zeros(3, n_texts, dtype=torch.int64, device=device)
    for start, stop in tiles:
        all_rows, all_columns = (index.to(device) for index in relevance.pairs(start, stop))
        for first in range(0, n_texts, COLUMNS):
            last = min(first + COLUMNS, n_texts)
            here = (all_columns >= first) & (all_columns < last)
            row, column = all_rows[here], all_columns[here] - first
            scores = image_features[start:stop] @ text_features[first:last].T
            relevant = scores[row, column]
            of_images, of_texts = image_counts[:, start:stop], text_counts[:, first:last]
            for which, tie in enumerate((-TIE, TIE)):
                image_bar, text_bar = best_of_image[start:stop] + tie, best_of_text[first:last] + tie
                image_hits, text_hits = (
                    (relevant >= image_bar[row]).long(),
                    (relevant >= text_bar[column]).long(),
                )
                of_images[which] += _at_least(scores, image_bar[:, None], 1)
                of_images[which].index_add_(0, row, -image_hits)
                of_texts[which] += _at_least(scores, text_bar, 0)
                of_texts[which].index_add_(0, column, -text_hits)
                if not which:
                    of_images[2].index_add_(0, row, image_hits)
                    of_texts[2].index_add_(0, column, text_hits)
    return _ranks(world.sum(image_counts)), _ranks(world.sum(text_counts))


def _at_least(scores: torch.Tensor, bar: torch.Tensor, dim: int) -> torch.Tensor:
    """How many scores reach their bar, along `dim`: int64. On the CPU by numpy, whose counting takes a tenth
    of torch's.
    """
    if scores.device.type != "cpu":
        return (scores >= bar).sum(dim)
    reached = scores.numpy() >= bar.numpy()
    if dim == 1:
        return torch.tensor([np.count_nonzero(row) for row in reached], dtype=torch.int64)
    return torch.from_numpy(
        reached.sum(0, dtype=np.uint16 if len(reached) < 1 << 16 else np.int64).astype(np.int64)
    )


def _ranks(counts: torch.Tensor) -> Ranks:
    at_or_above, above, matching = counts.cpu().numpy()
    return Ranks(above, at_or_above - above, np.maximum(matching, 1))


def positions(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    query_of: np.ndarray,
    item_of: np.ndarray,
    world: World | None = None,
    without_self: bool = False,
    tile: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Where every relevant item of every query stands: what eval.retrieval.metrics.set_measures wants.

    Args:
        queries: fp32 [queries, d], L2-normed, all of them on every rank; the gallery [items, d] likewise.
        query_of, item_of: int64 [pairs], sorted by query: the relevant items.
        without_self: queries and gallery are the same, and nothing counts as its own neighbor.

    Returns:
        int64 [pairs] each: items more than TIE above the relevant one, and items within TIE of it, itself
        included.
    """
    world, tile = world or World(), tile or max(64, ROWS * COLUMNS // len(gallery))
    counts = torch.zeros(2, len(query_of), dtype=torch.int64, device=queries.device)
    relevant = np.bincount(query_of, minlength=len(queries))
    starts = np.cumsum(relevant) - relevant
    for start in range(0, len(queries), tile)[world.rank :: world.world_size]:
        stop = min(start + tile, len(queries))
        scores = queries[start:stop] @ gallery.T
        if without_self:
            scores[torch.arange(stop - start), torch.arange(start, stop)] = -torch.inf
        for nth in range(
            relevant[start:stop].max(initial=0)
        ):  # the nth relevant item of each query that has as many
            rows = np.flatnonzero(relevant[start:stop] > nth)
            pairs = starts[start + rows] + nth
            at = torch.from_numpy(rows).to(scores.device)
            some = scores if len(rows) == len(scores) else scores[at]
            bar = scores[at, torch.from_numpy(item_of[pairs]).to(scores.device)][:, None]
            above, at_or_above = (
                _at_least(some, torch.nextafter(bar + TIE, bar + 1), 1),
                _at_least(some, bar - TIE, 1),
            )
            counts[:, torch.from_numpy(pairs).to(counts.device)] = torch.stack([above, at_or_above - above])
    above, tied = world.sum(counts).cpu().numpy()
    return above, tied


def first_of(above: np.ndarray, tied: np.ndarray, query_of: np.ndarray, n_queries: int) -> Ranks:
    """The Ranks of each query, from the `positions` of all its relevant items."""
    best = np.full(n_queries, np.iinfo(np.int64).max)
    np.minimum.at(best, query_of, above)
    at_best = above == best[query_of]
    matching = np.bincount(query_of[at_best], minlength=n_queries)
    items = np.zeros(n_queries, np.int64)
    np.maximum.at(items, query_of[at_best], tied[at_best])
    assert matching.min() > 0, "a query without a relevant item"
    return Ranks(best, np.maximum(items - matching, 0), matching)


def query_values(found: Ranks) -> dict[str, np.ndarray]:
    """What each query scores, float [queries] each: R@1, R@5, R@10, rank, reciprocal_rank, with ties in
    expectation.
    """
    counts = found.above, found.tied, found.matching
    return {
        **{f"R@{k}": expected_hit(*counts, k) for k in KS},
        "rank": expected_rank(*counts),
        "reciprocal_rank": expected_reciprocal_rank(*counts),
    }


def summarize(found: Ranks) -> dict[str, float]:
    """R@k as fractions, mean and median rank and MRR, ties in expectation.

    `tied` is the share of queries that tie with an irrelevant item; `R@1_gap` is how much R@1 would fall if
    ties went against the model, plus what it would rise if they went for it."""
    values = query_values(found)
    return {
        **{f"R@{k}": float(values[f"R@{k}"].mean()) for k in KS},
        "mean_rank": float(values["rank"].mean()),
        "median_rank": float(np.median(values["rank"])),
        "MRR": float(values["reciprocal_rank"].mean()),
        "tied": float((found.tied > 0).mean()),
        "R@1_gap": float((found.optimistic == 1).mean() - (found.pessimistic == 1).mean()),
    }


def chance(relevant: np.ndarray, gallery: int) -> dict[str, float]:
    """What guessing scores: the expectation over random orders of the gallery.

    Args:
        relevant: int64 [queries], relevant items of each query in a gallery of `gallery` items.
    """
    values = {}
    miss, drawn = np.ones(len(relevant)), 0
    for k in KS:
        while drawn < k:  # drawing without putting back: P(no relevant one among k)
            miss = miss * np.clip(gallery - relevant - drawn, 0, None) / max(gallery - drawn, 1)
            drawn += 1
        values[f"R@{k}"] = float((1 - miss).mean())
    values["mean_rank"] = float(((gallery + 1) / (relevant + 1)).mean())
    return values


def check_finite(features: torch.Tensor, what: str, names) -> None:
    """Raise NotFinite, naming the first row of `features` [n, d] that is not finite; its name is names(row)."""
    bad = (~torch.isfinite(features).all(1)).nonzero().flatten()
    if len(bad):
        raise NotFinite(
            f"{len(bad)} of {len(features)} {what} are not finite, the first is that of {names(int(bad[0]))};"
            " there is nothing to rank"
        )
