"""A comparison as Markdown, and as a page with the captions that changed most."""

from pathlib import Path
from typing import NamedTuple

from data_prep.html import write_page
from data_prep.shards import Shards
from data_prep.tables import markdown_table
from eval.classify.zeroshot_page import table as zeroshot_text
from eval.compare.confusion_page import confusion_text, heatmap_values
from eval.report.images import thumbnail
from eval.report.plots import heatmaps as heatmap_plot
from eval.report.plots import recall, svg, write_png
from eval.report.plots import wise_ft as wise_ft_plot
from train.metrics import (
    COMPARE,
    DIRECTIONS,
    GROUP_DIRECTIONS,
    INSTANCE,
    METRICS,
    metrics_in,
    show,
    show_difference,
    show_of,
    title_of,
)

ROWS = (
    *(f"{direction}/{metric}" for direction in GROUP_DIRECTIONS for metric in metrics_in(COMPARE)),
    *(f"{INSTANCE}{direction}/R@1" for direction in DIRECTIONS),
    "calibration_error",
)
ZEROSHOT_ROWS = ("top1", "macro_f1")


class Change(NamedTuple):
    """A caption whose first relevant image moved.

    Attributes:
        image: number of a relevant image.
        found: number of the image that the last model ranks first.
        before, after: ranks of the first relevant image, by the first and by the last model.
    """

    caption: str
    image: int
    found: int
    before: float
    after: float


def comparison_rows(models: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table; the cells of all models but the first have their difference from the
    first.
    """
    columns = ["", *(model["model"] for model in models)]
    rows = [
        [title_of(name), *(_with_difference(model, name) for model in models)]
        for name in ROWS
        if all(name in model["metrics"] for model in models)
    ]
    if any(model.get("drift") for model in models):
        rows.append(
            ["cosine to the first model's features", *(_drift(model.get("drift")) for model in models)]
        )
    if "own_caption" in models[0]:
        scores = (model["own_caption"] for model in models)
        cells = (show("R@1", score["value"], [score["low"], score["high"]]) for score in scores)
        rows.append(["own caption first among 10", *cells])
    if "zeroshot" in models[0]:
        rows += [
            [f"zero-shot, {METRICS[name].title}", *(_zeroshot(model["zeroshot"], name) for model in models)]
            for name in ZEROSHOT_ROWS
        ]
    return columns, rows


def _with_difference(model: dict, name: str) -> str:
    difference = show_difference(name, model.get("differences", {}).get(name))
    return "; ".join(filter(None, (show_of(model, name), difference)))


def _drift(drift: dict | None) -> str:
    return f"images {drift['image_cosine']:.3f}, texts {drift['text_cosine']:.3f}" if drift else ""


def _zeroshot(result: dict, name: str) -> str:
    difference = show_difference(name, result.get("difference")) if name == "top1" else ""
    return "; ".join(filter(None, (show_of(result, name), difference)))


def _description(result: dict) -> str:
    return f"{result['n_images']} images, {result['n_texts']} captions ({result['data']})"


def comparison_markdown(result: dict) -> str:
    """The comparison as Markdown: figures with 95 % intervals and paired differences from the first model."""
    parts = [_description(result), markdown_table(*comparison_rows(result["models"]))]
    if "retention" in result:
        retention = result["retention"]
        parts += [
            "**Retention set: what was forgotten**",
            _description(retention),
            markdown_table(*comparison_rows(retention["models"])),
        ]
    if "wise_ft" in result:
        points = result["wise_ft"]
        names = ["mean/R@1", *(["retention/mean/R@1"] if "retention/mean/R@1" in points[0] else [])]
        rows = [[f"{point['alpha']:g}", *(show(name, point[name]) for name in names)] for point in points]
        titles = ["mean R@1", "mean R@1 on the retention set"][: len(names)]
        parts.append(markdown_table(["alpha, the weight of the last model", *titles], rows))
    if "saved" in result:
        parts.append(f"The WiSE-FT model was written to `{result['saved']}`.")
    return "\n\n".join(parts) + "\n"


def write_comparison_page(
    path: Path, result: dict, changes: tuple[list[Change], list[Change]], shards: Shards
) -> None:
    """The page, and its plots as PNG beside it: R@k under the page's name, heatmaps.png and wise_ft.png.

    Args:
        changes: for the better, and for the worse.
    """
    confusion, plot = result["confusion"], recall(result["models"], GROUP_DIRECTIONS)
    wise_ft = wise_ft_plot(result["wise_ft"]) if "wise_ft" in result else None
    zeroshot = [
        {"model": model["model"], "templates": result["templates"], **model["zeroshot"]}
        for model in result["models"]
        if "zeroshot" in model
    ]
    sections = [("", result)]
    if "retention" in result:
        sections.append(("Retention set: what was forgotten", result["retention"]))
    write_page(
        path,
        Path(__file__).with_name("compare.html"),
        title="Comparison of models",
        plot=svg(plot),
        sections=[
            (
                title,
                f"{_description(section)}; differences are from the first model",
                *comparison_rows(section["models"]),
            )
            for title, section in sections
        ],
        zeroshot=zeroshot_text(zeroshot) if zeroshot else "",
        wise_ft=svg(wise_ft) if wise_ft else "",
        last_model=result["models"][-1]["model"],
        changes=[
            (
                title,
                [
                    (change, thumbnail(shards, change.image), thumbnail(shards, change.found))
                    for change in moved
                ],
            )
            for title, moved in zip(("What got better", "What got worse"), changes, strict=True)
        ],
        confusion=confusion_text(confusion),
        heatmaps=heatmap_values(confusion, shards),
    )
    write_png(path.with_suffix(".png"), plot)
    write_png(
        path.with_name("heatmaps.png"), heatmap_plot(confusion["models"], confusion["heatmap"]["captions"])
    )
    if wise_ft:
        write_png(path.with_name("wise_ft.png"), wise_ft)
