"""A result of `python -m eval retrieval` as tables and sentences, for a terminal and for a page."""

from data_prep.tables import Table, are
from eval.retrieval.intervals import Difference, cautions
from eval.retrieval.metrics import KS
from train.metrics import (
    ALL_DIRECTIONS,
    BY_INSTANCE,
    CHANCE,
    DEFINITIONS,
    DIRECTIONS,
    INSTANCE,
    METRICS,
    RETRIEVAL,
    difference_cells,
    metrics_in,
    show,
    show_of,
    title_of,
)

MAX_LISTED = 5


def result_parts(result: dict, baseline: dict | None = None) -> list[str | Table]:
    """All tables of a result; beside each figure chance, and another result on the same data if given."""
    parts = [
        f"{result['n_images']} images, {result['n_texts']} distinct captions ({result['data']})."
        " In brackets: 95 % intervals."
    ]
    parts += _direction_tables(result, [baseline, result] if baseline else [result])
    parts.append("\n".join(_notes(result)))
    if "slices" in result:
        parts.append(_slices_table(result["slices"]))
    if "robustness" in result:
        parts.append(robustness_table(result["robustness"], result["metrics"]["image_to_text/R@1"]))
    if "differences" in result:
        name = baseline["model"] if baseline else "the other model"
        rows = [
            [title_of(metric), *difference_cells(metric, difference)]
            for metric, difference in result["differences"].items()
        ]
        parts.append(Table(["paired by query", f"difference from {name}", "p"], rows))
    return parts


def _direction_tables(result: dict, models: list[dict]) -> list[Table]:
    """A table of each direction by group, and one of all directions by instance."""
    galleries = {
        "image_to_text": (result["n_texts"], "captions"),
        "text_to_image": (result["n_images"], "images"),
        "image_to_image": (result["n_images"] - 1, "images"),
        "queries_to_image": (result["n_images"], "images"),
    }
    tables = []
    for direction in ALL_DIRECTIONS:
        title, (size, items) = direction.replace("_", " "), galleries[direction]
        limited = f" (R@k is at most R@{size})" if size < max(KS) else ""
        names = [f"{direction}/{metric}" for metric in metrics_in(RETRIEVAL)]
        if f"{direction}/R@1" in result["metrics"]:
            rows = [
                [
                    METRICS[name.rpartition("/")[2]].title,
                    show(name, result["metrics"].get(CHANCE + name)),
                    *(show_of(model, name) for model in models),
                ]
                for name in names
            ]
            first = f"{title}, by group, among {size} {items}{limited}"
            tables.append(Table([first, "chance", *(model["model"] for model in models)], rows))
    return tables + _instance_table(result, models)


def _instance_table(result: dict, models: list[dict]) -> list[Table]:
    """Figures as model cards have them, in both definitions and directions; none where there are none."""
    names = [
        f"{prefix}{direction}/{metric}"
        for direction in DIRECTIONS
        for prefix in DEFINITIONS
        for metric in metrics_in(BY_INSTANCE)
        if prefix == INSTANCE or metric.startswith("R@")
    ]
    rows = [
        [title_of(name), *(show_of(model, name) for model in models)]
        for name in names
        if name in result["metrics"]
    ]
    return [Table(["as on model cards", *(model["model"] for model in models)], rows)] if rows else []


def _notes(result: dict) -> list[str]:
    metrics, notes = result["metrics"], []
    bounds = [
        f"{100 * metrics[name]:.1f} % ({direction.replace('_', ' ')})"
        for direction in DIRECTIONS
        if (name := f"{INSTANCE}{direction}/R@1_upper_bound") in metrics
    ]
    if bounds:
        notes.append(
            "By instance, only an image's first caption is relevant to it (as open_clip_train counts); by own"
            " captions, any of its captions (as CLIP_benchmark counts)."
        )
        notes.append(
            "Upper bound of R@1 by instance, first caption (equal captions and equal image files are"
            f" indistinguishable): {', '.join(bounds)}."
        )
    if "n_groups" in result:
        differences = {
            title_of(name): Difference(*value) for name, value in result.get("differences", {}).items()
        }
        notes += cautions(result["n_groups"], differences)
    ranges = ", ".join(
        f"{100 * metrics[f'{direction}/R@1_tie_range']:.1f} points ({direction.replace('_', ' ')})"
        for direction in DIRECTIONS
    )
    notes.append(f"Ties are counted in expectation. Range of R@1 over all orders of ties: {ranges}.")
    if missing := result.get("queries_without_images"):
        more = "; ..." if len(missing) > MAX_LISTED else ""
        notes.append(
            f"{len(missing)} {'query' if len(missing) == 1 else 'queries'} without an image in this split"
            f" {are(len(missing))} not scored:"
            f" {'; '.join(missing[:MAX_LISTED])}{more}"
        )
    return notes


def _slices_table(slices: dict[str, dict[str, float]]) -> Table:
    names = [f"{direction}/R@1" for direction in DIRECTIONS]
    rows = [
        [value, str(found["n_images"]), *(show(name, found.get(name)) for name in names)]
        for value, found in slices.items()
    ]
    return Table(["slice", "images", *map(title_of, names)], rows)


def robustness_table(curves: dict[str, list[dict]], undegraded: float) -> Table:
    """R@1 of degraded query images, a row per level.

    Args:
        curves: of eval.retrieval.robustness.curves.
        undegraded: image_to_text/R@1 of the undegraded images.
    """
    names = [f"{direction}/R@1" for direction in ("image_to_text", "image_to_image")]
    rows = [["none", show(names[0], undegraded), ""]]
    rows += [
        [f"{degradation} {point['level']:g}", *(show(name, point[name]) for name in names)]
        for degradation, points in curves.items()
        for point in points
    ]
    return Table(["degraded query images", *map(title_of, names)], rows)
