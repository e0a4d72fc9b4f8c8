"""Metrics of a classifier from class scores. Ties count in expectation, so a collapsed model is at chance.

Classes whose neighbouring scores differ by at most the tolerance are tied, and each order of them is equally
likely. All metrics come from the expected confusion matrix: entry (i, j) is the expected number of images of
class i that are predicted as class j.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_prep.errors import UserError
from data_prep.sheets import write_csv
from eval.classify.templates import read_map
from eval.retrieval.intervals import mean_interval

TOP, RESAMPLES, CHUNK = 5, 1000, 4096
NAMES = ("top1", f"top{TOP}", "mean_per_class", "macro_f1", "weighted_f1")  # see train.metrics.METRICS


@dataclass(frozen=True)
class Predictions:
    """Expected predictions for n images and C classes.

    Attributes:
        labels: int64 [n].
        rows, columns, weights: Image rows[i] is predicted as class columns[i] with probability weights[i].
        hits: float64 [n], the probability that the correct class is among the first TOP (of C, if less).
        n_classes: C.
    """

    labels: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    weights: np.ndarray
    hits: np.ndarray
    n_classes: int

    @property
    def tie_rate(self) -> float:
        """Share of the images whose first place is tied."""
        return float(1 - (self.weights == 1).sum() / len(self.labels))

    @property
    def correct(self) -> np.ndarray:
        """float64 [n], the probability that an image is predicted as its own class."""
        own = self.columns == self.labels[self.rows]
        return np.bincount(self.rows[own], self.weights[own], len(self.labels))

    def confusion(self) -> np.ndarray:
        """float64 [C, C]: images of class i that are predicted as class j."""
        cells = self.labels[self.rows] * self.n_classes + self.columns
        return np.bincount(cells, self.weights, self.n_classes**2).reshape(self.n_classes, self.n_classes)

    def merged(self, parent: np.ndarray, n_parents: int) -> "Predictions":
        """The same with each class c replaced by parent[c]; `hits` then concern the first place."""
        cells, cell_of = np.unique(self.rows * n_parents + parent[self.columns], return_inverse=True)
        weights = np.bincount(cell_of, self.weights)
        weights[weights > 1 - 1e-12] = 1
        labels, rows, columns = parent[self.labels], cells // n_parents, cells % n_parents
        merged = Predictions(labels, rows, columns, weights, self.hits, n_parents)
        return Predictions(labels, rows, columns, weights, merged.correct, n_parents)


def predict(scores: torch.Tensor, labels: np.ndarray, tie: float) -> Predictions:
    """The expected predictions.

    Args:
        scores: float [n, C], higher is better.
        labels: int64 [n], from 0.
        tie: Scores that differ by no more are tied.
    """
    assert len(scores) == len(labels) > 0, (scores.shape, len(labels))
    rows, columns, weights, hits, start = [], [], [], [], 0
    for part, own in zip(scores.split(CHUNK), torch.from_numpy(labels).split(CHUNK), strict=True):
        ordered, order = part.cpu().sort(dim=1, descending=True, stable=True)
        group = torch.cat(
            [torch.zeros(len(part), 1, dtype=torch.bool), ordered[:, :-1] - ordered[:, 1:] > tie], 1
        ).cumsum(1)
        own_group = group[order == own[:, None]][:, None]
        before, size = (group < own_group).sum(1), (group == own_group).sum(1)
        hits.append(((TOP - before).double() / size).clamp(0, 1))
        row, place = (group == 0).nonzero(as_tuple=True)
        rows.append(row + start)
        columns.append(order[row, place])
        weights.append(1 / (group == 0).sum(1)[row].double())
        start += len(part)
    rows, columns, weights, hits = (torch.cat(parts).numpy() for parts in (rows, columns, weights, hits))
    return Predictions(labels, rows, columns, weights, hits, scores.shape[1])


class Mistake(NamedTuple):
    """An image that is predicted as another class: its number in the data, its label, and the prediction."""

    number: int
    label: int
    predicted: int


def confident_mistakes(
    scores: torch.Tensor, labels: np.ndarray, numbers: np.ndarray, limit: int = 24
) -> list[Mistake]:
    """Images whose own class scores furthest below another class, largest margin first.

    Args:
        scores: float [n, C].
        labels, numbers: int64 [n].
    """
    best = scores.cpu().max(1)
    margin = (best.values - scores.cpu()[torch.arange(len(labels)), torch.from_numpy(labels)]).numpy()
    order = np.argsort(-margin, kind="stable")[:limit].tolist()
    return [
        Mistake(int(numbers[row]), int(labels[row]), int(best.indices[row]))
        for row in order
        if margin[row] > 0
    ]


def class_averages(tp: np.ndarray, support: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Mean per-class accuracy over classes with images, and F1 as in scikit-learn.

    Macro F1 averages over classes that occur or are predicted.

    Args:
        tp, support, predicted: float [C]: correct images, images, and predictions of each class.
    """
    occurs, known = support > 0, support + predicted > 0
    f1 = 2 * tp / np.where(known, support + predicted, 1)
    return {
        "mean_per_class": float((tp[occurs] / support[occurs]).mean()),
        "macro_f1": float(f1[known].mean()),
        "weighted_f1": float((f1 * support).sum() / support.sum()),
    }


