"""A comparison as Markdown, and as a page with the captions that changed most."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data_prep.html import write_page
from data_prep.shards import Shards
from data_prep.tables import Table, text_of
from eval.classify.zeroshot_page import result_parts as zeroshot_parts
from eval.compare.confusion_page import confusion_parts, heatmap_values
from eval.report.images import Thumbnail, thumbnail
from eval.report.names import with_display_names
from eval.report.plots import directions_of, recall, svg, write_png
from eval.report.plots import heatmaps as heatmap_plot
from eval.report.plots import wise_ft as wise_ft_plot
from train.metrics import (
    COMPARE,
    DIRECTIONS,
    GROUP_DIRECTIONS,
    INSTANCE,
    METRICS,
    difference_cells,
    metrics_in,
    show,
    show_of,
    title_of,
)

ROWS = (
    *(f"{direction}/{metric}" for direction in GROUP_DIRECTIONS for metric in metrics_in(COMPARE)),
    *(f"{INSTANCE}{direction}/R@1" for direction in DIRECTIONS),
    "calibration_error",
)
ZEROSHOT_ROWS = ("top1", "macro_f1")
DIFFERENCE_COLUMNS = ("difference", "p")
WORSE_CALIBRATION = 0.01  # an increase of the error that deserves a remark
THUMBNAIL_PX = 128


class Change(NamedTuple):
    """A caption whose first relevant image moved.

    Attributes:
        image: number of a relevant image.
        found_before, found: numbers of the images that the first and the last model rank first.
        before, after: ranks of the first relevant image, by the first and by the last model.
    """

    caption: str
    image: int
    found_before: int
    found: int
    before: float
    after: float


def comparison_table(models: list[dict]) -> Table:
    """The metrics of all models; after each but the first, its difference from the first, and p."""
    base, *others = models
    columns = ["", base["model"]]
    for model in others:
        columns += [model["model"], *DIFFERENCE_COLUMNS]
    rows = [
        _row(title_of(name), models, partial(show_of, name=name), name)
        for name in ROWS
        if all(name in model["metrics"] for model in models)
    ]
    if any(model.get("drift") for model in others):
        rows.append(_row("cosine to the first model's features", models, _drift))
    if "own_caption" in base:
        rows.append(_row("own caption first among 10", models, _own_caption))
    if "zeroshot" in base:
        classified = [
            {**model["zeroshot"], "differences": {"top1": model["zeroshot"].get("difference")}}
            for model in models
        ]
        rows += [
            _row(f"zero-shot, {METRICS[name].title}", classified, partial(show_of, name=name), name)
            for name in ZEROSHOT_ROWS
        ]
    return Table(columns, rows)


def _row(title: str, models: list[dict], cell: Callable[[dict], str], name: str = "") -> list[str]:
    """Args:
    cell: the text for a model.
    name: of the metric that may have differences.
    """
    base, *others = models
    cells = [title, cell(base)]
    for model in others:
        cells += [cell(model), *difference_cells(name, model.get("differences", {}).get(name))]
    return cells


def _drift(model: dict) -> str:
    drift = model.get("drift")
    return f"images {drift['image_cosine']:.3f}, texts {drift['text_cosine']:.3f}" if drift else ""


def _own_caption(model: dict) -> str:
    score = model["own_caption"]
    return show("R@1", score["value"], [score["low"], score["high"]])


def remarks(models: list[dict]) -> list[str]:
    """What the table shows but is easily overlooked: calibration that is worse than the first model's."""
    name = "calibration_error"
    base, *others = (model["metrics"][name] for model in models)
    return [
        f"The calibration of {model['model']} is worse: its {METRICS[name].title} is {show(name, error)},"
        f" that of {models[0]['model']} {show(name, base)}. Ranks are not affected, but do not take its"
        " softmax for probabilities before a temperature is fitted on held-out data."
        for model, error in zip(models[1:], others, strict=True)
        if error - base >= WORSE_CALIBRATION
    ]


def _description(result: dict) -> str:
    return f"{result['n_images']} images, {result['n_texts']} captions ({result['data']})"


def comparison_markdown(result: dict) -> str:
    """The comparison as Markdown: figures with 95 % intervals and paired differences from the first model."""
    parts = [_description(result), comparison_table(result["models"]), *remarks(result["models"])]
    if "retention" in result:
        retention = result["retention"]
        parts += [
            "**Retention set: what was forgotten**",
            _description(retention),
            comparison_table(retention["models"]),
        ]
    if "wise_ft" in result:
        points = result["wise_ft"]
        names = ["mean/R@1", *(["retention/mean/R@1"] if "retention/mean/R@1" in points[0] else [])]
        rows = [[f"{point['alpha']:g}", *(show(name, point[name]) for name in names)] for point in points]
        titles = ["mean R@1", "mean R@1 on the retention set"][: len(names)]
        parts.append(Table(["alpha, the weight of the last model", *titles], rows))
    if "saved" in result:
        parts.append(f"The WiSE-FT model was written to `{result['saved']}`.")
    return text_of(parts) + "\n"


def write_comparison_page(
    path: Path, result: dict, changes: tuple[list[Change], list[Change]], shards: Shards
) -> None:
    """The page, and its plots as PNG beside it: R@k under the page's name, heatmaps.png and wise_ft.png.

    Args:
        changes: for the better, and for the worse.
    """
    models, confusion = with_display_names(result["models"]), result["confusion"]
    confusion = {**confusion, "models": with_display_names(confusion["models"])}
    sections = [("", _description(result), comparison_table(models), remarks(models))]
    if "retention" in result:
        retention = result["retention"]
        table = comparison_table(with_display_names(retention["models"]))
        sections.append(("Retention set: what was forgotten", _description(retention), table, []))
    zeroshot = [
        {"model": model["model"], "templates": result["templates"], **model["zeroshot"]}
        for model in models
        if "zeroshot" in model
    ]
    directions = directions_of(models, GROUP_DIRECTIONS)
    wise_ft = wise_ft_plot(result["wise_ft"]) if "wise_ft" in result else None
    titles = ("What got better", "What got worse")
    write_page(
        path,
        Path(__file__).with_name("compare.html"),
        title=f"Comparison of {', '.join(model['model'] for model in models)}",
        plots=[svg(recall(models, [direction])) for direction in directions],
        sections=sections,
        zeroshot=zeroshot_parts(zeroshot) if zeroshot else [],
        wise_ft=svg(wise_ft) if wise_ft else "",
        models=(models[0]["model"], models[-1]["model"]),
        changes=[
            (title, [_strip(change, shards) for change in moved])
            for title, moved in zip(titles, changes, strict=True)
        ],
        confusion=confusion_parts(confusion),
        heatmaps=heatmap_values(confusion, shards),
    )
    write_png(path.with_suffix(".png"), recall(models, GROUP_DIRECTIONS))
    write_png(
        path.with_name("heatmaps.png"), heatmap_plot(confusion["models"], confusion["heatmap"]["captions"])
    )
    if wise_ft:
        write_png(path.with_name("wise_ft.png"), wise_ft)


def _strip(change: Change, shards: Shards) -> tuple[Change, list[Thumbnail]]:
    """A change with its images: relevant, first before, first now."""
    numbers = (change.image, change.found_before, change.found)
    return change, [thumbnail(shards, number, THUMBNAIL_PX) for number in numbers]
