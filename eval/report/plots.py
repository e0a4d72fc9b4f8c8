"""Plots by matplotlib: as SVG within a page, and as PNG beside it.

A page shows one SVG for each panel, so that a phone shows them below each other at their full size. SVGs are
transparent and black on white: page.html inverts them in the dark.
"""

import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_prep.atomic import atomic_file
from eval.retrieval.metrics import KS

MAX_NAMED = 40  # classes whose names fit beside a confusion matrix
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "0",
}


def svg(figure: Figure) -> Markup:
    """The figure as an <svg> element."""
    buffer = io.StringIO()
    _save(figure, buffer, "svg", {"Date": None})
    return Markup(buffer.getvalue()[buffer.getvalue().index("<svg") :])


def write_png(path: Path, figure: Figure) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, open(partial, "wb") as file:
        _save(figure, file, "png", None)


def _save(figure: Figure, file: IO, format: str, metadata: dict | None) -> None:
    with rc_context(STYLE), warnings.catch_warnings():
        # A caption may be in any script; a glyph that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        transparent = format == "svg"
        figure.savefig(
            file, format=format, dpi=150, bbox_inches="tight", metadata=metadata, transparent=transparent
        )


def _axes(rows: int, columns: int, width: float, height: float, **options) -> tuple[Figure, np.ndarray]:
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def short(name: str, max_length: int = 28) -> str:
    """A name that fits on an axis: of a path the last part, cut where it is still too long."""
    if len(name) > max_length:
        name = name.rstrip("/").rsplit("/", 1)[-1]
    if len(name) > max_length:
        name = f"{name[: max_length - 1]}…"
    return name.replace("$", r"\$")  # no mathematics


def directions_of(models: list[dict], directions: Iterable[str]) -> list[str]:
    """Those of the directions that all models have."""
    return [name for name in directions if all(f"{name}/R@1" in model["intervals"] for model in models)]


def recall(models: list[dict], directions: Iterable[str]) -> Figure:
    """R@1, R@5 and R@10 of each direction: a bar per model with its 95 % interval, and a dotted line at
    chance.

    Args:
        models: results of eval.retrieval.score.evaluate_full with their "model".
    """
    metrics = [f"R@{k}" for k in KS]
    directions = directions_of(models, directions)
    legend_columns = 3 if len(directions) > 1 else 1
    height = 2.6 + 0.18 * np.ceil((1 + len(models)) / legend_columns)
    figure, axes = _axes(1, len(directions), 3.2 * len(directions) + 0.4, height, sharey=True)
    for axis, direction in zip(axes[0], directions, strict=True):
        names = [f"{direction}/{metric}" for metric in metrics]
        for number, model in enumerate(models):
            _bars(axis, model, names, number, len(models))
        axis.hlines(
            [100 * models[0]["metrics"][f"chance/{name}"] for name in names],
            np.arange(len(names)) - 0.45,
            np.arange(len(names)) + 0.45,
            "black",
            "dotted",
            label="chance",
        )
        axis.set_title(direction.replace("_", " "), fontsize=10)
        axis.set_xticks(range(len(metrics)), metrics)
        axis.set_ylim(0, 100)
    axes[0, 0].set_ylabel("%, by group; 95 % intervals")
    legend = axes[0, 0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=legend_columns, frameon=False)
    return figure


def _bars(axis: Axes, model: dict, names: list[str], number: int, n_models: int) -> None:
    """One model's bars, the `number`th of `n_models` at each tick."""
    values = 100 * np.array([model["metrics"][name] for name in names])
    low, high = 100 * np.array([model["intervals"][name] for name in names]).T
    width = 0.8 / n_models
    axis.bar(
        np.arange(len(names)) + (number - (n_models - 1) / 2) * width,
        values,
        width * 0.92,
        yerr=np.abs(np.stack([values - low, high - values])),
        capsize=2,
        color=f"C{number}",
        label=short(model["model"]),
    )


