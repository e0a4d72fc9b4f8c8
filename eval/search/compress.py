"""A smaller index: fewer dimensions at int8, and what that costs, measured on the captions of the val split.

    image_features [n, d] @ principal axes of the training images [d, dims] -> L2-normed -> int8 codes

A search multiplies queries by the same axes. What was tried: benchmarks/search.md.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_prep.atomic import atomic_folder, write_json
from data_prep.below import file_below
from data_prep.errors import UserError
from data_prep.progress import progress
from data_prep.tables import Table, counted, text_of
from data_prep.terminal import say
from eval.embed import numbered_captions
from eval.retrieval.intervals import Difference, cautions, paired_difference
from eval.retrieval.ranking import Relevance, query_values, ranks
from eval.search.index import COMPRESSED, FORMAT, MAKE, Index, Projection, open_index
from eval.search.indexing import place_of
from eval.search.query import text_query
from train.metrics import show, show_difference

SHARES = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 3 / 32, 1 / 16)  # of the dimensions, on the ladder
METRICS = ("text_to_image/R@1", "text_to_image/R@10")  # of which none may lose more than --max-loss
LEAST_IMAGES = 30  # of val, to choose by: of fewer than 10, no index loses R@10
COPIED = ("metadata.parquet", "thumbnails.bin", "thumbnails.npy", "unreadable.csv")
ROWS_AT_ONCE = 1 << 15


class Rung(NamedTuple):
    """A compressed index that could be made.

    Attributes:
        values: Of METRICS.
        differences: From the index as it is, paired by query.
    """

    dims: int
    values: dict[str, float]
    differences: dict[str, Difference]

    @property
    def loss(self) -> float:
        """The largest loss, a share of the queries."""
        return max(-difference.value for difference in self.differences.values())


class Questions(NamedTuple):
    """Captions of the val split, and the images that they are searched in.

    Attributes:
        rows: int64 [images], of the index.
        text_features: fp32 [texts, d], L2-normed; of the distinct captions.
        groups: int64 [texts], of the first image of each.
    """

    rows: np.ndarray
    text_features: torch.Tensor
    relevance: Relevance
    groups: np.ndarray

    def scores(self, image_features: np.ndarray, text_features: np.ndarray) -> dict[str, np.ndarray]:
        """METRICS of each query, as `python -m eval retrieval` counts them.

        Args:
            image_features: fp32 [images, dims].
            text_features: fp32 [texts, dims].
        """
        features = torch.from_numpy(image_features), torch.from_numpy(text_features)
        values = query_values(ranks(*features, self.relevance)[1])
        return {name: values[name.rpartition("/")[2]] for name in METRICS}


def compress_index(folder: Path, out: Path, dims: int | None, max_loss: float, model: str) -> None:
    """Measure the ladder and write a rung of it; see eval.search.command.compress.

    Raises:
        UserError: There is no index, it is compressed, it has no val split, or no rung is within `max_loss`.
    """
    index = open_index(folder)
    check(index, dims)
    rows = val_rows(index)
    if not len(rows) and dims is None:
        raise UserError(
            f"{folder}: has no captions in the split val, so no loss can be measured; embed shards with a val"
            " split, or pass --dims to choose without a figure"
        )
    if len(rows) < LEAST_IMAGES and dims is None:
        raise UserError(
            f"{folder}: has {counted(len(rows), 'image')} with captions in the split val, too few to see a"
            f" loss; {LEAST_IMAGES} are needed: pass --dims to choose yourself"
        )
    questions = ask(index, rows, model) if len(rows) else None
    axes = principal_axes(index)
    if questions:
        rungs = measure(index, questions, axes, [dims] if dims else ladder(index.manifest["d"]))
        say(text_of(report(index, questions, rungs)))
        dims = dims or smallest(rungs, max_loss, folder).dims
    else:
        say(f"{folder}: has no captions in the split val; the loss is not measured")
    write(index, projection(index, axes, dims), out, model)
    n, d = index.stored.shape
    sizes = f"{n * dims / 1e6:.1f} MB of features instead of {2 * n * d / 1e6:.1f}"
    say(f"{counted(n, 'image')}, {dims} of {d} dimensions at int8, {sizes}: {out}")


def check(index: Index, dims: int | None) -> None:
    """Raises:
    UserError: The index cannot be compressed, or not to so many dimensions.
    """
    d = index.manifest["d"]
    if index.is_compressed:
        raise UserError(f"{index.folder}: is compressed already; pass the index that it was made of")
    if index.manifest["index_format"] != FORMAT:
        raise UserError(f"{index.folder}: of an earlier version; make the index again: {MAKE}")
    if dims is not None and not 1 <= dims <= d:
        raise UserError(f"--dims {dims}: must be from 1 to {d}, the dimensions of {index.folder}")


def ladder(d: int) -> list[int]:
    """Numbers of dimensions, largest first."""
    return sorted({max(1, round(share * d)) for share in SHARES}, reverse=True)


def val_rows(index: Index) -> np.ndarray:
    """int64 [images], those of the split val that have captions."""
    rows = np.flatnonzero(index.values("split").to_numpy() == "val")
    return np.array([row["number"] for row in index.rows(rows) if row["captions"]], np.int64)


def ask(index: Index, rows: np.ndarray, model: str) -> Questions:
    """The captions of some images as queries."""
    groups = index.group_of[rows]
    captions = numbered_captions([row["captions"] for row in index.rows(rows)], groups)
    relevance = Relevance(groups, captions.text_of, captions.group_of)
    features = text_query(index.model(model), captions.texts)
    return Questions(rows, features, relevance, captions.first_group())


def principal_axes(index: Index) -> np.ndarray:
    """fp32 [d, d], columns: the axes of the training images' features, or of all images' if none is of train,
    by decreasing mean square.

    Of all d x dims matrices with orthonormal columns, the first dims keep most of the features' squared
    norms (Eckart and Young 1936, doi:10.1007/BF02288367). The mean is not subtracted: cosines are taken from
    the origin.
    """
    rows = np.flatnonzero(index.values("split").to_numpy() == "train")
    rows, d = rows if len(rows) else np.arange(len(index)), index.manifest["d"]
    moment = np.zeros((d, d))
    for start in range(0, len(rows), ROWS_AT_ONCE):
        features = index.decoded(rows[start : start + ROWS_AT_ONCE])
        moment += features.T @ features
    if not np.isfinite(moment).all():
        raise UserError(f"{index.folder}: holds features that are not finite; make it again: {MAKE}")
    return np.ascontiguousarray(np.linalg.eigh(moment)[1][:, ::-1], np.float32)


def projection(index: Index, axes: np.ndarray, dims: int) -> Projection:
    """The first axes, with scales at which no value of any image is clipped."""
    matrix, largest = np.ascontiguousarray(axes[:, :dims]), np.full(dims, 1e-6, np.float32)
    for rows in parts(index):
        largest = np.maximum(largest, np.abs(projected(index.decoded(rows), matrix)).max(0))
    return Projection(matrix, (largest / 127).astype(np.float32))


def parts(index: Index) -> Iterator[slice]:
    """All rows, some at a time."""
    starts = range(0, len(index), ROWS_AT_ONCE)
    for start in progress(starts, desc="compressing", unit="part", leave=False, delay=1):
        yield slice(start, start + ROWS_AT_ONCE)


def projected(features: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Features fp32 [m, d] in fewer dimensions [m, dims], L2-normed: equal images have a cosine of 1."""
    features = features @ matrix
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def quantized(features: np.ndarray, by: Projection) -> np.ndarray:
    """int8 codes [m, dims] of features fp32 [m, d]."""
    return np.clip(np.round(projected(features, by.matrix) / by.scales), -127, 127).astype(np.int8)


