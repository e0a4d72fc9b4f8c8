"""The pictures of an index nearest to some features: exact by faiss, or by torch where there is no faiss; or
approximate, and measured.

All that is compared are the fp16 features on disk and fp32 queries, summed in fp32; scores are cosines.
"""

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_prep.atomic import atomic_file
from data_prep.errors import UserError
from data_prep.progress import progress
from eval.search.index import Index

try:
    import faiss
except ImportError:
    faiss = None

CHUNK = 3 << 16  # numbers cast to fp32 at a time: less than a MiB, which stays in the cache
SCORES_AT_ONCE = 1 << 25
APPROXIMATE_FILE = "approximate.faiss"
RECALL_QUERIES, RECALL_K = 200, 10


class Hit(NamedTuple):
    """One picture found.

    Attributes:
        number: of the picture in the index.
        score: cosine of its features and the query's.
        variants: pictures of its group that were searched, itself included; 1 where groups are not joined.
    """

    number: int
    score: float
    variants: int


class Nearest:
    """Finds pictures of one index.

    Args:
        index: what to search.
        approximate: use an inverted file, made on the first use and kept with the index; for more than a
            million pictures.
        library: False takes torch although there is faiss.

    Raises:
        UserError: an approximate index without faiss.
    """

    def __init__(self, index: Index, approximate: bool = False, library: bool = True):
        self.index, self.approximate = index, approximate
        self.by_faiss = faiss is not None and library
        if approximate and not self.by_faiss:
            raise UserError(
                "an approximate index is made by faiss, which is not installed; pip install faiss-cpu, or"
                " search exactly"
            )

    def top(
        self, queries: torch.Tensor, k: int, rows: np.ndarray | None = None, grouped: bool = True
    ) -> list[list[Hit]]:
        """For each query the k best pictures, the best first; of pictures of one group the best one alone.

        Args:
            queries: fp32 [q, d], L2-normed.
            rows: bool [n], the pictures that may be found; None for all.
            grouped: False lets variants of one thing stand beside each other.
        """
        searched = len(self.index) if rows is None else int(rows.sum())
        if not searched or not k:
            return [[] for _ in queries]
        groups = self.index.group_of if grouped else np.arange(len(self.index))
        sizes = np.bincount(groups if rows is None else groups[rows], minlength=int(groups.max()) + 1)
        wanted, found = min(k, int((sizes > 0).sum())), []
        for part in queries.split(max(1, SCORES_AT_ONCE // len(self.index))):
            count = min(searched, 4 * k if grouped else k)
            while True:
                scores, numbers = self.nearest(part, count, rows)
                hits = [_joined(*each, groups, sizes, k) for each in zip(scores, numbers, strict=True)]
                if count == searched or all(len(each) >= wanted for each in hits):
                    break
                count = min(searched, 4 * count)
            found += hits
        return found

    def nearest(
        self, queries: torch.Tensor, count: int, rows: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores fp32 and picture numbers int64, [q, count], the best first; an approximate index may leave
        -1 at the end.
        """
        if self.by_faiss:
            chosen = (
                {} if rows is None else {"sel": faiss.IDSelectorBitmap(np.packbits(rows, bitorder="little"))}
            )
            if self.approximate:
                parameters = faiss.SearchParametersIVF(nprobe=self._inverted.nprobe, **chosen)
                return self._inverted.search(queries.numpy(), count, params=parameters)
            return self._flat.search(queries.numpy(), count, params=faiss.SearchParameters(**chosen))
        chunks = torch.from_numpy(self.index.features).split(max(1, CHUNK // queries.shape[1]))
        scores = torch.cat([queries @ chunk.float().T for chunk in chunks], dim=1)
        if rows is not None:
            scores[:, torch.from_numpy(~rows)] = -torch.inf
        best = scores.topk(count, dim=1)
        return best.values.numpy(), best.indices.numpy()

    @cached_property
    def _flat(self):
        """The features as they are on disk, in memory: what faiss calls a quantizer to fp16 changes no fp16
        value.
        """
        flat = faiss.IndexScalarQuantizer(
            self.index.manifest["d"], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        flat.train(np.zeros((1, self.index.manifest["d"]), np.float32))
        for start in range(0, len(self.index), 1 << 16):
            flat.add(self.index.features[start : start + (1 << 16)].astype(np.float32))
        return flat

    @cached_property
    def _inverted(self):
        """Cells by k-means, of which a query looks into a sixteenth, or 16; kept in INDEX/approximate.faiss."""
        path = self.index.folder / APPROXIMATE_FILE
        if path.is_file():
            return _read(path)
        n, d = self.index.features.shape
        cells = int(max(1, min(4 * n**0.5, n // 39)))  # faiss wants 39 points for each to learn them
        quantizer = faiss.IndexFlatIP(d)
        inverted = faiss.IndexIVFScalarQuantizer(
            quantizer, d, cells, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
        )
        chosen = np.sort(np.random.default_rng(0).choice(n, min(n, 64 * cells), replace=False))
        inverted.train(self.index.features[chosen].astype(np.float32))
        for start in progress(range(0, n, 1 << 16), desc="approximate index", unit="part", delay=1):
            inverted.add(self.index.features[start : start + (1 << 16)].astype(np.float32))
        inverted.nprobe = max(1, min(cells, max(16, cells // 16)))
        with atomic_file(path) as partial:
            faiss.write_index(inverted, str(partial))
        return inverted

    def recall(self) -> float:
        """Of what an exact search finds first, the share that the approximate one does: recall@10 of pictures
        drawn at random.
        """
        n = len(self.index)
        numbers = np.random.default_rng(1).choice(n, min(n, RECALL_QUERIES), replace=False)
        queries = torch.from_numpy(self.index.features[np.sort(numbers)].astype(np.float32))
        k = min(RECALL_K, n)
        exact = Nearest(self.index).nearest(queries, k)[1]
        return float(
            np.mean(
                [len(set(a) & set(b)) / k for a, b in zip(exact, self.nearest(queries, k)[1], strict=True)]
            )
        )


def _joined(
    scores: np.ndarray, numbers: np.ndarray, groups: np.ndarray, sizes: np.ndarray, k: int
) -> list[Hit]:
    """The first of each group, at most k."""
    numbers = numbers[(numbers >= 0) & np.isfinite(scores)]
    firsts = np.sort(np.unique(groups[numbers], return_index=True)[1])[:k]
    return [Hit(int(numbers[at]), float(scores[at]), int(sizes[groups[numbers[at]]])) for at in firsts]


def _read(path: Path):
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise UserError(
            f"{path}: cannot be read ({str(error).splitlines()[0][:120]}); delete it, and it is made again"
        ) from None
