"""Results of heads on frozen features for people: a table, and a page with validation curves."""

from pathlib import Path

from data_prep.html import write_page as write_html
from data_prep.tables import Table
from eval.classify.zeroshot_page import metric_table, notes, skipped_images
from eval.report.names import with_display_names
from eval.report.plots import histories, svg, write_png

TEMPLATE = Path(__file__).with_name("linear_probe.html")


def write_page(path: Path, result: dict) -> None:
    """Write the page of a result of eval.classify.linear_probe, and its curves as a PNG beside it."""
    (shown,), history = with_display_names([result]), result["history"]
    write_html(
        path,
        TEMPLATE,
        title=f"Linear probe of {shown['model']}",
        plots=[svg(histories(history, [head])) for head in history],
        parts=result_parts(shown),
    )
    write_png(path.with_suffix(".png"), histories(history, history))


def result_parts(result: dict) -> list[str | Table]:
    """Zero-shot and the heads side by side, and their validation."""
    heads, history, (fit, val) = result["heads"], result["history"], result["n_train"]
    chosen = next(row for row in history["linear"] if row["chosen"])
    accuracies = ", ".join(f"{row['val_accuracy']:.1%}" for row in history["mlp"])
    data = [
        f"{result['model']}: trained on {fit} images, {val} for validation ({result['train']['data']})",
        f"tested on {result['n_images']} images of {result['n_classes']} classes ({result['test']['data']})",
        *skipped_images(result, "used"),
    ]
    validation = [
        *notes(result["n_classes"], heads["linear"]["metrics"]),
        f"linear: C = {chosen['C']:g} of {len(history['linear'])} values, validation accuracy"
        f" {chosen['val_accuracy']:.1%}",
        f"MLP: validation accuracy by epoch {accuracies}",
    ]
    return ["\n".join(data), metric_table(heads), "\n".join(validation)]