def summarize(predictions: Predictions, groups: np.ndarray) -> dict[str, dict]:
    """{"metrics": name -> fraction, "intervals": name -> [low, high]}; 95 %, over groups.

    Means have the intervals of eval.retrieval.intervals.mean_interval; F1 and mean per class have percentiles
    over resampled groups.

    Args:
        groups: int64 [n].
    """
    confusion = predictions.confusion()
    tp, support, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    top1, top = mean_interval(predictions.correct, groups), mean_interval(predictions.hits, groups)
    averages = class_averages(tp, support, predicted)
    low, high = np.quantile(_resampled_averages(predictions, groups), [0.025, 0.975], axis=0).tolist()
    intervals = dict(zip(averages, map(list, zip(low, high, strict=True)), strict=True))
    metrics = {
        "top1": top1.value,
        f"top{TOP}": top.value,
        **averages,
        "tie_rate": predictions.tie_rate,
        "chance/top1": 1 / predictions.n_classes,
        f"chance/top{TOP}": min(TOP, predictions.n_classes) / predictions.n_classes,
        "largest_class": float(support.max() / support.sum()),
    }
    means = {"top1": [top1.low, top1.high], f"top{TOP}": [top.low, top.high]}
    return {"metrics": metrics, "intervals": means | intervals}


def _resampled_averages(predictions: Predictions, groups: np.ndarray) -> list[list[float]]:
    """The values of class_averages for each of RESAMPLES draws of groups with replacement."""
    rng, correct = np.random.default_rng(0), predictions.correct
    names, members = np.unique(groups, return_inverse=True)
    averages = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(0, len(names), len(names))
        times = np.bincount(drawn, minlength=len(names)).astype(float)[members]
        counts = (
            (predictions.labels, times * correct),
            (predictions.labels, times),
            (predictions.columns, times[predictions.rows] * predictions.weights),
        )
        sums = (np.bincount(classes, weights, predictions.n_classes) for classes, weights in counts)
        averages.append(list(class_averages(*sums).values()))
    return averages


def per_class(predictions: Predictions, classes: list[str]) -> dict[str, dict[str, float]]:
    """Class -> its number of images, recall and F1."""
    confusion = predictions.confusion()
    tp, support, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    f1 = 2 * tp / np.maximum(support + predicted, 1e-300)
    recall = tp / np.maximum(support, 1)
    return {
        name: {"n": int(support[label]), "recall": float(recall[label]), "f1": float(f1[label])}
        for label, name in enumerate(classes)
    }


def read_parents(path: Path, classes: list[str]) -> dict[str, str]:
    """{child: parent}; children are classes, parents may be.

    Raises:
        UserError: A child is not a class, or a parent is itself a child.
    """
    parents = read_map(path)
    for child, parent in parents.items():
        if child not in classes:
            near = difflib.get_close_matches(child, classes, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; use its class names"
            raise UserError(f"{path}: {child!r} is not a class of the data{hint}")
        if parent in parents:
            raise UserError(
                f"{path}: {parent!r}, the parent of {child!r}, is itself a child; use one level of parents"
            )
    return parents


def hierarchy(
    scores: torch.Tensor,
    labels: np.ndarray,
    groups: np.ndarray,
    classes: list[str],
    parents: dict[str, str],
    tie: float,
) -> dict:
    """Metrics of overlapping classes at two levels, each as summarize() returns them.

    parent: all images. True and predicted classes are replaced by their parents where they have one, so a
        siamese predicted as cat, or a cat predicted as siamese, is correct.
    child: images whose class is a child, with only the children to choose from.

    Args:
        scores: float [n, C].
        labels, groups: int64 [n].
        parents: {child: parent}.
    """
    top_of = [parents.get(name, name) for name in classes]
    tops = sorted(set(top_of))
    parent = np.array([tops.index(top) for top in top_of])
    children = np.array([label for label, name in enumerate(classes) if name in parents], np.int64)
    merged = summarize(predict(scores, labels, tie).merged(parent, len(tops)), groups)
    # Guessing chooses among classes, and parents have different numbers of them; top-5 is of classes too.
    for values in merged.values():
        for name in (f"top{TOP}", f"chance/top{TOP}", "chance/top1"):
            values.pop(name, None)
    merged["metrics"]["chance/top1"] = float((np.bincount(parent)[parent[labels]] / len(classes)).mean())
    result = {"parent": {"n_images": len(labels), "n_classes": len(tops), **merged}}
    if (rows := np.flatnonzero(np.isin(labels, children))).size:
        among_children = predict(
            scores[torch.from_numpy(rows)][:, torch.from_numpy(children)],
            np.searchsorted(children, labels[rows]),
            tie,
        )
        counts = {"n_images": len(rows), "n_classes": len(children)}
        result["child"] = {**counts, **summarize(among_children, groups[rows])}
    return result


def write_confusion_csv(path: Path, confusion: np.ndarray, classes: list[str]) -> None:
    """A row per true class, a column per predicted class; ties give fractions."""
    rows = ([name, *(f"{value:.10g}" for value in row)] for name, row in zip(classes, confusion, strict=True))
    write_csv(path, ["true class", *classes], rows)
