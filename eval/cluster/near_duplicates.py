"""Near duplicates in an index: all pairs of images above a cosine, each pair once."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from data_prep.progress import progress
from eval.search.index import Index

TILE_ROWS, MAX_PAIRS = 2048, 2_000_000
PAIR_COLUMNS = ["path", "other_path", "cosine", "same_group", "key", "other_key"]


@dataclass(frozen=True)
class Pairs:
    """Near duplicates, most similar first.

    Attributes:
        numbers: int64 [p, 2], images, the smaller number first.
        cosines: fp32 [p].
        same_group: bool [p], whether the data already has the two in one group.
        threshold: Smallest cosine of a pair.
        count: Number of pairs; above p if only the MAX_PAIRS most similar are kept.
    """

    numbers: np.ndarray
    cosines: np.ndarray
    same_group: np.ndarray
    threshold: float
    count: int

    def rows(self, index: Index) -> Iterator[list]:
        """The PAIR_COLUMNS of each pair; same_group is yes or no."""
        keys, paths = index.keys, index.paths
        for (first, second), cosine, same in zip(
            self.numbers.tolist(), self.cosines.tolist(), self.same_group.tolist(), strict=True
        ):
            group = "yes" if same else "no"
            yield [paths[first], paths[second], f"{cosine:.4f}", group, keys[first], keys[second]]

    def summary(self) -> dict:
        """Counts, and a "message" for people."""
        listed, same = len(self.numbers), int(self.same_group.sum())
        message = f"{self.count:,} pairs of images have a cosine of {self.threshold:g} or more"
        if listed < self.count:
            message += f"; only the {listed:,} most similar are listed"
        if same:
            message += f"; {same:,} of {'these' if listed < self.count else 'them'} are in the same group"
        return {
            "threshold": self.threshold,
            "pairs": self.count,
            "listed": listed,
            "same_group": same,
            "message": message,
        }


def near_duplicates(index: Index, threshold: float) -> Pairs:
    """All pairs of images whose cosine is at least `threshold`, exact, summed in fp32.

    Memory is TILE_ROWS rows and the pairs. eval.search.nearest would not do: it finds a fixed number of
    neighbours, computes each pair twice, and faiss's fp16 code takes ten times as long as a matrix product.
    """
    features, count = index.features, 0
    numbers, cosines = np.empty((0, 2), np.int64), np.empty(0, np.float32)
    starts = range(0, len(index), TILE_ROWS)
    tiles = len(starts) * (len(starts) + 1) // 2
    with progress(desc="near duplicates", total=tiles, unit="tile", delay=1) as bar:
        for row, start in enumerate(starts):
            rows, parts = _rows(features, start), [(numbers, cosines)]
            for other in starts[row:]:
                scores = rows @ _rows(features, other).T
                near = scores >= threshold
                pairs = (near.triu(1) if start == other else near).nonzero()
                count += len(pairs)
                own_numbers = (pairs + torch.tensor([start, other])).numpy()
                parts.append((own_numbers, scores[pairs[:, 0], pairs[:, 1]].numpy()))
                if sum(len(part) for part, _ in parts) > 2 * MAX_PAIRS:
                    parts = [_most_similar(parts)]
                bar.update()
            numbers, cosines = _most_similar(parts)
    groups = index.group_of
    return Pairs(numbers, cosines, groups[numbers[:, 0]] == groups[numbers[:, 1]], threshold, count)


def _rows(features: np.ndarray, start: int) -> torch.Tensor:
    return torch.from_numpy(features[start : start + TILE_ROWS].astype(np.float32))


def _most_similar(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The MAX_PAIRS most similar pairs, most similar first; of equals, the smaller numbers first."""
    numbers, cosines = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    # Beyond four digits the order would depend on rounding errors, hence on threads and libraries.
    rounded = np.round(cosines, 4)
    order = np.lexsort((numbers[:, 1], numbers[:, 0], -rounded))[:MAX_PAIRS]
    return numbers[order], cosines[order]
