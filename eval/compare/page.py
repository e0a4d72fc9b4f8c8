"""A comparison for people: a Markdown table, and a page with the pictures that moved most."""

import html
from pathlib import Path

from data_prep.shards import Shards
from data_prep.tables import markdown_table
from eval.classify.zeroshot_page import NAMES
from eval.classify.zeroshot_page import table as zeroshot_table
from eval.compare.confusion_page import STYLE, heatmaps
from eval.compare.confusion_page import table as confusion_table
from eval.report import html as sheet
from eval.report.plots import heatmaps as drawn_heatmaps
from eval.report.plots import mixtures, recall, svg, write_png

ROWS = {
    "image_to_text/R@1": "image to text, R@1",
    "image_to_text/R@10": "image to text, R@10",
    "image_to_text/mean_rank": "image to text, mean rank",
    "text_to_image/R@1": "text to image, R@1",
    "text_to_image/R@10": "text to image, R@10",
    "text_to_image/mean_rank": "text to image, mean rank",
    "image_to_image/mAP": "image to image, mAP",
    "legacy_diagonal/image_to_text/R@1": "image to text, R@1 by instance",
    "legacy_diagonal/text_to_image/R@1": "text to image, R@1 by instance",
    "calibration_error": "calibration error (ECE)",
}
OF_QUERIES = {"mean_rank": "rank"}  # how a measure is called where each query has one


def cells(models: list[dict]) -> list[list[str]]:
    """The table: a header, then a row per measure; the first model's column is what the others' differences
    are to.
    """
    rows = [["", *(model["model"] for model in models)]]
    for name, title in ROWS.items():
        if all(name in model["metrics"] for model in models):
            rows.append([title, *(_cell(model, name) for model in models)])
    if any(model.get("drift") for model in models):
        shown = (model.get("drift") for model in models)
        rows.append(["cosine to the first model's features", *(_drift(each) for each in shown)])
    if "own_caption" in models[0]:
        shares = ([100 * each for each in model["own_caption"].values()] for model in models)
        rows.append(
            [
                "own caption first among 10",
                *(f"{value:.1f} % [{low:.1f}, {high:.1f}]" for value, low, high in shares),
            ]
        )
    if "zeroshot" in models[0]:
        rows += [
            [f"zero-shot, {NAMES[name]}", *(_classes(model["zeroshot"], name) for model in models)]
            for name in ("top1", "macro_f1")
        ]
    return rows


def _classes(found: dict, name: str) -> str:
    low, high = found["intervals"][name]
    text = f"{100 * found['metrics'][name]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    if name == "top1" and "difference" in found:
        value, low, high, p = found["difference"]
        text += f"; {100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}], p = {p:.2g}"
    return text


def _drift(found: dict | None) -> str:
    return f"images {found['image_cosine']:.3f}, texts {found['text_cosine']:.3f}" if found else ""


def _cell(model: dict, name: str) -> str:
    value, measure = model["metrics"][name], name.rsplit("/", 1)[-1]
    scale, unit = (1, "") if measure == "mean_rank" else (100, " %")
    text = f"{scale * value:.1f}{unit}"
    if interval := model.get("intervals", {}).get(name):
        text += f" [{scale * interval[0]:.1f}, {scale * interval[1]:.1f}]"
    direction = name.rsplit("/", 1)[0]
    if change := model.get("differences", {}).get(f"{direction}/{OF_QUERIES.get(measure, measure)}"):
        text += (
            f"; {scale * change[0]:+.1f} [{scale * change[1]:+.1f}, {scale * change[2]:+.1f}], p ="
            f" {change[3]:.2g}"
        )
    return text


def markdown(result: dict) -> str:
    """The comparison as Markdown; in brackets 95 % intervals, then paired differences to the first model."""
    parts = [_markdown_table(result)]
    if "control" in result:
        parts += ["**Control: what was forgotten**", _markdown_table(result["control"])]
    if result.get("mixtures"):
        lines = [
            "| share of the last model's weights | R@1, both ways | on the control set |",
            "|---|---|---|",
        ]
        for one in result["mixtures"]:
            control = f"{100 * one['retention/mean/R@1']:.1f} %" if "retention/mean/R@1" in one else ""
            lines.append(f"| {one['alpha']:g} | {100 * one['mean/R@1']:.1f} % | {control} |")
        parts.append("\n".join(lines))
    if "saved" in result:
        parts.append(f"The mixture was written to `{result['saved']}`.")
    return "\n\n".join(parts) + "\n"


def _markdown_table(found: dict) -> str:
    said = f"{found['n_images']} images, {found['n_texts']} captions ({found['data']})"
    titles, *rows = cells(found["models"])
    return f"{said}\n\n{markdown_table(titles, rows)}"


def write_page(path: Path, result: dict, moved: dict[str, list[dict]], shards: Shards) -> None:
    """The page, and its drawings as PNG beside it: R@k under the page's name, heatmaps.png and mixtures.png.

    Args:
        moved: of eval.compare.compare.moves.
    """
    body = [_html_table(result)]
    if "zeroshot" in result["models"][0]:
        body += ["<h2>Zero-shot classification</h2>", sheet.pre(zeroshot_table(_zeroshot(result)))]
    if "control" in result:
        body += ["<h2>Control: what was forgotten</h2>", _html_table(result["control"])]
    if result.get("mixtures"):
        drawing = mixtures(result["mixtures"])
        body += ["<h2>Mixtures of the first and the last model's weights</h2>", svg(drawing)]
        write_png(path.with_name("mixtures.png"), drawing)
    last = html.escape(result["models"][-1]["model"])
    for name, title in (("better", "What got better"), ("worse", "What got worse")):
        body.append(
            f"<h2>{title} <small>rank of the right picture, from the first model to {last}</small></h2>"
        )
        figures = []
        for one in moved[name]:
            said = (
                f"{html.escape(one['caption'])}<br><small>{one['before']:.4g} &rarr;"
                f" {one['after']:.4g}</small>"
            )
            wrong = f" {sheet.picture(shards, one['found'])}" if one["found"] != one["image"] else ""
            figures.append(sheet.figure(sheet.picture(shards, one["image"]) + wrong, said))
        body.append(f'<div class="row">{"".join(figures) or "None."}</div>')
    body.append(
        "<p><small>Left: a right picture; beside it, where it is another, what the last model finds"
        " first.</small></p>"
    )
    body += [
        "<h2>Captions among others</h2>",
        sheet.pre(confusion_table(result["confusion"])),
        *heatmaps(result["confusion"], shards),
    ]
    write_png(
        path.with_name("heatmaps.png"),
        drawn_heatmaps(result["confusion"]["models"], result["confusion"]["heatmap"]["captions"]),
    )
    sheet.write(
        path,
        "Comparison of models",
        body,
        recall(result["models"], ("image_to_text", "text_to_image", "image_to_image")),
        STYLE,
    )


def _zeroshot(result: dict) -> list[dict]:
    return [
        {"model": model["model"], "templates": result["templates"], **model["zeroshot"]}
        for model in result["models"]
    ]


def _html_table(found: dict) -> str:
    said = html.escape(
        f"{found['n_images']} images, {found['n_texts']} captions ({found['data']}); changes are to the first"
    )
    return f"<p>{said}</p>{sheet.table(cells(found['models']))}"
