"""Pictures of an index that are nearly the same, each pair once: more than the nearest few of each are
wanted, and half the work does.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from data_prep.progress import progress
from eval.search.index import Index

TILE_ROWS, MOST_PAIRS = 2048, 2_000_000


@dataclass(frozen=True)
class Pairs:
    """Near duplicates, the most similar first.

    Attributes:
        numbers: int64 [p, 2] of pictures, the smaller first.
        cosines: fp32 [p].
        same_group: bool [p], the data says already that the two belong together.
        threshold: all pairs with this cosine or more are meant.
        count: of them; more than p where only the MOST_PAIRS most similar are kept.
    """

    numbers: np.ndarray
    cosines: np.ndarray
    same_group: np.ndarray
    threshold: float
    count: int

    def rows(self, index: Index) -> Iterator[list]:
        """Of each pair both keys, the cosine, and whether the two are of one group, yes or no."""
        keys = index.keys
        for (first, second), cosine, same in zip(
            self.numbers.tolist(), self.cosines.tolist(), self.same_group.tolist(), strict=True
        ):
            yield [keys[first], keys[second], f"{cosine:.4f}", "yes" if same else "no"]

    def summary(self) -> dict:
        """What --json has of them, "said" being for people."""
        kept, same = len(self.numbers), int(self.same_group.sum())
        said = f"{self.count:,} pairs of pictures have a cosine of {self.threshold:g} or more"
        said += f"; only the {kept:,} most similar are listed" if kept < self.count else ""
        said += (
            f"; {same:,} of {'those' if kept < self.count else 'them'} are of one group, so known to belong"
            " together"
            if same
            else ""
        )
        return {
            "threshold": self.threshold,
            "pairs": self.count,
            "listed": kept,
            "same_group": same,
            "said": said,
        }


def near_duplicates(index: Index, threshold: float) -> Pairs:
    """All pairs of pictures whose cosine is at least `threshold`, exact, summed in fp32; memory is TILE_ROWS
    rows and what is found.

    Nearest is not asked: it finds the k nearest of each, and how many are near enough is not known before; of
        every pair it would
    also compute both halves, and by faiss's code for fp16 that takes ten times as long as a matrix product.
    """
    features, count = index.features, 0
    numbers, cosines = np.empty((0, 2), np.int64), np.empty(0, np.float32)
    starts = range(0, len(index), TILE_ROWS)
    with progress(
        desc="near duplicates", total=len(starts) * (len(starts) + 1) // 2, unit="tile", delay=1
    ) as bar:
        for start in starts:
            rows, parts = _rows(features, start), [(numbers, cosines)]
            for other in starts[start // TILE_ROWS :]:
                scores = rows @ _rows(features, other).T
                near = scores >= threshold
                pairs = (near.triu(1) if start == other else near).nonzero()
                count += len(pairs)
                parts.append(
                    ((pairs + torch.tensor([start, other])).numpy(), scores[pairs[:, 0], pairs[:, 1]].numpy())
                )
                if sum(len(found) for found, _ in parts) > 2 * MOST_PAIRS:
                    parts = [_best(parts)]
                bar.update()
            numbers, cosines = _best(parts)
    groups = index.group_of
    return Pairs(numbers, cosines, groups[numbers[:, 0]] == groups[numbers[:, 1]], threshold, count)


def _rows(features: np.ndarray, start: int) -> torch.Tensor:
    return torch.from_numpy(features[start : start + TILE_ROWS].astype(np.float32))


def _best(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The MOST_PAIRS most similar, the most similar first, and of equals the smaller numbers."""
    numbers, cosines = (np.concatenate(each) for each in zip(*parts, strict=True))
    shown = np.round(
        cosines, 4
    )  # beyond that the order would be one of rounding errors, which threads and libraries decide
    order = np.lexsort((numbers[:, 1], numbers[:, 0], -shown))[:MOST_PAIRS]
    return numbers[order], cosines[order]
