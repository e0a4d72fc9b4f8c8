"""The result of compositionality as tables, chance beside each figure, and as a page with examples of the
drawings.
"""

from collections.abc import Iterable
from pathlib import Path

from data_prep.html import data_uri, write_page
from data_prep.tables import Table
from eval.compositionality.drawings import render
from eval.compositionality.score import Drawings
from eval.compositionality.swaps import Swap
from eval.report.names import with_display_names

PAIR_CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6, "text_accuracy": 1 / 2, "image_accuracy": 1 / 2}
COUNT_CHANCE = {"accuracy": 1 / 10, "mean_absolute_error": 3.3}  # of random predictions
MAX_COUNTS, MAX_PAIRS, MAX_SWAPS = 10, 4, 20
NOTES = (
    "In counting, m captions that tie for first count 1/m each; always predicting five has a mean absolute"
    " error of 2.5.\nText, image and group score are those of Winoground: both of a pair must be right, and a"
    " tie is wrong. In accuracy a tie counts 1/2."
)


def result_parts(result: dict) -> list[str | Table]:
    """All tables."""
    captions = f"; captions of {result['data']}" if "data" in result else ""
    return [
        f"{result['model']}, drawings of seed {result['seed']}{captions}",
        Table(["", "value", "95 % interval", "chance"], list(_rows(result))),
        *_count_tables(result),
        NOTES,
    ]


def _rows(result: dict) -> Iterable[list[str]]:
    for constant, scores in result["counting"].items():
        title = f"counting 1 to 10, {constant} constant, {10 * result['n']} drawings"
        yield _row(f"{title}: accuracy", scores["accuracy"], COUNT_CHANCE["accuracy"])
        error = "mean_absolute_error"
        yield _row(f"{title}: mean absolute error", scores[error], COUNT_CHANCE[error], 1, "")
    for name in ("binding", "relations"):
        for kind, scores in result[name].items():
            is_whole = kind in ("all", "binding")
            title = f"{name}, {10 * result['n']} pairs" if is_whole else f"{name}, {kind}"
            shown = PAIR_CHANCE if is_whole else ("text_accuracy", "image_accuracy")
            for score in shown:
                words = score.replace("_", " ") if score.endswith("accuracy") else f"{score} score"
                yield _row(f"{title}: {words}", scores[score], PAIR_CHANCE[score])
    if "swaps" in result:
        swaps = result["swaps"]
        title = f"swapped words, captions of {swaps['n']} of {swaps['n_images']} images"
        yield _row(f"{title}: own caption preferred", swaps["accuracy"], 1 / 2)


def _row(title: str, score: dict[str, float], chance: float, scale: int = 100, unit: str = " %") -> list[str]:
    value, low, high, chance = (f"{scale * number:.1f}" for number in (*score.values(), chance))
    return [title, f"{value}{unit}", f"{low} to {high}{unit}", f"{chance}{unit}"]


def _count_tables(result: dict) -> Iterable[Table]:
    for constant, scores in result["counting"].items():
        columns = [f"counting, {constant} constant: drawn \\ predicted, %", *map(str, range(1, 11))]
        rows = [
            [str(n), *(f"{100 * share:.0f}" for share in row)] for n, row in enumerate(scores["confusion"], 1)
        ]
        yield Table(columns, rows)


def write_compositionality_page(path: Path, result: dict, drawings: Drawings, swaps: list[Swap]) -> None:
    """The tables, the first drawings of each kind, and the first swaps."""
    (shown,), examples = with_display_names([result]), []
    for constant in result["counting"]:
        counts = [count for count in drawings.counts if count.constant == constant][:MAX_COUNTS]
        drawn = [(count.scene, count.captions[count.n - 1]) for count in counts]
        examples.append((f"Counting, {constant} constant", drawn))
    for name, pairs in drawings.pairs.items():
        drawn = [
            example for pair in pairs[:MAX_PAIRS] for example in zip(pair.scenes, pair.captions, strict=True)
        ]
        examples.append((name.capitalize(), drawn))
    write_page(
        path,
        Path(__file__).with_name("compositionality.html"),
        title=f"Compositionality of {shown['model']}",
        parts=result_parts(shown),
        examples=[
            (title, [(data_uri(render(scene), 112), caption) for scene, caption in drawn])
            for title, drawn in examples
        ],
        swaps=swaps[:MAX_SWAPS],
    )
