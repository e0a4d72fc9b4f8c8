"""A comparison for people: a Markdown table, and a page with the pictures that moved most."""

import html
from pathlib import Path

from data_prep.atomic import atomic_file
from data_prep.shards import Shards
from eval.confusion_page import picture

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

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Comparison of models</title>
<style>
 :root {{ color-scheme: light dark; }}
 body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }}
 .wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; }} td, th {{ padding: .2rem .8rem; text-align: right; }}
 td:first-child, th:first-child {{ text-align: left; }} tr + tr {{ border-top: 1px solid #8884; }} th {{ font-weight: 600; }}
 h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }} small {{ opacity: .75; }} svg {{ max-width: 30rem; display: block; }}
 .row {{ display: flex; flex-wrap: wrap; gap: .8rem; }} figure {{ margin: 0; width: 9rem; }} figcaption {{ font-size: .8rem; }}
 img {{ width: 4rem; height: 4rem; object-fit: contain; background: #fff; border: 1px solid #8886; border-radius: .3rem; }}
</style>
<h1>Comparison of models</h1>
{body}
</html>
"""


def cells(models: list[dict]) -> list[list[str]]:
    """The table: a header, then a row per measure; the first model's column is what the others' differences are to."""
    rows = [["", *(model["model"] for model in models)]]
    for name, title in ROWS.items():
        if all(name in model["metrics"] for model in models):
            rows.append([title, *(_cell(model, name) for model in models)])
    if any(model.get("drift") for model in models):
        shown = (model.get("drift") for model in models)
        rows.append(["cosine to the first model's features", *(_drift(each) for each in shown)])
    return rows


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
        text += f"; {scale * change[0]:+.1f} [{scale * change[1]:+.1f}, {scale * change[2]:+.1f}], p = {change[3]:.2g}"
    return text


def markdown(result: dict) -> str:
    """The comparison as Markdown; in brackets 95 % intervals, then paired differences to the first model."""
    parts = [_markdown_table(result)]
    if "control" in result:
        parts += ["**Control: what was forgotten**", _markdown_table(result["control"])]
    if result.get("mixtures"):
        lines = ["| share of the last model's weights | R@1, both ways | on the control set |", "|---|---|---|"]
        for one in result["mixtures"]:
            control = f"{100 * one['control/mean/R@1']:.1f} %" if "control/mean/R@1" in one else ""
            lines.append(f"| {one['alpha']:g} | {100 * one['mean/R@1']:.1f} % | {control} |")
        parts.append("\n".join(lines))
    if "saved" in result:
        parts.append(f"The mixture was written to `{result['saved']}`.")
    return "\n\n".join(parts) + "\n"


def _markdown_table(found: dict) -> str:
    head, *rows = ([cell.replace("|", "\\|") for cell in row] for row in cells(found["models"]))
    said = f"{found['n_images']} images, {found['n_texts']} captions ({found['data']})"
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([said, "", *lines])


def write_page(path: Path, result: dict, moved: dict[str, list[dict]], shards: Shards) -> None:
    """The page: one file that loads nothing. `moved` is of eval.compare.moves."""
    body = [_html_table(result)]
    if "control" in result:
        body += ["<h2>Control: what was forgotten</h2>", _html_table(result["control"])]
    if result.get("mixtures"):
        body += ["<h2>Mixtures of the first and the last model's weights</h2>", curve(result["mixtures"])]
    last = html.escape(result["models"][-1]["model"])
    for name, title in (("better", "What got better"), ("worse", "What got worse")):
        body.append(f"<h2>{title} <small>rank of the right picture, from the first model to {last}</small></h2>")
        figures = []
        for one in moved[name]:
            said = f"{html.escape(one['caption'])}<br><small>{one['before']:.4g} &rarr; {one['after']:.4g}</small>"
            wrong = f" {picture(shards, one['found'])}" if one["found"] != one["image"] else ""
            figures.append(f"<figure>{picture(shards, one['image'])}{wrong}<figcaption>{said}</figcaption></figure>")
        body.append(f'<div class="row">{"".join(figures) or "None."}</div>')
    body.append("<p><small>Left: a right picture; beside it, where it is another, what the last model finds first.</small></p>")
    with atomic_file(path) as partial:
        partial.write_text(PAGE.format(body="\n".join(body)), encoding="utf-8")


def _html_table(found: dict) -> str:
    head, *rows = ([html.escape(cell) for cell in row] for row in cells(found["models"]))
    said = html.escape(f"{found['n_images']} images, {found['n_texts']} captions ({found['data']}); changes are to the first")
    lines = ["".join(f"<th>{cell}</th>" for cell in head), *("".join(f"<td>{cell}</td>" for cell in row) for row in rows)]
    return f'<p>{said}</p><div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def curve(mixtures: list[dict]) -> str:
    """R@1 on the data against R@1 on the control set (or against the share), a point per mixture."""
    across = "control/mean/R@1" if "control/mean/R@1" in mixtures[0] else "alpha"
    xs, ys = [one[across] for one in mixtures], [one["mean/R@1"] for one in mixtures]

    def at(value: float, values: list[float], start: float, end: float) -> float:
        spread = max(values) - min(values) or 1
        return start + (end - start) * (value - min(values)) / spread

    places = [(at(x, xs, 50, 350), at(y, ys, 170, 20)) for x, y in zip(xs, ys, strict=True)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#3b7dc4"/>'
        f'<text x="{x + 6:.1f}" y="{y - 6:.1f}" font-size="10" fill="currentColor">'
        f"{one['alpha']:g}: {100 * one['mean/R@1']:.1f} %</text>"
        for (x, y), one in zip(places, mixtures, strict=True)
    )
    label = "R@1 on the control set" if across != "alpha" else "share of the last model"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 430 210" role="img">'
        '<path d="M40 10V180H370" fill="none" stroke="currentColor" opacity=".5"/>'
        f'<polyline fill="none" stroke="#3b7dc4" points="{line}"/>{marks}'
        f'<text x="200" y="200" font-size="11" text-anchor="middle" fill="currentColor">{label}</text>'
        '<text x="14" y="100" font-size="11" text-anchor="middle" fill="currentColor" transform="rotate(-90 14 100)">R@1</text></svg>'
    )
