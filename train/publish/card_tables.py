"""Results of eval as the model card shows them: a table per split, other models beside this one, and the same
as metadata.
"""

import json
from pathlib import Path

from huggingface_hub import EvalResult

from data_prep.errors import UserError
from train.model.clip import public_name

MEASURES = {
    "R@1": "R@1",
    "R@5": "R@5",
    "R@10": "R@10",
    "mean_rank": "mean rank",
    "median_rank": "median rank",
    "mAP": "mAP",
}
DIRECTIONS = ("image_to_text", "text_to_image", "image_to_image")


def markdown_table(rows: list[list[str]]) -> str:
    head, *rows = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def read_tables(paths: tuple[Path, ...], weights: str) -> list["Table"]:
    """The results in some files of eval; those on the same split share a table.

    Args:
        weights: sha256 of the model that the card is for, see train.model.clip.Clip.fingerprint.

    Raises:
        UserError: not such a file, or no figures of these weights in it.
    """
    found: dict[tuple, dict] = {}
    for path in paths:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"--results {path}: not readable ({error}); python -m eval retrieval MODEL --json FILE"
                " makes one"
            ) from None
        if not isinstance(result, dict) or not (
            {"models", "n_images"} <= result.keys() or {"model", "metrics"} <= result.keys()
        ):
            raise UserError(
                f"--results {path}: not a result of python -m eval retrieval --json or python -m eval compare"
            )
        for one, is_control in ((result, False), (result.get("control"), True)):
            if one:
                group = {name: one[name] for name in ("data", "data_sha256", "n_images", "n_texts")} | {
                    "is_control": is_control
                }
                models = found.setdefault((one["data"], one["data_sha256"]), {**group, "models": []})[
                    "models"
                ]
                known = {model["weights_sha256"] for model in models}
                models += [model for model in _with_base(one) if model["weights_sha256"] not in known]
    return [Table(group, weights) for group in found.values()]


def _with_base(result: dict) -> list[dict]:
    """A result's models; those of a comparison say what their differences are to."""
    if "models" in result:
        return [{**model, "base": result["models"][0]["model"]} for model in result["models"]]
    return [{**result, "differences": {}}]


class Table:
    """The figures of some models on one split.

    Args:
        found: data, n_images, n_texts, is_control, and models, results of eval.
        weights: sha256 of the model that the card is for, one of them.
    """

    def __init__(self, found: dict, weights: str):
        folder, _, split = found["data"].rpartition(", ")
        self.folder, self.split = Path(folder).name, split
        self.data = f"{self.folder}, {split}"
        self.n_images, self.n_texts, self.is_control = (
            found["n_images"],
            found["n_texts"],
            found["is_control"],
        )
        self.models: list[dict] = found["models"]
        self.ours = next((model for model in self.models if model["weights_sha256"] == weights), None)
        if self.ours is None:
            names = ", ".join(model["model"] for model in self.models)
            raise UserError(
                f"--results: on {self.data} there are figures of {names}, but these are not the weights to"
                f" publish (sha256 {weights[:12]}...); evaluate them with: python -m eval retrieval MODEL"
                " --json FILE"
            )

    def markdown(self) -> dict[str, str]:
        """A title and a table: chance, each model with 95 % intervals, and the paired difference where one
        was made.
        """
        others = [model for model in self.models if model is not self.ours]
        shown = [*others, self.ours]
        changes = self.ours.get("differences", {})
        head = ["", "chance", *(public_name(model["model"]) for model in others), "**this model**"]
        rows = [[*head, f"change to {public_name(self.ours['base'])}"] if changes else head]
        for prefix, ending in (("", ""), ("legacy_diagonal/", ", by instance")):
            for direction in DIRECTIONS:
                for measure, title in MEASURES.items():
                    name = f"{prefix}{direction}/{measure}"
                    if name in self.ours["metrics"] and (not prefix or measure == "R@1"):
                        cells = [
                            "" if prefix else _cell(self.ours, f"chance/{name}"),
                            *(_cell(model, name) for model in shown),
                        ]
                        change = changes.get(
                            "" if prefix else f"{direction}/{'rank' if measure == 'mean_rank' else measure}"
                        )
                        more = [_change(change, measure)] if changes else []
                        rows.append([f"{direction.replace('_', ' ')}, {title}{ending}", *cells, *more])
        title = f"{self.data}: {self.n_images:,} images, {self.n_texts:,} distinct captions"
        return {"title": f"Control, {title}" if self.is_control else title, "table": markdown_table(rows)}

    def eval_results(self, datasets: list[str]) -> list[EvalResult]:
        """The same for the card's metadata."""
        return [
            EvalResult(
                task_type=f"{direction.replace('_', '-')}-retrieval",
                task_name=f"{direction.replace('_', ' ')} retrieval",
                dataset_type=datasets[0] if len(datasets) == 1 and not self.is_control else self.folder,
                dataset_name=self.folder,
                dataset_split=self.split,
                metric_type=measure,
                metric_name=MEASURES[measure],
                metric_value=self.ours["metrics"][f"{direction}/{measure}"],
            )
            for direction in DIRECTIONS
            for measure in MEASURES
            if f"{direction}/{measure}" in self.ours["metrics"]
        ]


def _scale(measure: str) -> tuple[float, str]:
    return (1, "") if measure.endswith("rank") else (100, " %")


def _cell(model: dict, name: str) -> str:
    if (value := model["metrics"].get(name)) is None:
        return ""
    scale, unit = _scale(name)
    low_high = model.get("intervals", {}).get(name, ())
    ends = f" [{', '.join(f'{scale * each:.1f}' for each in low_high)}]" if low_high else ""
    return f"{scale * value:.1f}{unit}{ends}"


def _change(change: list[float] | None, measure: str) -> str:
    if not change:
        return ""
    value, low, high = (_scale(measure)[0] * each for each in change[:3])
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
