"""Compare runs: the recipe keys in which they differ, and what the best checkpoint of each reached."""

import dataclasses
import json
import statistics
from pathlib import Path

from data_prep.atomic import atomic_file
from data_prep.errors import UserError
from data_prep.tables import markdown_table, percent
from train.data.shares import shares_of
from train.metrics import DIRECTIONS
from train.recipe import RESUME_SAFE, Recipe, flags_of, leaves, parse
from train.retain.select import RETENTION, TRAINED, prefix
from train.run.records import read_metrics, read_state, read_status

# Rows are sorted by it. Each run has selected its best checkpoint by its own best_metric.
SCORE = "val/mean/R@1"
# Differences in these keys get no column: they change neither results nor speed.
WITHOUT_COLUMN = {*RESUME_SAFE} - {"workers", "micro_batch_size", "activation_checkpointing", "compile"}
NOTE = (
    "R@1 by group in % on the val split, at the best checkpoint; arrows: from the weights before training."
    " Values selected on val are optimistic; to report the selected run: `python -m eval retrieval RUN --data"
    " SHARDS --split test`"
)


def recipes_in(folder: Path) -> dict[str, Recipe | None]:
    """Recipes of the runs in `folder` by name; None for runs that a cluster has queued but not started."""
    queued = {path.parent.parent.name: None for path in sorted(folder.glob("*/slurm/recipe.yaml"))}
    started = {path.parent.name: parse(flags_of(path)) for path in sorted(folder.glob("*/recipe.yaml"))}
    return queued | started


def results(
    folder: Path, recipes: dict[str, Recipe | None], failed: dict[str, int] | None = None
) -> list[dict]:
    """What each run has reached, the best first.

    Args:
        failed: exit codes of runs that failed in this sweep.

    Returns:
        For each run: `run`, the name of its folder; `state`; `varied`, the keys in which the runs differ;
            `score`, `metrics`, `epoch`, `samples` and `weights` (trained, ema or a WiSE-FT mixture) of its
            best checkpoint; `before`, the metrics before training; `pairs_per_s`, the median.
    """
    all_leaves = {
        name: leaves(dataclasses.asdict(recipe))
        | {"shares": " ".join(map(str, shares_of(recipe.data).values()))}
        for name, recipe in recipes.items()
        if recipe
    }
    keys = list(
        dict.fromkeys(key for values in all_leaves.values() for key in values if key not in WITHOUT_COLUMN)
    )
    varied = [key for key in keys if len({str(values.get(key)) for values in all_leaves.values()}) > 1]
    rows = []
    for name in recipes:
        row = {"run": name, "state": "not started"} | _reached(folder / name)
        if failed and name in failed:
            row["state"] = f"failed, exit code {failed[name]}"
        row["varied"] = {key: all_leaves[name].get(key) for key in varied} if name in all_leaves else {}
        rows.append(row)
    return sorted(
        rows, key=lambda row: (-1 if row["score"] is None else row["score"], row["run"]), reverse=True
    )


def _reached(run: Path) -> dict:
    """What the files of one run say; None where it has no checkpoint yet."""
    metrics_file, state_file = run / "metrics.jsonl", run / "checkpoints" / "best" / "state.json"
    lines = read_metrics(metrics_file)
    validations = [line for line in lines if SCORE in line]
    trained = [line for line in validations if line["samples"]]  # the first is of the weights before training
    try:
        state = read_state(state_file.parent.resolve()) if state_file.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{state_file.parent}: damaged ({error}); restore the run from a copy") from None
    best = next((line for line in trained if line["samples"] == state["samples"]), None) if state else None
    weights = state.get("weights", TRAINED)
    metrics = _metrics(best or {}, prefix(weights))
    speeds = [speed for line in lines if (speed := line.get("time/pairs_per_s")) is not None]
    reached = {
        "score": metrics.get(SCORE),
        "epoch": best and 1 + trained.index(best),
        "samples": best and best["samples"],
        "weights": best and weights,
        "metrics": metrics,
        "before": _metrics(validations[0] if validations and not validations[0]["samples"] else {}),
        "pairs_per_s": statistics.median(speeds) if speeds else None,
    }
    if status := read_status(run):
        reached["state"] = status["state"]
    return reached


def _metrics(line: dict, prefix: str = "") -> dict[str, float]:
    """The metrics of one candidate in a line of metrics.jsonl, without its prefix."""
    return {
        name.removeprefix(prefix): value
        for name, value in line.items()
        if name.startswith((f"{prefix}val/", f"{prefix}retention/"))
    }


def markdown(rows: list[dict]) -> str:
    """The rows as a Markdown table with a note."""
    varied = list(dict.fromkeys(key for row in rows for key in row["varied"]))
    has_retention = any(RETENTION in row["metrics"] for row in rows)
    titles = ["run", *varied, "mean", *(name.replace("_", " ") for name in DIRECTIONS)]
    titles += [*(["retention, mean"] if has_retention else []), "epoch", "pairs/s", "state"]
    lines = []
    for row in rows:
        lines.append(
            [
                row["run"],
                *(_shown(row["varied"].get(key, "")) for key in varied),
                _before_and_after(row, SCORE),
                *(percent(row["metrics"].get(f"val/{name}/R@1")) for name in DIRECTIONS),
                *([_before_and_after(row, RETENTION)] if has_retention else []),
                *("" if row[name] is None else f"{row[name]:.4g}" for name in ("epoch", "pairs_per_s")),
                row["state"],
            ]
        )
    return f"{markdown_table(titles, lines)}\n\n{NOTE}"


def write(folder: Path, rows: list[dict], text: str) -> None:
    """Write sweep.md (the text) and sweep.json (the rows)."""
    for name, content in (
        ("sweep.md", f"{text}\n"),
        ("sweep.json", json.dumps({"score": SCORE, "runs": rows}, indent=1) + "\n"),
    ):
        with atomic_file(folder / name) as partial:
            partial.write_text(content)


def _before_and_after(row: dict, name: str) -> str:
    return " → ".join(filter(None, (percent(row["before"].get(name)), percent(row["metrics"].get(name)))))


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
