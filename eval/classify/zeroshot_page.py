"""Zero-shot results for people: a table of several models, and a page for each model."""

from pathlib import Path

import numpy as np

from data_prep.html import data_uri
from data_prep.html import write_page as write_html
from data_prep.tables import Table, are, counted, percent
from eval.classify.features import in_rgb
from eval.classify.labelled import Labelled
from eval.classify.metrics import NAMES, TOP, Mistake
from eval.report.names import with_display_names
from eval.report.plots import matrix, svg, write_png
from train.metrics import METRICS, show, show_difference, show_of

TEMPLATE = Path(__file__).with_name("zeroshot.html")
SIDE_PX, MOST_LISTED = 128, 5


def write_page(
    path: Path, result: dict, confusion: np.ndarray, mistakes: list[Mistake], data: Labelled
) -> None:
    """Write the page of one model's result, and its confusion matrix, float [C, C], as a PNG beside it."""
    (shown,), figure = with_display_names([result]), matrix(confusion, data.classes)
    examples = [
        {
            "image": data_uri(in_rgb(data.read(mistake.number)), SIDE_PX),
            "name": data.names[mistake.number],
            "label": data.classes[mistake.label],
            "predicted": data.classes[mistake.predicted],
        }
        for mistake in mistakes
    ]
    write_html(
        path,
        TEMPLATE,
        title=f"Zero-shot classification by {shown['model']}",
        drawing=svg(figure),
        parts=result_parts([shown]),
        mistakes=examples,
        classes=class_table(result, confusion, data.classes),
    )
    write_png(path.with_suffix(".png"), figure)


def class_table(result: dict, confusion: np.ndarray, classes: list[str]) -> Table:
    """Class, images, recall, F1, most frequent wrong prediction; lowest recall first, empty classes last."""
    rows = []
    for name, values in sorted(
        result["classes"].items(), key=lambda item: (item[1]["n"] == 0, item[1]["recall"])
    ):
        wrong = confusion[classes.index(name)].copy()
        wrong[classes.index(name)] = 0
        most = f"{classes[wrong.argmax()]} ({wrong.max():.4g})" if wrong.max() else ""
        rows.append([name, str(values["n"]), percent(values["recall"]), percent(values["f1"]), most])
    return Table(["class", "images", "recall, %", "F1, %", "most frequent wrong prediction"], rows)


def result_parts(results: list[dict]) -> list[str | Table]:
    """Results on the same data, side by side; the first model is the baseline."""
    first = results[0]
    data = (
        f"{first['n_images']} images, {first['n_classes']} classes ({first['data']});"
        f" templates: {first['templates']}"
    )
    parts: list[str | Table] = ["\n".join([data, *skipped_images(first, "scored")])]
    for level in ("", "parent", "child"):
        at_level = [result[level] if level else result for result in results if not level or level in result]
        if not at_level:
            continue
        if level:
            parts.append(
                f"{level} level, {at_level[0]['n_images']} images, {at_level[0]['n_classes']} classes"
            )
        columns = [result["model"] for result in results]
        parts.append(metric_table(dict(zip(columns, at_level, strict=True))))
    lines = notes(first["n_classes"], first["metrics"])
    if any(result["metrics"]["tie_rate"] for result in results):
        rates = ", ".join(f"{result['metrics']['tie_rate']:.1%}" for result in results)
        lines.append(f"tied for the first place, counted in expectation: {rates}")
    for result in results[1:]:
        difference = show_difference("top1", result["difference"])
        lines.append(f"{result['model']}: top-1 minus that of {first['model']}, in points: {difference}")
    weights = ", ".join(result["weights_sha256"][:12] for result in results)
    return [*parts, "\n".join([*lines, f"weights: {weights}  data: {first['data_sha256'][:12]}"])]


def metric_table(results: dict[str, dict]) -> Table:
    """Metrics with 95 % intervals, a column for each of the results; "chance" is that of the first.

    Args:
        results: Title of the column -> {"metrics", "intervals"}.
    """
    first = next(iter(results.values()))["metrics"]
    rows = [
        [
            METRICS[name].title,
            show(name, first.get(f"chance/{name}")),
            *(show_of(result, name) for result in results.values()),
        ]
        for name in NAMES
        if name in first
    ]
    return Table(["metric [95 % interval]", "chance", *results], rows)


def skipped_images(result: dict, use: str) -> list[str]:
    """A line each for unreadable and unlabelled images, if there are any.

    Args:
        use: Of the sentence "3 unreadable images are not USE".
    """
    lines = []
    for reason, kind in (("unreadable", "unreadable image"), ("unlabelled", "image")):
        if skipped := result[reason]:
            listed = "; ".join(f"{name}: {why}" for name, why in skipped[:MOST_LISTED])
            more = "; ..." if len(skipped) > MOST_LISTED else ""
            images = counted(len(skipped), kind) + " without a usable label" * (reason == "unlabelled")
            lines.append(f"{images} {are(len(skipped))} not {use}: {listed}{more}")
    if duplicates := result["duplicates"]:
        repeat = "row repeats" if duplicates == 1 else "rows repeat"
        lines.append(f"{duplicates} {repeat} an image with the same label; each image counts once")
    return lines


def notes(n_classes: int, metrics: dict) -> list[str]:
    lines = [f"largest class: {metrics['largest_class']:.1%} of the images"]
    if n_classes < TOP:
        lines.append(f"top-{TOP} of {n_classes} classes is top-{n_classes}: always correct")
    return lines