def measure(index: Index, questions: Questions, axes: np.ndarray, choices: list[int]) -> list[Rung]:
    """What each number of dimensions finds, against the index as it is."""
    images, texts = index.decoded(questions.rows), questions.text_features.numpy()
    before, rungs = questions.scores(images, texts), []
    for dims in progress(choices, desc="measuring", unit="rung", delay=1):
        by = projection(index, axes, dims)
        after = questions.scores(quantized(images, by) * by.scales, texts @ by.matrix)
        values = {name: float(of_queries.mean()) for name, of_queries in after.items()}
        pairs = {name: (before[name], after[name], questions.groups) for name in METRICS}
        rungs.append(Rung(dims, values, {name: paired_difference(*pairs[name]) for name in METRICS}))
    return rungs


def smallest(rungs: list[Rung], max_loss: float, folder: Path) -> Rung:
    """The rung of fewest dimensions that loses at most `max_loss`.

    Raises:
        UserError: There is none.
    """
    within = [rung for rung in rungs if rung.loss <= max_loss]
    if not within:
        least = min(rung.loss for rung in rungs)
        raise UserError(
            f"--max-loss {max_loss:g}: each rung of {folder} loses more, the best {least:.4f}; raise it"
        )
    return min(within)


def report(index: Index, questions: Questions, rungs: list[Rung]) -> list[str | Table]:
    """The ladder as a table, and what its reader must know."""
    n, d = index.stored.shape
    titles = ["R@1", "difference", "R@10", "difference"]
    rows = []
    for rung in rungs:
        cells = [
            cell
            for name in METRICS
            for cell in (show(name, rung.values[name]), show_difference(name, rung.differences[name], False))
        ]
        rows.append([f"{rung.dims} at int8", str(rung.dims), f"{n * rung.dims / 1e6:.1f}", *cells])
    first = {name: rungs[0].values[name] - rungs[0].differences[name].value for name in METRICS}
    before = [f"{d} at fp16", str(2 * d), f"{2 * n * d / 1e6:.1f}"]
    before += [cell for name in METRICS for cell in (show(name, first[name]), "")]
    searched = (
        f"{counted(len(questions.text_features), 'distinct caption')} of the split val, searched in its"
        f" {counted(len(questions.rows), 'image')}. Differences in points, in brackets their 95 % intervals."
    )
    notes = cautions(len(np.unique(questions.groups)))
    return [searched, Table(["dimensions", "bytes per image", "MB", *titles], [before, *rows]), *notes]


def write(index: Index, by: Projection, out: Path, model: str) -> None:
    """Write the compressed index."""
    with atomic_folder(out, "index") as folder:
        for name in COPIED:
            if (source := file_below(index.folder, name)).exists():
                shutil.copyfile(source, folder / name)
        shape = len(index), len(by.scales)
        codes = np.lib.format.open_memmap(folder / "features.npy", "w+", np.int8, shape)
        for rows in parts(index):
            codes[rows] = quantized(index.decoded(rows), by)
        codes.flush()
        np.save(folder / "projection.npy", by.matrix)
        np.save(folder / "scales.npy", by.scales)
        place = place_of(model or index.made_by, out)
        write_json(
            folder / "manifest.json", {**index.manifest, "index_format": COMPRESSED, "model_place": place}
        )
