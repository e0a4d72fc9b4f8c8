"""Scores of a classifier from its scores of the classes, with ties counted in expectation, so that a
collapsed model is at chance.

Classes whose scores follow each other within the tolerance are tied, and each order of them is as likely as
any other. All figures come from the expected confusion matrix: entry (i, j) is how many images of class i are
taken for class j."""

import csv
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_prep.atomic import atomic_file
from data_prep.errors import UserError
from eval.classify.templates import read_map
from eval.retrieval.intervals import mean_interval

TOP, RESAMPLES, CHUNK = 5, 1000, 4096


@dataclass(frozen=True)
class Predicted:
    """What is expected to be predicted, of n images and C classes.

    Attributes:
        labels: int64 [n].
        rows, columns, weights: image rows[i] is taken for class columns[i] with probability weights[i].
        hits: float64 [n], the probability that the right class is among the first TOP (of C, where that is
            less).
        n_classes: C.
        tied: the share of images whose first place is tied.
    """

    labels: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    weights: np.ndarray
    hits: np.ndarray
    n_classes: int

    @property
    def tied(self) -> float:
        return float(1 - (self.weights == 1).sum() / len(self.labels))

    @property
    def right(self) -> np.ndarray:
        """float64 [n], the probability that an image is taken for its own class."""
        own = self.columns == self.labels[self.rows]
        return np.bincount(self.rows[own], self.weights[own], len(self.labels))

    def confusion(self) -> np.ndarray:
        """float64 [C, C]: images of class i that are taken for class j."""
        cells = self.labels[self.rows] * self.n_classes + self.columns
        return np.bincount(cells, self.weights, self.n_classes**2).reshape(self.n_classes, self.n_classes)

    def merged(self, parent: np.ndarray, n_parents: int) -> "Predicted":
        """The same after each class c became parent[c]; `hits` is then that of the first place."""
        cells, which = np.unique(self.rows * n_parents + parent[self.columns], return_inverse=True)
        weights = np.bincount(which, self.weights)
        weights[weights > 1 - 1e-12] = 1
        merged = Predicted(
            parent[self.labels], cells // n_parents, cells % n_parents, weights, self.hits, n_parents
        )
        return Predicted(merged.labels, merged.rows, merged.columns, merged.weights, merged.right, n_parents)


def predict(scores: torch.Tensor, labels: np.ndarray, tie: float) -> Predicted:
    """Args:
    scores: float [n, C], higher is better.
    labels: int64 [n], from 0.
    tie: scores that differ by no more are tied.
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
    return Predicted(labels, rows, columns, weights, hits, scores.shape[1])


class Missed(NamedTuple):
    """A picture that was taken for another class: its number in what it was read from, and both classes."""

    number: int
    label: int
    taken: int


def surest_mistakes(
    scores: torch.Tensor, labels: np.ndarray, numbers: np.ndarray, most: int = 24
) -> list[Missed]:
    """The pictures whose own class scores furthest below another, the furthest first.

    Args:
        scores: float [n, C]; labels, numbers: int64 [n].
    """
    best = scores.cpu().max(1)
    margin = (best.values - scores.cpu()[torch.arange(len(labels)), torch.from_numpy(labels)]).numpy()
    order = np.argsort(-margin, kind="stable")[:most].tolist()
    return [
        Missed(int(numbers[at]), int(labels[at]), int(best.indices[at])) for at in order if margin[at] > 0
    ]


def f1_of(tp: np.ndarray, support: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Mean per-class accuracy (of classes with images), and F1 as scikit-learn has it: macro over classes
    that occur or are predicted.
    """
    occurs, known = support > 0, support + predicted > 0
    f1 = 2 * tp / np.where(known, support + predicted, 1)
    return {
        "mean_per_class": float((tp[occurs] / support[occurs]).mean()),
        "macro_f1": float(f1[known].mean()),
        "weighted_f1": float((f1 * support).sum() / support.sum()),
    }


