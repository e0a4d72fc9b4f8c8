"""Ranks by counting, in tiles: the matrix of all images by all texts is never held.

Definition: text queries are the distinct captions. All members of a query's group are relevant to it. A
    query's
rank is 1 + the number of irrelevant items above its best relevant one; items whose scores are within TIE are
tied, and their order is random. R@k is the share of queries with a rank of k or better: the hit rate.

    scores tile [rows, texts] = image_features[rows] @ text_features.T    one fp32 product for both directions
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from data_prep.errors import NotFinite
from eval.retrieval.metrics import FIRST_RELEVANT
from train.world import World

# The same product differs by up to 5e-7 between tile shapes; scores closer than this are tied.
TIE = 1e-6
ROWS, COLUMNS = 512, 4096  # of the scores held at once: 8 MB, and large enough for a product at full speed


class Relevance:
    """Which texts are relevant to which images: the captions of all members of the image's group.

    Args:
        image_groups: int64 [n_images].
        text_of, group_of: int64 [pairs], text text_of[i] is a caption in group group_of[i].
    """

    def __init__(self, image_groups: np.ndarray, text_of: np.ndarray, group_of: np.ndarray):
        pairs = np.unique(np.stack([group_of, text_of]), axis=1)
        self._texts = pairs[1]
        self._starts = np.searchsorted(pairs[0], image_groups, side="left")
        self.texts_per_image = np.searchsorted(pairs[0], image_groups, side="right") - self._starts
        self.n_images, self.n_texts = len(image_groups), int(text_of.max()) + 1
        groups, sizes = np.unique(image_groups, return_counts=True)
        index = np.searchsorted(groups, pairs[0]).clip(max=len(groups) - 1)
        members = np.where(groups[index] == pairs[0], sizes[index], 0)
        self.images_per_text = np.bincount(pairs[1], weights=members, minlength=self.n_texts).astype(np.int64)
        assert self.texts_per_image.min() > 0, "an image without a relevant text cannot be a query"
        assert self.images_per_text.min() > 0, "a text without a relevant image cannot be a query"

    @classmethod
    def diagonal(cls, n: int) -> "Relevance":
        """The instance definition of model cards: text i is relevant to image i alone."""
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
    """Counts of one direction, int64 [queries]; eval.retrieval.metrics makes metrics of them."""

    above: np.ndarray  # irrelevant items clearly above the best relevant one
    tied: np.ndarray  # irrelevant items tied with it
    matching: np.ndarray  # relevant items tied with it, itself included

    @property
    def pessimistic(self) -> np.ndarray:
        """1-based ranks if every tie is decided against the query."""
        return 1 + self.above + self.tied

    @property
    def optimistic(self) -> np.ndarray:
        """1-based ranks if every tie is decided for the query."""
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
        image_features: fp32 [n_images, d], L2-normed, all of them on every rank.
        text_features: fp32 [n_texts, d], likewise.
        world: its ranks share the tiles, and all get the result.
        tile: images scored at once; ROWS by default.
    """
    world, tile = world or World(), tile or ROWS
    n_images, n_texts = len(image_features), len(text_features)
    assert n_images == relevance.n_images, (n_images, relevance.n_images)
    assert n_texts == relevance.n_texts, (n_texts, relevance.n_texts)
    tiles = [(start, min(start + tile, n_images)) for start in range(0, n_images, tile)]
    own_tiles = tiles[world.rank :: world.world_size]
    best = _best_relevant(image_features, text_features, relevance, own_tiles, world)
    counts = [torch.zeros(3, n, dtype=torch.int64, device=image_features.device) for n in (n_images, n_texts)]
    for start, stop in own_tiles:
        rows, columns = (index.to(image_features.device) for index in relevance.pairs(start, stop))
        for first in range(0, n_texts, COLUMNS):
            last = min(first + COLUMNS, n_texts)
            inside = (columns >= first) & (columns < last)
            scores = image_features[start:stop] @ text_features[first:last].T
            _count(
                scores,
                (rows[inside], columns[inside] - first),
                (best[0][start:stop], best[1][first:last]),
                (counts[0][:, start:stop], counts[1][:, first:last]),
            )
    return _ranks(world.sum(counts[0])), _ranks(world.sum(counts[1]))


