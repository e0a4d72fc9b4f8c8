"""Caption confusion as tables and as a page: accuracy, heatmaps of several models, hub captions."""

from pathlib import Path
from typing import NamedTuple

from data_prep.html import write_page
from data_prep.shards import Shards
from data_prep.tables import Table
from eval.report.images import Thumbnail, thumbnail
from eval.report.names import with_display_names
from eval.report.plots import heatmaps as heatmap_plot
from eval.report.plots import write_png

MAX_LISTED = 5


def confusion_parts(result: dict) -> list[str | Table]:
    """Chance and the models in rows, accuracy and its expectation for each column of texts; and hubs."""
    k = result["k"]
    lines = [
        f"{result['n_images']} images ({result['data']}), the text of each against {k} of other groups, seed"
        f" {result['seed']}. In brackets: 95 % intervals."
    ]
    titles = [""]
    for name, column in result["columns"].items():
        clipped = f", {column['clipped']} of them against fewer than {k}" if column["clipped"] else ""
        lines.append(
            f"{name}: {column['n_texts']} distinct texts, {column['n_scored']} images scored{clipped}"
        )
        if without := column["without_text"]:
            more = ", ..." if len(without) > MAX_LISTED else ""
            listed = ", ".join(without[:MAX_LISTED])
            lines.append(f"  {len(without)} images without a text are not scored: {listed}{more}")
        titles += [f"{name}, accuracy", f"{name}, over all draws"]
    chances = [f"{100 * column['chance']:.1f} %" for column in result["columns"].values() for _ in range(2)]
    rows = [["chance", *chances]]
    for model in result["models"]:
        scores = [
            model["columns"][name][score]
            for name in result["columns"]
            for score in ("accuracy", "over_all_draws")
        ]
        rows.append([model["model"], *map(_percent_interval, scores)])
    hubs = ["Hubs: captions that rank first for most images of other groups, with the number of these images"]
    for model in result["models"]:
        names = [f"{hub['caption']!r} {hub['wrong_firsts']:.4g}" for hub in model["hubs"][:3]]
        hubs.append(f"  {model['model']}: {', '.join(names) or 'none'}")
    return ["\n".join(lines), Table(titles, rows), "\n".join(hubs)]


def _percent_interval(score: dict[str, float]) -> str:
    return f"{100 * score['value']:.1f} % [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"


class Heatmap(NamedTuple):
    """One model's softmax over the captions for each image, in percent."""

    model: str
    logit_scale: float
    cells: list[list[float]]


class Hub(NamedTuple):
    """A caption that ranks first for `wrong_firsts` images of other groups, and some of these images."""

    caption: str
    wrong_firsts: float
    images: list[Thumbnail]


def heatmap_values(result: dict, shards: Shards) -> dict:
    """What the macro in heatmaps.html takes: captions, images, and a Heatmap for each model."""
    return {
        "captions": result["heatmap"]["captions"],
        "images": [thumbnail(shards, number) for number in result["heatmap"]["images"]],
        "models": [
            Heatmap(
                model["model"],
                model["logit_scale"],
                [[100 * cell for cell in row] for row in model["heatmap"]],
            )
            for model in result["models"]
        ],
    }


def write_confusion_page(path: Path, result: dict, shards: Shards) -> None:
    """Write the page of a result of eval.compare.confusion, and its heatmaps as a PNG beside it."""
    result = {**result, "models": with_display_names(result["models"])}
    hubs = [
        [
            Hub(hub["caption"], hub["wrong_firsts"], [thumbnail(shards, number) for number in hub["images"]])
            for hub in model["hubs"]
        ]
        for model in result["models"]
    ]
    write_page(
        path,
        Path(__file__).with_name("confusion.html"),
        title="Caption confusion",
        parts=confusion_parts(result),
        heatmaps=heatmap_values(result, shards),
        hubs=list(zip([model["model"] for model in result["models"]], hubs, strict=True)),
    )
    write_png(path.with_suffix(".png"), heatmap_plot(result["models"], result["heatmap"]["captions"]))
