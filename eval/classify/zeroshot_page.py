"""What a zero-shot classifier gets right and wrong, for people: a table of several models, and a page for
each.
"""

import html
from pathlib import Path

import numpy as np

from eval.classify.features import checked
from eval.classify.labelled import Labelled
from eval.classify.metrics import TOP, Missed
from eval.report import html as sheet
from eval.report.plots import matrix
from train.data.decode import decode

SIDE_PX = 96

NAMES = {
    "top1": "top-1",
    f"top{TOP}": f"top-{TOP}",
    "mean_per_class": "mean per class",
    "macro_f1": "macro F1",
    "weighted_f1": "weighted F1",
}


def write_page(path: Path, result: dict, confusion: np.ndarray, missed: list[Missed], data: Labelled) -> None:
    """Write a page for one model's result, and its confusion matrix float [C, C] as a PNG beside it."""
    classes = sorted(result["classes"].items(), key=lambda item: (item[1]["n"] == 0, item[1]["recall"]))
    rows = [["class", "images", "right", "F1", "most often taken for"]]
    for name, found in classes:
        others = confusion[data.classes.index(name)].copy()
        others[data.classes.index(name)] = 0
        thief = f"{data.classes[others.argmax()]} ({others.max():.4g})" if others.max() else ""
        rows.append(
            [name, str(found["n"]), f"{100 * found['recall']:.1f} %", f"{100 * found['f1']:.1f} %", thief]
        )
    figures = []
    for one in missed:
        shown = sheet.image(decode(checked(data.read(one.number))), data.names[one.number], SIDE_PX)
        figures.append(
            sheet.figure(
                shown, f"{html.escape(data.classes[one.label])} &rarr; {html.escape(data.classes[one.taken])}"
            )
        )
    body = [
        sheet.pre(table([result])),
        "<h2>Surest mistakes <small>class &rarr; what it was taken for</small></h2>",
    ]
    body += [
        f'<div class="row large">{"".join(figures) or "None."}</div>',
        "<h2>Classes, the worst first</h2>",
        sheet.table(rows),
    ]
    sheet.write(path, f"Zero-shot classification by {result['model']}", body, matrix(confusion, data.classes))


def table(results: list[dict]) -> str:
    """Results on the same data for people, side by side."""
    width = max(24, *(len(result["model"]) + 2 for result in results))
    first = results[0]
    lines = [
        f"{first['n_images']} images, {first['n_classes']} classes ({first['data']}); templates:"
        f" {first['templates']}"
    ]
    for kind in ("unreadable", "unlabelled"):
        if first[kind]:
            listed = "; ".join(f"{name}: {reason}" for name, reason in first[kind][:5])
            lines.append(
                f"{len(first[kind])} {kind} images are not scored:"
                f" {listed}{'; ...' if len(first[kind]) > 5 else ''}"
            )
    lines.append(
        "".ljust(18) + "chance".rjust(9) + "".join(result["model"].rjust(width) for result in results)
    )
    for level in ("", "parent", "child"):
        found = [result[level] if level else result for result in results if not level or level in result]
        if not found:
            continue
        if level:
            lines.append(f"{level} level, {found[0]['n_images']} images, {found[0]['n_classes']} classes")
        n_classes = found[0]["n_classes"]
        for name, title in NAMES.items():
            if name in found[0]["metrics"]:
                guess = found[0]["metrics"].get(f"chance/{name}")
                lines.append(
                    f"  {title}".ljust(18)
                    + (f"{100 * guess:.1f} %" if guess else "").rjust(9)
                    + _cells(found, name, width)
                )
        if n_classes < TOP and f"top{TOP}" in found[0]["metrics"]:
            lines.append(f"  (top-{TOP} of {n_classes} classes is top-{n_classes}: always right)")
    lines.append(
        "  ".join(
            [f"largest class: {first['metrics']['largest_class']:.1%} of the images", "[95 % interval]"]
        )
    )
    if any(result["metrics"]["tied"] for result in results):
        lines.append(
            "tied for the first place, and counted in expectation: "
            + ", ".join(f"{r['metrics']['tied']:.1%}" for r in results)
        )
    for result in results[1:]:
        value, low, high, p = (
            scale * each for scale, each in zip((100, 100, 100, 1), result["difference"], strict=True)
        )
        lines.append(
            f"{result['model']}: top-1 {value:+.1f} points [{low:+.1f}, {high:+.1f}] from {first['model']}, p"
            f" = {p:.2g}"
        )
    return "\n".join(
        [
            *lines,
            "weights: "
            + ", ".join(r["weights_sha256"][:12] for r in results)
            + f"  data: {first['data_sha256'][:12]}",
        ]
    )


def _cells(found: list[dict], name: str, width: int) -> str:
    cells = ((result["metrics"][name], *result["intervals"][name]) for result in found)
    return "".join(
        f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]".rjust(width) for value, low, high in cells
    )
