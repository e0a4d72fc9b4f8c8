"""Nearest neighbours in an index: exact, by faiss or else by torch; or approximate, with measured recall.

The features on disk, fp16 or int8, are compared with fp32 queries, summed in fp32; scores are cosines.

    of a compressed index: (queries @ matrix * scales) @ codes.T
"""

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_prep.atomic import atomic_file
from data_prep.errors import UserError
from data_prep.progress import progress
from eval.search.index import MAKE, Index

try:
    import faiss
except ImportError:
    faiss = None

CHUNK_VALUES = 3 << 16  # cast to fp32 at a time: below 1 MiB, so they stay in the cache
SCORES_AT_ONCE = 1 << 25
ROWS_AT_ONCE = 1 << 16
APPROXIMATE_FILE = "approximate.faiss"
RECALL_QUERIES, RECALL_K = 200, 10


class Hit(NamedTuple):
    """One result.

    Attributes:
        number: Of the image in the index.
        score: Cosine of its features and the query's.
        variants: Number of searched images in its group, including itself; 1 if groups are not collapsed.
        words: The exact words of the query that the image has; see eval.search.words.
    """

    number: int
    score: float
    variants: int
    words: tuple[str, ...] = ()


class Nearest:
    """Nearest-neighbour search in one index.

    Args:
        index: What to search.
        approximate: Use an inverted file, made on first use and kept with the index; for more than a million
            images.
        use_faiss: False takes torch even if faiss is installed.

    Raises:
        UserError: An approximate index needs faiss.
    """

    def __init__(self, index: Index, approximate: bool = False, use_faiss: bool = True):
        self.index, self.approximate = index, approximate
        self.by_faiss = faiss is not None and use_faiss
        if approximate and not self.by_faiss:
            raise UserError("--approximate needs faiss, which is not installed; pip install faiss-cpu")

    def top(
        self, queries: torch.Tensor, k: int, rows: np.ndarray | None = None, grouped: bool = True
    ) -> list[list[Hit]]:
        """The k best images for each query, best first.

        Args:
            queries: fp32 [q, d], L2-normed.
            rows: bool [n], the images to search; None for all.
            grouped: Return only the best image of each group.
        """
        searched = len(self.index) if rows is None else int(rows.sum())
        if not searched or not k:
            return [[] for _ in queries]
        groups = self.index.group_of if grouped else np.arange(len(self.index))
        sizes = np.bincount(groups if rows is None else groups[rows], minlength=int(groups.max()) + 1)
        wanted, results = min(k, int((sizes > 0).sum())), []
        for part in queries.split(max(1, SCORES_AT_ONCE // len(self.index))):
            count = min(searched, 4 * k if grouped else k)
            while True:  # until there are enough groups among the nearest images
                scores, numbers = self.nearest(part, count, rows)
                if not np.isfinite(scores[numbers >= 0]).all():
                    raise UserError(
                        f"{self.index.folder}: holds features that are not finite; make it again: {MAKE}"
                    )
                hits = [
                    _best_of_groups(*query, groups, sizes, k) for query in zip(scores, numbers, strict=True)
                ]
                if count == searched or all(len(of_query) >= wanted for of_query in hits):
                    break
                count = min(searched, 4 * count)
            results += hits
        return results

    def nearest(
        self, queries: torch.Tensor, count: int, rows: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores fp32 and numbers int64, [q, count], best first; an approximate index may pad with -1.

        Args:
            queries: fp32 [q, d].
        """
        if projection := self.index.projection:
            queries = queries @ torch.from_numpy(projection.matrix)
            if not self.approximate:  # which holds decoded features
                queries = queries * torch.from_numpy(projection.scales)
        if self.by_faiss:
            selector = {}
            if rows is not None:
                selector["sel"] = faiss.IDSelectorBitmap(np.packbits(rows, bitorder="little"))
            if self.approximate:
                parameters = faiss.SearchParametersIVF(nprobe=self._inverted_file.nprobe, **selector)
                return self._inverted_file.search(queries.numpy(), count, params=parameters)
            parameters = faiss.SearchParameters(**selector)
            return self._flat.search(queries.numpy(), count, params=parameters)
        chunks = torch.from_numpy(self.index.stored).split(max(1, CHUNK_VALUES // queries.shape[1]))
        scores = torch.cat([queries @ chunk.float().T for chunk in chunks], dim=1)
        if rows is not None:
            scores[:, torch.from_numpy(~rows)] = -torch.inf
        best = scores.topk(count, dim=1)
        return best.values.numpy(), best.indices.numpy()

    @cached_property
    def _flat(self):
        """All features in memory. faiss calls fp16 a quantizer; it changes no fp16 value, and no int8 code.

        Its QT_8bit_direct_signed would round the queries, too, for some numbers of dimensions (faiss 1.15).
        """
        dims, kinds = self.index.stored.shape[1], faiss.ScalarQuantizer
        kind = kinds.QT_8bit_uniform if self.index.is_compressed else kinds.QT_fp16
        flat = faiss.IndexScalarQuantizer(dims, kind, faiss.METRIC_INNER_PRODUCT)
        flat.train(np.zeros((1, dims), np.float32))
        if self.index.is_compressed:  # byte b stands for -128.5 + 255 * (b + 0.5) / 255
            faiss.copy_array_to_vector(np.array([-128.5, 255], np.float32), flat.sq.trained)
        for start in range(0, len(self.index), ROWS_AT_ONCE):
            flat.add(self.index.stored[start : start + ROWS_AT_ONCE].astype(np.float32))
        return flat

    @cached_property
    def _inverted_file(self):
        """Cells by k-means, of which a query visits a sixteenth, or 16; stored as INDEX/approximate.faiss."""
        path = self.index.folder / APPROXIMATE_FILE
        if path.is_file():
            return _read(path)
        n, d = self.index.stored.shape
        cells = int(max(1, min(4 * n**0.5, n // 39)))  # faiss warns below 39 training points per cell
        quantizer = faiss.IndexFlatIP(d)
        inverted = faiss.IndexIVFScalarQuantizer(
            quantizer, d, cells, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
        )
        sample = np.sort(np.random.default_rng(0).choice(n, min(n, 64 * cells), replace=False))
        inverted.train(self.index.decoded(sample))
        for start in progress(range(0, n, ROWS_AT_ONCE), desc="approximate index", unit="part", delay=1):
            inverted.add(self.index.decoded(slice(start, start + ROWS_AT_ONCE)))
        inverted.nprobe = max(1, min(cells, max(16, cells // 16)))
        with atomic_file(path) as partial:
            faiss.write_index(inverted, str(partial))
        return inverted

    def recall(self) -> float:
        """recall@10 of the approximate index against exact search, with random images as queries."""
        n = len(self.index)
        numbers = np.random.default_rng(1).choice(n, min(n, RECALL_QUERIES), replace=False)
        queries = torch.from_numpy(self.index.as_queries(np.sort(numbers)))
        k = min(RECALL_K, n)
        exact, own = Nearest(self.index).nearest(queries, k)[1], self.nearest(queries, k)[1]
        return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(exact, own, strict=True)]))


def _best_of_groups(
    scores: np.ndarray, numbers: np.ndarray, groups: np.ndarray, sizes: np.ndarray, k: int
) -> list[Hit]:
    """The best image of each group, at most k."""
    numbers = numbers[(numbers >= 0) & np.isfinite(scores)]
    firsts = np.sort(np.unique(groups[numbers], return_index=True)[1])[:k]
    return [
        Hit(int(numbers[first]), float(scores[first]), int(sizes[groups[numbers[first]]])) for first in firsts
    ]


def _read(path: Path):
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise UserError(
            f"{path}: cannot be read ({str(error).splitlines()[0][:120]}); delete it to make it again"
        ) from None