def summarize(found: Predicted, groups: np.ndarray) -> dict[str, dict]:
    """{"metrics": name -> fraction, "intervals": name -> [low, high]}, 95 %, by bootstrap over groups int64
    [n].

    Intervals of means are eval.retrieval.intervals.mean_interval's; those of F1 and of the mean per class are
    percentiles over resampled groups too."""
    confusion, (names, members) = found.confusion(), np.unique(groups, return_inverse=True)
    sums = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    top1, top = mean_interval(found.right, groups), mean_interval(found.hits, groups)
    metrics = {"top1": top1.value, f"top{TOP}": top.value, **f1_of(*sums)}
    rng, right, drawn = np.random.default_rng(0), found.right, []
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names)).astype(float)[
            members
        ]
        parts = (
            (found.labels, times * right),
            (found.labels, times),
            (found.columns, times[found.rows] * found.weights),
        )
        drawn.append(
            list(f1_of(*(np.bincount(where, what, found.n_classes) for where, what in parts)).values())
        )
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    intervals = {"top1": [top1.low, top1.high], f"top{TOP}": [top.low, top.high]}
    intervals |= {name: [float(low[at]), float(high[at])] for at, name in enumerate(f1_of(*sums))}
    metrics |= {
        "tied": found.tied,
        "chance/top1": 1 / found.n_classes,
        f"chance/top{TOP}": min(TOP, found.n_classes) / found.n_classes,
    }
    metrics["largest_class"] = float(sums[1].max() / sums[1].sum())
    return {"metrics": metrics, "intervals": intervals}


def per_class(found: Predicted, classes: list[str]) -> dict[str, dict[str, float]]:
    """Class -> its images, recall and F1."""
    confusion = found.confusion()
    tp, support, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    f1 = 2 * tp / np.maximum(support + predicted, 1e-300)
    recall = tp / np.maximum(support, 1)
    return {
        name: {"n": int(support[at]), "recall": float(recall[at]), "f1": float(f1[at])}
        for at, name in enumerate(classes)
    }


def read_parents(path: Path, classes: list[str]) -> dict[str, str]:
    """{child: parent}; children are classes, parents may be.

    Raises:
        UserError: a child is no class, or a parent is a child itself.
    """
    tree = read_map(path)
    for child, parent in tree.items():
        if child not in classes:
            near = difflib.get_close_matches(child, classes, n=1)
            raise UserError(
                f"{path}: {child!r} is no class of the"
                f" data{f'; perhaps you meant {near[0]!r}' if near else ''}; name its classes"
            )
        if parent in tree:
            raise UserError(
                f"{path}: {parent!r}, parent of {child!r}, is a child itself; one level of parents is wanted"
            )
    return tree


def hierarchy(
    scores: torch.Tensor,
    labels: np.ndarray,
    groups: np.ndarray,
    classes: list[str],
    tree: dict[str, str],
    tie: float,
) -> dict:
    """Overlapping classes at two levels, each as summarize() has it.

    parent: all images; the true class and the predicted one are replaced by their parents, where they have
        one, so a siamese
    that is called a cat, or a cat that is called a siamese, is right.
    child: images whose class is a child, with the children alone to choose from.

    Args:
        scores: float [n, C].
        labels, groups: int64 [n].
        tree: {child: parent}.
    """
    tops = [tree.get(name, name) for name in classes]
    parents = sorted(set(tops))
    parent = np.array([parents.index(top) for top in tops])
    children = np.array([at for at, name in enumerate(classes) if name in tree], np.int64)
    merged = summarize(predict(scores, labels, tie).merged(parent, len(parents)), groups)
    for part in (
        merged.values()
    ):  # guessing chooses among classes, of which parents have different numbers; and top-5 is of classes
        for name in (f"top{TOP}", f"chance/top{TOP}", "chance/top1"):
            part.pop(name, None)
    merged["metrics"]["chance/top1"] = float((np.bincount(parent)[parent[labels]] / len(classes)).mean())
    result = {"parent": {"n_images": len(labels), "n_classes": len(parents), **merged}}
    if (rows := np.flatnonzero(np.isin(labels, children))).size:
        own = predict(
            scores[torch.from_numpy(rows)][:, torch.from_numpy(children)],
            np.searchsorted(children, labels[rows]),
            tie,
        )
        result["child"] = {"n_images": len(rows), "n_classes": len(children), **summarize(own, groups[rows])}
    return result


def write_confusion_csv(path: Path, confusion: np.ndarray, classes: list[str]) -> None:
    """A row per true class, a column per predicted one; fractions come from ties."""
    with atomic_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["true class", *classes])
        writer.writerows(
            [name, *(f"{value:.10g}" for value in row)] for name, row in zip(classes, confusion, strict=True)
        )
