"""From what each query scored to the tables of benchmarks/quality.md: means over seeds, intervals, paired
differences.
"""

from collections.abc import Callable

import numpy as np

from data_prep.tables import markdown_table
from eval.retrieval import score
from eval.retrieval.intervals import mean_interval, paired_difference
from eval.retrieval.score import QueryScores

Pooled = tuple[np.ndarray, np.ndarray]  # what each query scored, float [n], and its group, int64 [n]


def of(*directions: str) -> Callable[[QueryScores], Pooled]:
    """R@1 of these directions' queries; see eval.retrieval.score.pooled."""
    return lambda queries: score.pooled(queries, *directions)


SHOWN = {
    "group R@1": of("image_to_text", "text_to_image"),
    "image to text": of("image_to_text"),
    "text to image": of("text_to_image"),
    "unseen captions": of("queries_to_image"),
    "of new words": of("new_words"),
    "degraded images": of("degraded"),
    "image to image": of("image_to_image"),
    "kept on A": of("A_image_to_text", "A_text_to_image"),
}


def page(found: dict[str, list[QueryScores]], curves: dict[str, list]) -> str:
    """All tables, in Markdown.

    Args:
        found: arm -> what its queries scored, for each seed.
        curves: arm -> for each seed, the points of benchmarks.quality.curve; without points, no table.
    """
    parts = [
        "R@1 in percent, mean of the seeds [95 % interval over groups; least and most of the"
        f" seeds]\n\n{figures(found)}"
    ]
    for reference in ("ours", "the seed's recipe", "base"):
        if reference in found and len(found) > 1:
            parts.append(
                f"Difference to *{reference}* in points, query by query [95 % interval],"
                f" p\n\n{differences(found, reference)}"
            )
    parts += [
        f"Mixtures of the base's weights with those of *{arm}*\n\n{mixtures(points)}"
        for arm, points in curves.items()
        if all(points)
    ]
    return "\n\n".join(parts) + "\n"


def figures(found: dict[str, list[QueryScores]]) -> str:
    rows = [["arm", *SHOWN]]
    for arm, seeds in found.items():
        rows.append([arm])
        for pooled in SHOWN.values():
            value, low, high = (100 * each for each in mean_interval(*over_seeds(seeds, pooled)))
            means = [100 * pooled(queries)[0].mean() for queries in seeds]
            spread = f"; {min(means):.1f} to {max(means):.1f}" if len(seeds) > 1 else ""
            rows[-1].append(f"{value:.1f} [{low:.1f}, {high:.1f}{spread}]")
    return markdown_table(rows[0], rows[1:])


def differences(found: dict[str, list[QueryScores]], reference: str) -> str:
    """Of each arm to the arm `reference`: both are means over their seeds, query by query."""
    rows = [["arm", *SHOWN]]
    for arm, seeds in found.items():
        if arm == reference:
            continue
        rows.append([arm])
        for pooled in SHOWN.values():
            (first, groups), (second, _) = over_seeds(found[reference], pooled), over_seeds(seeds, pooled)
            value, low, high, p = paired_difference(first, second, groups)
            rows[-1].append(
                f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] p"
                f" {'<' if p < 0.001 else ''}{max(p, 0.001):.2g}"
            )
    return markdown_table(rows[0], rows[1:])


def over_seeds(seeds: list[QueryScores], pooled: Callable[[QueryScores], Pooled]) -> Pooled:
    """The mean over seeds of what each query scored; seeds answer the same queries, so they add none."""
    each = [pooled(queries) for queries in seeds]
    assert all(np.array_equal(groups, each[0][1]) for _, groups in each), "seeds were evaluated on other data"
    return np.mean([values for values, _ in each], axis=0), each[0][1]


def mixtures(seeds: list[list[dict]]) -> str:
    """For each share of tuned weights: R@1 on B, the part of the whole gain that this is, and R@1 on A; means
    over seeds.
    """
    b, a = (np.mean([[point[name] for point in points] for points in seeds], axis=0) for name in "BA")
    rows = [["share of the tuned weights", "R@1 on B", "of the gain", "R@1 on A", "to the base's"]]
    for point, on_b, on_a in zip(seeds[0], b, a, strict=True):
        gain = f"{100 * (on_b - b[0]) / (b[-1] - b[0]):.0f} %" if b[-1] > b[0] else ""
        rows.append(
            [
                f"{point['share']:g}",
                f"{100 * on_b:.1f}",
                gain,
                f"{100 * on_a:.1f}",
                f"{100 * (on_a - a[0]):+.1f}",
            ]
        )
    return markdown_table(rows[0], rows[1:])
