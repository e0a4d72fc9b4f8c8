"""Figures as pictures, where people would rather look; matplotlib draws, into SVG within a page and into PNG
beside it.
"""

import io
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from data_prep.atomic import atomic_file

MOST_NAMED = 40  # classes whose names fit beside a matrix
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "0",
}


def svg(figure: Figure) -> str:
    """The drawing as an <svg> element, to stand in a page."""
    buffer = io.StringIO()
    _save(figure, buffer, "svg", {"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def write_png(path: Path, figure: Figure) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, open(partial, "wb") as file:
        _save(figure, file, "png", None)


def _save(figure: Figure, file, kind: str, metadata: dict | None) -> None:
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph", UserWarning
        )  # a caption may be in any script; an empty box is drawn
        figure.savefig(file, format=kind, dpi=150, bbox_inches="tight", metadata=metadata)


def _axes(rows: int, columns: int, width: float, height: float, **options) -> tuple[Figure, np.ndarray]:
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def short(name: str, most: int = 28) -> str:
    """A name that fits on an axis; the end of a path says more than its beginning."""
    name = name.rstrip("/").rsplit("/", 1)[-1] if len(name) > most else name
    return name.replace("$", r"\$") if len(name) <= most else f"{name[: most - 1]}…".replace("$", r"\$")


def recall(models: list[dict], directions: Iterable[str]) -> Figure:
    """R@1, R@5 and R@10 of each direction, a bar per model with its 95 % interval, and a line where guessing
    is.

    Args:
        models: results of eval.retrieval.score.examine with their "model".
    """
    names = ("R@1", "R@5", "R@10")
    directions = [name for name in directions if all(f"{name}/R@1" in model["intervals"] for model in models)]
    figure, axes = _axes(1, len(directions), 3.2 * len(directions), 3, sharey=True)
    width = 0.8 / len(models)
    for at, (axis, direction) in enumerate(zip(axes[0], directions, strict=True)):
        for number, model in enumerate(models):
            values = 100 * np.array([model["metrics"][f"{direction}/{name}"] for name in names])
            ends = 100 * np.array([model["intervals"][f"{direction}/{name}"] for name in names]).T
            places = np.arange(len(names)) + (number - (len(models) - 1) / 2) * width
            error = np.abs(np.stack([values - ends[0], ends[1] - values]))
            axis.bar(
                places,
                values,
                width * 0.92,
                yerr=error,
                capsize=2,
                color=f"C{number}",
                label=short(model["model"]),
            )
        guesses = [100 * models[0]["metrics"][f"chance/{direction}/{name}"] for name in names]
        axis.hlines(
            guesses,
            np.arange(len(names)) - 0.45,
            np.arange(len(names)) + 0.45,
            "black",
            "dotted",
            label="chance",
        )
        axis.set_title(direction.replace("_", " "), fontsize=10)
        axis.set_xticks(range(len(names)), names)
        axis.set_ylim(0, 100)
        if not at:
            axis.set_ylabel("%, by group; 95 % intervals")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def degraded(curves: dict[str, list[dict]], whole: float) -> Figure:
    """R@1 of query images that are ever more shrunk, blurred or cut off; see eval.retrieval.robustness."""
    figure, axes = _axes(1, len(curves), 2.6 * len(curves), 2.4, sharey=True)
    for axis, (kind, levels) in zip(axes[0], curves.items(), strict=True):
        for name, first in (("image_to_text/R@1", whole), ("image_to_image/R@1", 1.0)):
            axis.plot(
                [100 * first, *(100 * one[name] for one in levels)], marker="o", label=name.replace("_", " ")
            )
        axis.set_xticks(range(len(levels) + 1), ["whole", *(f"{one['level']:g}" for one in levels)])
        axis.set_title(kind, fontsize=10)
        axis.set_ylim(0, 100)
    axes[0, 0].set_ylabel("R@1, %")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def matrix(confusion: np.ndarray, classes: list[str]) -> Figure:
    """float [C, C], images of class i taken for class j, as shares of each row; names where there is room for
    them.
    """
    shares = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1e-300)
    named = len(classes) <= MOST_NAMED
    side = min(9, 2.5 + 0.25 * len(classes)) if named else 7
    figure, axes = _axes(1, 1, side + 1.5, side)
    image = axes[0, 0].imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axes[0, 0].set(xlabel="taken for", ylabel="class")
    if named:
        axes[0, 0].set_xticks(range(len(classes)), [short(name) for name in classes], rotation=90)
        axes[0, 0].set_yticks(range(len(classes)), [short(name) for name in classes])
    figure.colorbar(image, label="% of the class's images", shrink=0.7)
    return figure


def heatmaps(models: list[dict], captions: list[str]) -> Figure:
    """Softmax over captions for each image, a panel per model, all on one color scale; see
    eval.compare.confusion.
    """
    figure, axes = _axes(1, len(models), 1.6 + 3.4 * len(models), 4.6, sharey=True)
    for axis, model in zip(axes[0], models, strict=True):
        cells = 100 * np.array(model["heatmap"])
        image = axis.imshow(cells, cmap="Blues", vmin=0, vmax=100)
        for (row, column), cell in np.ndenumerate(cells):
            if cell >= 0.5:
                axis.text(
                    column,
                    row,
                    f"{cell:.0f}",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if cell > 60 else "black",
                )
        axis.set_title(short(model["model"]), fontsize=10)
        axis.set_xticks(
            range(len(captions)), [short(caption) for caption in captions], rotation=90, fontsize=7
        )
        axis.set_yticks(range(len(captions)), [short(caption) for caption in captions], fontsize=7)
    axes[0, 0].set_ylabel("image of")
    figure.colorbar(image, ax=axes[0].tolist(), label="% of a row", shrink=0.7)
    return figure


def mixtures(points: list[dict]) -> Figure:
    """R@1 of mixtures of weights, on the data against on the control set, or against the share where there is
    none.
    """
    across = "control/mean/R@1" if "control/mean/R@1" in points[0] else "alpha"
    scale = 100 if across != "alpha" else 1
    figure, axes = _axes(1, 1, 4.5, 3)
    places = [(scale * one[across], 100 * one["mean/R@1"]) for one in points]
    axes[0, 0].plot(*zip(*places, strict=True), marker="o")
    for place, one in zip(places, points, strict=True):
        axes[0, 0].annotate(f" {one['alpha']:g}", place)
    axes[0, 0].set(
        xlabel="R@1 on the control set, %" if scale == 100 else "share of the last model",
        ylabel="R@1 on the data, %",
    )
    return figure


def histories(linear: list[dict], mlp: list[dict]) -> Figure:
    """Validation accuracy of the linear probe by its regularization, and of the MLP by epoch; see
    eval.classify.heads.
    """
    figure, axes = _axes(1, 2, 7, 2.6, sharey=True)
    axes[0, 0].semilogx(
        [row["C"] for row in linear], [100 * row["val_accuracy"] for row in linear], marker="o"
    )
    axes[0, 0].set(
        title="linear", xlabel="C, the inverse of the regularization", ylabel="validation accuracy, %"
    )
    axes[0, 1].plot([row["epoch"] for row in mlp], [100 * row["val_accuracy"] for row in mlp], marker="o")
    axes[0, 1].set(title="MLP", xlabel="epoch")
    return figure