def _best_relevant(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    relevance: Relevance,
    tiles: list[tuple[int, int]],
    world: World,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best relevant score of every image and of every text, fp32, from the relevant pairs alone.

    They may differ in the last digits from the same scores within a tile; TIE covers that.
    """
    device = image_features.device
    of_image = torch.full([len(image_features)], -torch.inf, device=device)
    of_text = torch.full([len(text_features)], -torch.inf, device=device)
    for start, stop in tiles:
        rows, columns = (index.to(device) for index in relevance.pairs(start, stop))
        for part in torch.arange(len(rows), device=device).split(1 << 10):
            row, column = rows[part] + start, columns[part]
            score = (image_features[row] * text_features[column]).sum(1)
            of_image.scatter_reduce_(0, row, score, "amax")
            of_text.scatter_reduce_(0, column, score, "amax")
    world.max(of_image)
    world.max(of_text)
    return of_image, of_text


def _count(
    scores: torch.Tensor,
    relevant: tuple[torch.Tensor, torch.Tensor],
    best: tuple[torch.Tensor, torch.Tensor],
    counts: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Add a tile to the counts of its images and texts, int64 [3, n]: irrelevant items at or above the best
    relevant one, irrelevant items clearly above it, relevant items at it.

    Args:
        scores: fp32 [images, texts].
        relevant: rows and columns of the relevant entries.
        best: the best relevant score of each image, and of each text.
    """
    row, column = relevant
    relevant_scores = scores[row, column]
    of_images, of_texts = counts
    for which, margin in enumerate((-TIE, TIE)):
        image_bar, text_bar = best[0] + margin, best[1] + margin
        image_hits = (relevant_scores >= image_bar[row]).long()
        text_hits = (relevant_scores >= text_bar[column]).long()
        of_images[which] += _at_least(scores, image_bar[:, None], 1)
        of_images[which].index_add_(0, row, -image_hits)
        of_texts[which] += _at_least(scores, text_bar, 0)
        of_texts[which].index_add_(0, column, -text_hits)
        if which == 0:
            of_images[2].index_add_(0, row, image_hits)
            of_texts[2].index_add_(0, column, text_hits)


def _at_least(scores: torch.Tensor, bar: torch.Tensor, dim: int) -> torch.Tensor:
    """How many scores reach their bar, along `dim`: int64."""
    if scores.device.type != "cpu":
        return (scores >= bar).sum(dim)
    reached = scores.numpy() >= bar.numpy()  # on the CPU, numpy counts ten times as fast as torch
    if dim == 1:
        return torch.tensor([np.count_nonzero(row) for row in reached], dtype=torch.int64)
    counting_type = np.uint16 if len(reached) < 1 << 16 else np.int64
    return torch.from_numpy(reached.sum(0, dtype=counting_type).astype(np.int64))


def _ranks(counts: torch.Tensor) -> Ranks:
    at_or_above, above, matching = counts.cpu().numpy()
    return Ranks(above, at_or_above - above, np.maximum(matching, 1))


def positions(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    query_of: np.ndarray,
    item_of: np.ndarray,
    world: World | None = None,
    exclude_self: bool = False,
    tile: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """The position of every relevant item of every query, for eval.retrieval.metrics.all_relevant.

    Args:
        queries: fp32 [queries, d], L2-normed, all of them on every rank.
        gallery: fp32 [items, d], likewise.
        query_of, item_of: int64 [pairs], sorted by query: the relevant items.
        exclude_self: queries and gallery are the same, and an item is not its own neighbor.
        tile: queries scored at once; by default as many as fit the memory of ranks().

    Returns:
        int64 [pairs] each: items more than TIE above the relevant one, and items within TIE of it, itself
        included.
    """
    world, tile = world or World(), tile or max(64, ROWS * COLUMNS // len(gallery))
    counts = torch.zeros(2, len(query_of), dtype=torch.int64, device=queries.device)
    n_relevant = np.bincount(query_of, minlength=len(queries))
    starts = np.cumsum(n_relevant) - n_relevant
    for start in range(0, len(queries), tile)[world.rank :: world.world_size]:
        stop = min(start + tile, len(queries))
        scores = queries[start:stop] @ gallery.T
        if exclude_self:
            scores[torch.arange(stop - start), torch.arange(start, stop)] = -torch.inf
        # the nth relevant item of each query that has one
        for nth in range(n_relevant[start:stop].max(initial=0)):
            rows = np.flatnonzero(n_relevant[start:stop] > nth)
            pairs = starts[start + rows] + nth
            index = torch.from_numpy(rows).to(scores.device)
            some = scores if len(rows) == len(scores) else scores[index]
            bar = scores[index, torch.from_numpy(item_of[pairs]).to(scores.device)][:, None]
            above = _at_least(some, torch.nextafter(bar + TIE, bar + 1), 1)
            at_or_above = _at_least(some, bar - TIE, 1)
            counts[:, torch.from_numpy(pairs).to(counts.device)] = torch.stack([above, at_or_above - above])
    above, tied = world.sum(counts).cpu().numpy()
    return above, tied


def first_of(above: np.ndarray, tied: np.ndarray, query_of: np.ndarray, n_queries: int) -> Ranks:
    """The Ranks of each query, from the positions() of all its relevant items."""
    best = np.full(n_queries, np.iinfo(np.int64).max)
    np.minimum.at(best, query_of, above)
    is_best = above == best[query_of]
    matching = np.bincount(query_of[is_best], minlength=n_queries)
    items = np.zeros(n_queries, np.int64)
    np.maximum.at(items, query_of[is_best], tied[is_best])
    assert matching.min() > 0, "a query without a relevant item"
    return Ranks(best, np.maximum(items - matching, 0), matching)


def query_values(ranks: Ranks) -> dict[str, np.ndarray]:
    """What each query scores, by metric: float [queries] each."""
    return {name: metric(ranks.above, ranks.tied, ranks.matching) for name, metric in FIRST_RELEVANT.items()}


def summarize(ranks: Ranks) -> dict[str, float]:
    """The metrics of one direction: the means of query_values(), and
    median_rank      median over queries
    tie_rate         share of queries that tie with an irrelevant item
    R@1_tie_range    R@1 if all ties are decided for the model, minus R@1 if against it
    """
    values = query_values(ranks)
    return {
        **{name: float(of_queries.mean()) for name, of_queries in values.items()},
        "median_rank": float(np.median(values["mean_rank"])),
        "tie_rate": float((ranks.tied > 0).mean()),
        "R@1_tie_range": float((ranks.optimistic == 1).mean() - (ranks.pessimistic == 1).mean()),
    }


def check_finite(features: torch.Tensor, what: str, name_of: Callable[[int], str]) -> None:
    """Check features [n, d] before they are ranked.

    Raises:
        NotFinite: rows that are not finite; the first is named by name_of(row).
    """
    bad = (~torch.isfinite(features).all(1)).nonzero().flatten()
    if len(bad):
        raise NotFinite(
            f"{len(bad)} of {len(features)} {what} are not finite;"
            f" the first is that of {name_of(int(bad[0]))}"
        )
