"""The one list of metrics: how each is called, in which unit it is shown, whether higher is better, and
where.

Light on purpose: training chooses checkpoints by it, eval prints and compares by it, the model card shows it.
The functions that compute retrieval metrics are in eval/retrieval/metrics.py, by the same names.

    val/image_to_text/R@1  =  split / direction / metric        mean/R@1: the mean of DIRECTIONS
    instance/...              only an image's own first caption is relevant, as open_clip_train counts
    own_captions/...          any of an image's own captions is relevant, as CLIP_benchmark counts
    chance/...                expectation of a random order
    center_crop/R@1_gain      R@1 image to text of images cropped by 4 %, minus that of whole images
"""

from typing import NamedTuple

from data_prep.strict_json import problem_of

DIRECTIONS = ("image_to_text", "text_to_image")  # those that training validates
GROUP_DIRECTIONS = (*DIRECTIONS, "image_to_image")  # those that every data set has
ALL_DIRECTIONS = (*GROUP_DIRECTIONS, "queries_to_image")  # with sentences that are no captions
INSTANCE, OWN_CAPTIONS, CHANCE = "instance/", "own_captions/", "chance/"  # prefixes

# Of eval.retrieval.robustness.center_crop_gain: the difference and the lower end of its 99 % interval.
CROP_GAIN, CROP_GAIN_LOW = "center_crop/R@1_gain", "center_crop/R@1_gain_low"

# What else than its group's captions can be relevant to an image, by prefix.
DEFINITIONS = {INSTANCE: "by instance", OWN_CAPTIONS: "by own captions"}

# Tables that show a metric.
RETRIEVAL = "retrieval"  # python -m eval retrieval
BY_INSTANCE = "by instance"  # its rows by instance
COMPARE = "compare"  # models beside each other, with paired differences, here and in retrieval --against
CARD = "card"  # the model card


class Metric(NamedTuple):
    """Attributes:
    title: as tables call it.
    unit: "%": a fraction, shown times 100; "": a number, shown as it is.
    tables: that show it, of those above.
    """

    title: str
    unit: str
    higher_is_better: bool
    tables: tuple[str, ...] = ()


METRICS = {
    # retrieval, by direction
    "R@1": Metric("R@1", "%", True, (RETRIEVAL, BY_INSTANCE, COMPARE, CARD)),
    "R@5": Metric("R@5", "%", True, (RETRIEVAL, BY_INSTANCE, CARD)),
    "R@10": Metric("R@10", "%", True, (RETRIEVAL, BY_INSTANCE, COMPARE, CARD)),
    "mean_rank": Metric("mean rank", "", False, (RETRIEVAL, BY_INSTANCE, COMPARE, CARD)),
    "median_rank": Metric("median rank", "", False, (RETRIEVAL, BY_INSTANCE, CARD)),
    "MRR": Metric("MRR", "%", True, (RETRIEVAL, COMPARE)),
    "mAP": Metric("mAP", "%", True, (RETRIEVAL, COMPARE, CARD)),
    "nDCG@10": Metric("nDCG@10", "%", True, (RETRIEVAL,)),
    "recall@1": Metric("recall@1", "%", True),
    "recall@5": Metric("recall@5", "%", True),
    "recall@10": Metric("recall@10", "%", True),
    "tie_rate": Metric("tie rate", "%", False),
    "R@1_tie_range": Metric("R@1 range over ties", "%", False),
    "R@1_upper_bound": Metric("upper bound of R@1", "%", True),
    "R@1_gain": Metric("gain in R@1", "%", False),
    "R@1_gain_low": Metric("gain in R@1, lower end", "%", False),
    # of a model on a split
    "calibration_error": Metric("calibration error (ECE)", "%", False),
    # classification
    "top1": Metric("top-1", "%", True),
    "top5": Metric("top-5", "%", True),
    "mean_per_class": Metric("mean per class", "%", True),
    "macro_f1": Metric("macro F1", "%", True),
    "weighted_f1": Metric("weighted F1", "%", True),
}


def _are_numbers(least: int):
    """Whether a value is null, or a list of at least so many numbers."""
    return lambda value: value is None or (not problem_of(value, [float]) and len(value) >= least)


_FIGURES = {str: (float, type(None))}
_DATA = {"data": str, "data_sha256": str, "n_images": int, "n_texts": int}
# A result of eval retrieval --json; and of eval compare, which has several, and may have a retention set's.
RESULT = {**_DATA, "model": str, "weights_sha256": str, "metrics": _FIGURES}
RESULT |= {"intervals?": {str: _are_numbers(2)}, "differences?": {str: _are_numbers(4)}, "baseline?": str}
_MODELS = [{name: RESULT[name] for name in RESULT if name not in _DATA}]
COMPARISON = {**_DATA, "models": _MODELS, "retention?": ({**_DATA, "models": _MODELS}, type(None))}


def metric_of(name: str) -> Metric:
    """The metric of a full name: "val/image_to_text/R@1" -> METRICS["R@1"]."""
    return METRICS[name.rsplit("/", 1)[-1]]


def metrics_in(table: str) -> list[str]:
    """Names of the metrics that a table shows."""
    return [name for name, metric in METRICS.items() if table in metric.tables]


def title_of(name: str) -> str:
    """The title of a full name: "image_to_text/R@1" -> "image to text, R@1"."""
    prefix = next((prefix for prefix in DEFINITIONS if name.startswith(prefix)), "")
    direction, _, _ = name.removeprefix(prefix).rpartition("/")
    words = [direction.replace("_", " "), metric_of(name).title] if direction else [metric_of(name).title]
    return ", ".join(words) + (f", {DEFINITIONS[prefix]}" if prefix else "")


def show(name: str, value: float | None, interval: list[float] | None = None) -> str:
    """A value with its unit, and its 95 % interval: "11.9 % [8.2, 15.0]"; nothing for None."""
    if value is None:
        return ""
    unit = metric_of(name).unit
    scale = 100 if unit == "%" else 1
    ends = f" [{', '.join(f'{scale * end:.1f}' for end in interval)}]" if interval else ""
    return f"{scale * value:.1f}{' %' if unit == '%' else ''}{ends}"


def show_of(result: dict, name: str) -> str:
    """A metric of a result of eval, with its interval if it has one."""
    return show(name, result["metrics"].get(name), result.get("intervals", {}).get(name))


def show_difference(name: str, difference: list[float] | None, p_value: bool = True) -> str:
    """A paired difference [value, low, high, p], percentages in points: "-4.2 [-31.5, +19.6], p = 0.8"."""
    if not difference:
        return ""
    scale = 100 if metric_of(name).unit == "%" else 1
    value, low, high = (scale * number for number in difference[:3])
    p = f", p = {difference[3]:.2g}" if p_value else ""
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]{p}"


def difference_cells(name: str, difference: list[float] | None) -> list[str]:
    """A paired difference as the cells of two columns: the difference with its interval, and p."""
    return [show_difference(name, difference, p_value=False), f"{difference[3]:.2g}" if difference else ""]
