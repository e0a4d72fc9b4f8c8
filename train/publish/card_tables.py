"""Results of eval for the model card: a table per split with other models, and metadata for the hub."""

from pathlib import Path

from huggingface_hub import EvalResult

from data_prep.errors import UserError
from data_prep.strict_json import load_json, problem_of
from data_prep.tables import markdown_table
from train.metrics import (
    CARD,
    CHANCE,
    COMPARISON,
    DIRECTIONS,
    GROUP_DIRECTIONS,
    INSTANCE,
    METRICS,
    RESULT,
    metrics_in,
    show_difference,
    show_of,
    title_of,
)
from train.model.clip import public_name


def read_tables(paths: tuple[Path, ...], weights: str) -> list["Table"]:
    """The results in some files of eval; results on the same split share a table.

    Args:
        weights: sha256 of the published model, see train.model.clip.Clip.fingerprint.

    Raises:
        UserError: not such a file, or it has no figures of these weights.
    """
    tables: dict[tuple, dict] = {}
    for path in paths:
        result = _read(path)
        for split, is_retention in ((result, False), (result.get("retention"), True)):
            if not split:
                continue
            facts = {name: split[name] for name in ("data", "data_sha256", "n_images", "n_texts")}
            table = tables.setdefault(
                (split["data"], split["data_sha256"]), {**facts, "is_retention": is_retention, "models": []}
            )
            known = {model["weights_sha256"] for model in table["models"]}
            table["models"] += [
                model for model in _with_baseline(split) if model["weights_sha256"] not in known
            ]
    return [Table(table, weights) for table in tables.values()]


def _read(path: Path) -> dict:
    try:
        result = load_json(path, dict)
        problem = problem_of(result, COMPARISON if "models" in result else RESULT)
        if not problem and not result.get("models", True):
            problem = "models is empty"
    except (OSError, ValueError) as error:
        problem = str(getattr(error, "strerror", None) or error)
    if problem:
        raise UserError(
            f"--results {path}: not a result ({problem}); it must be the JSON of python -m eval compare, or"
            " of python -m eval retrieval MODEL --data SHARDS --json FILE"
        )
    return result


def _with_baseline(result: dict) -> list[dict]:
    """A result's models; those of a comparison name the model that their differences are relative to."""
    if "models" in result:
        return [{**model, "baseline": result["models"][0]["model"]} for model in result["models"]]
    return [{**result, "differences": {}}]


class Table:
    """Metrics of some models on one split.

    Args:
        facts: data, n_images, n_texts, is_retention (the retention set), and models, results of eval.
        weights: sha256 of the published model, which is one of them.
    """

    def __init__(self, facts: dict, weights: str):
        folder, _, split = facts["data"].rpartition(", ")
        name = Path(folder).parent.name if Path(folder).name == "shards" else ""  # data/icons/shards: icons
        self.folder, self.split = name or Path(folder).name, split
        self.data = f"{self.folder}, {split}"
        self.n_images, self.n_texts = facts["n_images"], facts["n_texts"]
        self.is_retention: bool = facts["is_retention"]
        self.models: list[dict] = facts["models"]
        self.published = next((model for model in self.models if model["weights_sha256"] == weights), None)
        if self.published is None:
            names = ", ".join(model["model"] for model in self.models)
            raise UserError(
                f"--results: on {self.data} there are results of {names}, none of which has the weights to"
                f" publish (sha256 {weights[:12]}...); evaluate them: python -m eval retrieval MODEL --data"
                " SHARDS --json FILE"
            )

    def markdown(self) -> dict[str, str]:
        """`title` and `table`: chance, each model with its 95 % intervals, and paired differences if there
        are any.
        """
        others = [model for model in self.models if model is not self.published]
        differences = self.published.get("differences", {})
        columns = ["", "chance", *(public_name(model["model"]) for model in others), "**this model**"]
        if differences:
            columns.append(f"difference from {public_name(self.published['baseline'])}")
        names = [f"{direction}/{metric}" for direction in GROUP_DIRECTIONS for metric in metrics_in(CARD)]
        names += [f"{INSTANCE}{direction}/R@1" for direction in DIRECTIONS]
        models = [*others, self.published]
        rows = []
        for name in names:
            if name in self.published["metrics"]:
                row = [title_of(name), show_of(self.published, CHANCE + name)]
                row += [show_of(model, name) for model in models]
                rows.append(
                    [*row, show_difference(name, differences.get(name), p_value=False)]
                    if differences
                    else row
                )
        title = f"{self.data}: {self.n_images:,} images, {self.n_texts:,} distinct captions"
        if self.is_retention:
            title = f"Retention set, {title}"
        return {"title": title, "table": markdown_table(columns, rows)}

    def calibration(self) -> str:
        """A sentence on the softmax of cosines as probabilities; "" where eval did not measure it."""
        error = self.published["metrics"].get("calibration_error")
        if error is None:
            return ""
        return (
            f"The probabilities that the code above prints differ from the share of correct answers by"
            f" {100 * error:.1f} points on average (calibration error on {self.data}). Ranks do not depend on"
            " it; before you use them as probabilities, fit a temperature on held-out data."
        )

    def eval_results(self, datasets: list[str]) -> list[EvalResult]:
        """The metrics as metadata of the hub."""
        return [
            EvalResult(
                task_type=f"{direction.replace('_', '-')}-retrieval",
                task_name=f"{direction.replace('_', ' ')} retrieval",
                dataset_type=self._hub_dataset(datasets) or self.folder,
                dataset_name=self.folder,
                dataset_split=self.split,
                metric_type=metric,
                metric_name=METRICS[metric].title,
                metric_value=value,
            )
            for direction, metric, value in self._values()
        ]

    def eval_entries(self, datasets: list[str], source: str) -> list[dict]:
        """The metrics as .eval_results/*.yaml has them; none where the data is on no hub: it needs an id.

        Args:
            source: URL of the model card.
        """
        if not (dataset := self._hub_dataset(datasets)):
            return []
        notes = f"{self.split} split, {self.n_images} images, {self.n_texts} distinct captions"
        return [
            {
                "dataset": {"id": dataset, "task_id": f"{direction}/{metric}"},
                "value": value,
                "source": {"url": source, "name": "Model card"},
                "notes": notes,
            }
            for direction, metric, value in self._values()
        ]

    def _hub_dataset(self, datasets: list[str]) -> str:
        """The data set on the hub that this is a split of; "" if that is not known."""
        return datasets[0] if len(datasets) == 1 and not self.is_retention else ""

    def _values(self) -> list[tuple[str, str, float]]:
        """(direction, metric, value) of the published model."""
        metrics = self.published["metrics"]
        return [
            (direction, metric, metrics[f"{direction}/{metric}"])
            for direction in GROUP_DIRECTIONS
            for metric in metrics_in(CARD)
            if f"{direction}/{metric}" in metrics
        ]
