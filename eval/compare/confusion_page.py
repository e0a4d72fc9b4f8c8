"""What captions a model confuses, as a page: heatmaps of several models, and the captions that steal images."""

import html
from pathlib import Path

from data_prep.shards import Shards
from eval.report import html as sheet
from eval.report.plots import heatmaps as drawn_heatmaps
from eval.report.plots import write_png

STYLE = """
 .cells table { border-collapse: separate; border-spacing: 2px; } .cells tr + tr { border: 0; }
 .cells td { min-width: 3rem; padding: 0; text-align: center; font-size: .8rem; }
 .cells th { font-weight: normal; font-size: .8rem; text-align: right; }
 .cells th img { width: 2.4rem; height: 2.4rem; vertical-align: middle; }
 .cells thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; max-height: 11rem; }
 td.own { outline: 1px solid; outline-offset: -1px; } td.full { color: #fff; }
"""


def table(result: dict) -> str:
    """The result for people: a row per model, a column per column of texts."""
    width = max(len("chance"), *(len(one["model"]) for one in result["models"])) + 2
    lines = [
        f"{result['n_images']} images ({result['data']}), the caption of each against {result['k']} of other"
        f" groups, seed {result['seed']}"
    ]
    for name, column in result["columns"].items():
        clipped = (
            f", {column['clipped']} of them against all there are, fewer than {result['k']}"
            if column["clipped"]
            else ""
        )
        lines.append(
            f"{name}: {column['n_texts']} distinct texts, {column['n_scored']} images scored{clipped}"
        )
        if without := column["without_text"]:
            lines.append(
                f"  {len(without)} images without a text are not scored:"
                f" {', '.join(without[:5])}{', ...' if len(without) > 5 else ''}"
            )
    for kind, title in (
        ("accuracy", "accuracy, with 95 % interval"),
        ("over_all_draws", "its mean over all draws, from the ranks"),
    ):
        lines += [title, " " * width + "".join(name.rjust(24) for name in result["columns"])]
        lines.append(
            "  chance".ljust(width)
            + "".join(f"{100 * column['chance']:.1f} %".rjust(24) for column in result["columns"].values())
        )
        for one in result["models"]:
            cells = (one["columns"][name][kind] for name in result["columns"])
            said = (
                f"{100 * at['value']:.1f} % ({100 * at['low']:.1f} to {100 * at['high']:.1f})" for at in cells
            )
            lines.append(f"  {one['model']}".ljust(width) + "".join(cell.rjust(24) for cell in said))
    for one in result["models"]:
        said = ", ".join(f"{thief['caption']!r} {thief['stolen']:.4g}" for thief in one["thieves"][:3])
        lines += [f"captions that steal most images from {one['model']}", f"  {said or 'none'}"]
    return "\n".join(lines)


def write_page(path: Path, result: dict, shards: Shards) -> None:
    """Write the page of a result of eval.compare.confusion, and its heatmaps as a PNG beside it."""
    body = [sheet.pre(table(result)), *heatmaps(result, shards), *thieves(result, shards)]
    sheet.write(path, "Caption confusion", body, style=STYLE)
    write_png(path.with_suffix(".png"), drawn_heatmaps(result["models"], result["heatmap"]["captions"]))


def heatmaps(result: dict, shards: Shards) -> list[str]:
    """HTML (with STYLE) of each model's softmax over the captions for each image, with the pictures; one
    color scale for all.
    """
    body, shown = [], result["heatmap"]
    head = "".join(f"<th>{html.escape(caption)}</th>" for caption in shown["captions"])
    for one in result["models"]:
        rows = []
        for at, cells in enumerate(one["heatmap"]):
            # Opacity is the probability, over the page's own background.
            style = 'style="background: rgb(29 78 216 / {0:.3f})" class="{1}"'
            marks = [
                " ".join(["own"] * (at == other) + ["full"] * (cell > 0.75))
                for other, cell in enumerate(cells)
            ]
            row = "".join(
                f"<td {style.format(cell, mark)}>{100 * cell:.0f}</td>"
                for cell, mark in zip(cells, marks, strict=True)
            )
            rows.append(
                f"<tr><th>{html.escape(shown['captions'][at])}"
                f" {sheet.picture(shards, shown['images'][at])}</th>{row}</tr>"
            )
        scale = f"softmax of {one['logit_scale']:.1f} &times; cosine, % of each row; one color scale"
        body.append(f"<h2>{html.escape(one['model'])} <small>{scale}</small></h2>")
        body.append(
            '<div class="wide'
            f' cells"><table><thead><tr><td></td>{head}</tr></thead>{"".join(rows)}</table></div>'
        )
    return body


def thieves(result: dict, shards: Shards) -> list[str]:
    """HTML of the captions that are first for images of other groups, with some of these images."""
    body = []
    for one in result["models"]:
        body.append(f"<h2>Captions that steal most images from {html.escape(one['model'])}</h2>")
        body += [] if one["thieves"] else ["<p>None.</p>"]
        for thief in one["thieves"]:
            body.append(
                f"<h3>{html.escape(thief['caption'])} <small>first for {thief['stolen']:.4g} images of other"
                " groups</small></h3>"
            )
            body.append("".join(sheet.picture(shards, at) for at in thief["images"]))
    return body