def robustness(curves: dict[str, list[dict]], undegraded: float) -> Figure:
    """R@1 by level of degradation of the query images; see eval.retrieval.robustness.

    Args:
        undegraded: image_to_text/R@1 of the undegraded images; they find themselves, so image_to_image is 1.
    """
    figure, axes = _axes(1, len(curves), 2.6 * len(curves), 2.6, sharey=True)
    for axis, (degradation, points) in zip(axes[0], curves.items(), strict=True):
        for name, start in (("image_to_text/R@1", undegraded), ("image_to_image/R@1", 1.0)):
            values = [100 * start, *(100 * point[name] for point in points)]
            axis.plot(values, marker="o", label=name.removesuffix("/R@1").replace("_", " "))
        axis.set_xticks(range(len(points) + 1), ["none", *(f"{point['level']:g}" for point in points)])
        axis.set_title(degradation, fontsize=10)
        axis.set_ylim(0, 100)
    axes[0, 0].set_ylabel("R@1, %")
    legend, n_columns = axes[0, 0].get_legend_handles_labels(), 2 if len(curves) > 1 else 1
    figure.legend(*legend, loc="outside lower center", ncols=n_columns, frameon=False)
    return figure


def matrix(confusion: np.ndarray, classes: list[str]) -> Figure:
    """A confusion matrix in % of each row, with class names where they fit.

    Args:
        confusion: float [C, C], images of class i that are classified as class j.
    """
    shares = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1e-300)
    named = len(classes) <= MAX_NAMED
    side = min(9, 2.5 + 0.25 * len(classes)) if named else 7
    figure, axes = _axes(1, 1, side + 1.5, side)
    image = axes[0, 0].imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axes[0, 0].set(xlabel="classified as", ylabel="class")
    if named:
        axes[0, 0].set_xticks(range(len(classes)), [short(name) for name in classes], rotation=90)
        axes[0, 0].set_yticks(range(len(classes)), [short(name) for name in classes])
    figure.colorbar(image, label="% of the class's images", shrink=0.7)
    return figure


def heatmaps(models: list[dict], captions: list[str]) -> Figure:
    """Softmax over captions for each image, a panel per model, on one color scale; see
    eval.compare.confusion.
    """
    figure, axes = _axes(1, len(models), 1.6 + 3.4 * len(models), 4.6, sharey=True)
    names = [short(caption) for caption in captions]
    for axis, model in zip(axes[0], models, strict=True):
        cells = 100 * np.array(model["heatmap"])
        image = axis.imshow(cells, cmap="Blues", vmin=0, vmax=100)
        for (row, column), cell in np.ndenumerate(cells):
            if cell >= 0.5:
                color = "white" if cell > 60 else "black"
                axis.text(column, row, f"{cell:.0f}", ha="center", va="center", fontsize=6, color=color)
        axis.set_title(short(model["model"]), fontsize=10)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
    axes[0, 0].set_ylabel("image of")
    figure.colorbar(image, ax=axes[0].tolist(), label="% of a row", shrink=0.7)
    return figure


def wise_ft(points: list[dict]) -> Figure:
    """R@1 of WiSE-FT models on the data, against that on the retention set, or against alpha where there is
    none.
    """
    has_retention = "retention/mean/R@1" in points[0]
    figure, axes = _axes(1, 1, 4.5, 3)
    xs = [100 * point["retention/mean/R@1"] if has_retention else point["alpha"] for point in points]
    ys = [100 * point["mean/R@1"] for point in points]
    axes[0, 0].plot(xs, ys, marker="o")
    for x, y, point in zip(xs, ys, points, strict=True):
        axes[0, 0].annotate(f"{point['alpha']:g}", (x, y), (5, -9), textcoords="offset points")
    axes[0, 0].set(
        xlabel="R@1 on the retention set, %" if has_retention else "alpha, the weight of the last model",
        ylabel="R@1 on the data, %",
    )
    return figure


def histories(history: dict[str, list[dict]], heads: Iterable[str]) -> Figure:
    """Validation accuracy of heads, on one scale; see eval.classify.heads.

    Args:
        history: of each head: linear, by its regularization, and mlp, by epoch.
        heads: those to draw.
    """
    heads = list(heads)
    figure, axes = _axes(1, len(heads), 3.5 * len(heads), 2.6, sharey=True)
    accuracies = [100 * row["val_accuracy"] for rows in history.values() for row in rows]
    margin = max(1, (max(accuracies) - min(accuracies)) / 20)
    for axis, head in zip(axes[0], heads, strict=True):
        by, label = ("C", "C, the inverse of the regularization") if head == "linear" else ("epoch", "epoch")
        rows = history[head]
        axis.plot([row[by] for row in rows], [100 * row["val_accuracy"] for row in rows], marker="o")
        axis.set(
            title="MLP" if head == "mlp" else head,
            xlabel=label,
            xscale="log" if by == "C" else "linear",
            ylim=(min(accuracies) - margin, max(accuracies) + margin),
        )
    axes[0, 0].set_ylabel("validation accuracy, %")
    return figure
