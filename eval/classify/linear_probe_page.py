"""Heads beside each other, for people: a table, and a page with what was tried."""

from pathlib import Path

from eval.classify.metrics import TOP
from eval.classify.zeroshot_page import NAMES
from eval.report import html as sheet
from eval.report.plots import histories


def write_page(path: Path, result: dict) -> None:
    """Write the page of a result of eval.classify.linear_probe, and its curves as a PNG beside it."""
    sheet.write(
        path, f"Heads on {result['model']}", [sheet.pre(table(result))], histories(**result["history"])
    )


def table(result: dict) -> str:
    """A result for people: heads side by side, and what was tried."""
    heads, (fit, val) = result["heads"], result["n_train"]
    lines = [f"{result['model']}: trained on {fit} images, {val} for validation ({result['train']['data']})"]
    lines.append(
        f"tested on {result['n_images']} images of {result['n_classes']} classes ({result['test']['data']})"
    )
    for kind in ("unreadable", "unlabelled"):
        if result[kind]:
            listed = "; ".join(f"{name}: {reason}" for name, reason in result[kind][:5])
            lines.append(
                f"{len(result[kind])} {kind} images are not used:"
                f" {listed}{'; ...' if len(result[kind]) > 5 else ''}"
            )
    lines.append(" " * 18 + "chance".rjust(9) + "".join(name.rjust(24) for name in heads))
    for name, title in NAMES.items():
        guess = heads["linear"]["metrics"].get(f"chance/{name}")
        cells = ((head["metrics"][name], *head["intervals"][name]) for head in heads.values())
        shown = "".join(
            f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]".rjust(24) for value, low, high in cells
        )
        lines.append(f"  {title}".ljust(18) + (f"{100 * guess:.1f} %" if guess else "").rjust(9) + shown)
    if result["n_classes"] < TOP:
        lines.append(
            f"  (top-{TOP} of {result['n_classes']} classes is top-{result['n_classes']}: always right)"
        )
    best = next(row for row in result["history"]["linear"] if row["chosen"])
    lines.append(
        f"linear: C = {best['C']:g} of {len(result['history']['linear'])} tried, validation accuracy"
        f" {best['val_accuracy']:.1%}"
    )
    accuracies = ", ".join(f"{row['val_accuracy']:.1%}" for row in result["history"]["mlp"])
    return "\n".join([*lines, f"MLP: validation accuracy by epoch {accuracies}", "[95 % interval]"])
