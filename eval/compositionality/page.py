"""The answers to the probes, for people: a table with chance beside each number, and a page with the
drawings.
"""

import html
from pathlib import Path

from eval.compositionality.drawings import Count, Pair, render
from eval.report import html as sheet

CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6, "text_ties_half": 1 / 2, "image_ties_half": 1 / 2}
COUNT_CHANCE = {
    "accuracy": 1 / 10,
    "mean_absolute_error": 3.3,
}  # of guesses at random; always "five" or "six" errs by 2.5


def table(result: dict) -> str:
    """A result for people, chance beside each number."""

    def line(name: str, at: dict, chance: float, unit: str = " %") -> str:
        value, low, high, chance = (
            f"{number * (100 if unit else 1):.1f}{unit}" for number in (*at.values(), chance)
        )
        return f"  {name:<40}{value:>9}   {low:>7} to {high:>7}{chance:>11}"

    lines = [
        f"{result['model']}, drawings of seed {result['seed']}",
        f"{'':42}{'value':>9}   {'95 % interval':>18}{'chance':>11}",
    ]
    for held, scores in result["counting"].items():
        lines.append(f"counting 1 to 10, {held} constant, {10 * result['n']} drawings")
        lines.append(line("accuracy", scores["accuracy"], COUNT_CHANCE["accuracy"]))
        lines.append(
            line(
                "mean absolute error", scores["mean_absolute_error"], COUNT_CHANCE["mean_absolute_error"], ""
            )
        )
        lines.append("  drawn \\ guessed, % " + "".join(f"{n:>5}" for n in range(1, 11)))
        lines += [
            f"{n:>20} " + "".join(f"{100 * cell:>5.0f}" for cell in row)
            for n, row in enumerate(scores["confusion"], 1)
        ]
    for probe in ("binding", "relations"):
        for kind, scores in result[probe].items():
            lines.append(f"{probe}, {10 * result['n']} pairs" if kind in ("all", "binding") else f"  {kind}")
            shown = CHANCE if kind in ("all", "binding") else ["text_ties_half", "image_ties_half"]
            lines += [
                line(name.replace("_ties_half", ", single comparisons"), scores[name], CHANCE[name])
                for name in shown
            ]
    if "swaps" in result:
        scores = result["swaps"]
        lines.append(
            f"two words swapped in the captions of {scores['n']} of {scores['n_images']} images"
            f" ({result['data']})"
        )
        lines.append(line("own caption preferred", scores["accuracy"], 1 / 2))
    lines.append(
        "always guessing five has a mean absolute error of 2.5; in counting, m captions that tie count 1/m"
        " each"
    )
    lines.append(
        "text, image and group want both of a pair right, and a tie is wrong; elsewhere a tie counts half"
    )
    return "\n".join(lines)


def write_page(
    path: Path, result: dict, pictures: list[Count], pairs: dict[str, list[Pair]], found: list
) -> None:
    """The table, and the first drawings of each probe."""
    shown = {
        f"Counting, {held} constant": [
            (one.scene, one.captions[one.n - 1]) for one in pictures if one.held == held
        ][:10]
        for held in result["counting"]
    }
    shown |= {
        name.capitalize(): [
            item for pair in those[:4] for item in zip(pair.scenes, pair.captions, strict=True)
        ]
        for name, those in pairs.items()
    }
    body = [sheet.pre(table(result))]
    for title, drawings in shown.items():
        figures = (
            sheet.figure(sheet.image(render(scene), caption, 112), html.escape(caption))
            for scene, caption in drawings
        )
        body.append(f'<h2>{title}</h2><div class="row large">{"".join(figures)}</div>')
    if found:
        rows = "".join(
            f"<li>{html.escape(swap.caption)} &rarr; {html.escape(swap.swapped)}</li>" for swap in found[:20]
        )
        body.append(f"<h2>Swapped words</h2><ul>{rows}</ul>")
    sheet.write(path, "Probes", body)
