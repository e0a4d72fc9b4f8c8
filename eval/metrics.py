"""Retrieval metrics from features, by counting: no matrix of all images by all texts is ever held.

The definition: text queries are the distinct captions. What is relevant to a query is every member of its group; a
query's rank is 1 + the number of irrelevant items that score at least as high as its best relevant one. R@k is the
share of queries with a rank of k or better.

    scores tile [rows, texts] = image_features[rows] @ text_features.T      one fp32 product for both directions
"""

from dataclasses import dataclass

import numpy as np
import torch

from data_prep.errors import NotFinite
from train.world import World

# The same product differs by up to 5e-7 between tile shapes; scores closer than this are tied.
TIE = 1e-6
KS = (1, 5, 10)


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

    def pairs(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 rows (from 0 at `start`) and columns of the relevant entries in the tile of images start to stop."""
        counts = self.texts_per_image[start:stop]
        rows = np.repeat(np.arange(stop - start), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        columns = self._texts[np.repeat(self._starts[start:stop], counts) + within]
        return torch.from_numpy(rows), torch.from_numpy(columns)


@dataclass(frozen=True)
class Ranks:
    """1-based ranks of one direction, int64 [queries]: with ties counted against the query, and for it."""

    pessimistic: np.ndarray
    optimistic: np.ndarray


def ranks(
    image_features: torch.Tensor, text_features: torch.Tensor, relevance: Relevance, world: World | None = None, tile: int = 1024
) -> tuple[Ranks, Ranks]:
    """Ranks image_to_text and text_to_image.

    Args:
        image_features: fp32 [n_images, d], L2-normed, all of them on every rank; texts likewise.
        world: its ranks share the tiles, and all get the result.
        tile: images scored at once.
    """
    world = world or World()
    n_images, n_texts = len(image_features), len(text_features)
    assert (n_images, n_texts) == (relevance.n_images, relevance.n_texts), (n_images, n_texts, relevance.n_images, relevance.n_texts)
    tiles = [(start, min(start + tile, n_images)) for start in range(0, n_images, tile)][world.rank :: world.world_size]
    device = image_features.device

    # The best relevant score of every query, from the relevant pairs alone; TIE covers how they round.
    best_of_image = torch.full([n_images], -torch.inf, device=device)
    best_of_text = torch.full([n_texts], -torch.inf, device=device)
    for start, stop in tiles:
        rows, columns = (index.to(device) for index in relevance.pairs(start, stop))
        for part in torch.arange(len(rows), device=device).split(1 << 16):
            row, column = rows[part] + start, columns[part]
            score = (image_features[row] * text_features[column]).sum(1)
            best_of_image.scatter_reduce_(0, row, score, "amax")
            best_of_text.scatter_reduce_(0, column, score, "amax")
    world.max(best_of_image)
    world.max(best_of_text)

    # Counts of irrelevant items at or above, and clearly above, each query's best.
    image_counts = torch.zeros(2, n_images, dtype=torch.int64, device=device)
    text_counts = torch.zeros(2, n_texts, dtype=torch.int64, device=device)
    for start, stop in tiles:
        scores = image_features[start:stop] @ text_features.T
        row, column = (index.to(device) for index in relevance.pairs(start, stop))
        relevant = scores[row, column]
        for which, tie in enumerate((-TIE, TIE)):
            image_bar, text_bar = best_of_image[start:stop] + tie, best_of_text + tie
            image_counts[which, start:stop] = (scores >= image_bar[:, None]).sum(1)
            image_counts[which, start:stop].index_add_(0, row, -(relevant >= image_bar[row]).long())
            text_counts[which] += (scores >= text_bar).sum(0)
            text_counts[which].index_add_(0, column, -(relevant >= text_bar[column]).long())
    pessimistic_image, optimistic_image = (world.sum(image_counts) + 1).cpu().numpy()
    pessimistic_text, optimistic_text = (world.sum(text_counts) + 1).cpu().numpy()
    return Ranks(pessimistic_image, optimistic_image), Ranks(pessimistic_text, optimistic_text)


def summarize(found: Ranks) -> dict[str, float]:
    """R@k as fractions, mean and median rank, ties counted against the model; and the share of queries that tie."""
    rank = found.pessimistic
    return {
        **{f"R@{k}": float((rank <= k).mean()) for k in KS},
        "mean_rank": float(rank.mean()),
        "median_rank": float(np.median(rank)),
        "tied": float((found.pessimistic != found.optimistic).mean()),
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
            f"{len(bad)} of {len(features)} {what} are not finite, the first is that of {names(int(bad[0]))}; there is nothing to rank"
        )
