"""Runs beside each other: what differs between their recipes, and what the best checkpoint of each reached."""

import dataclasses
import json
import statistics
from pathlib import Path

from data_prep.atomic import atomic_file
from train.bench.table import padded_table
from train.recipe import RESUME_SAFE, Recipe, flags_of, leaves, parse
from train.retain.select import RETENTION as CONTROL
from train.retain.select import TRAINED, prefix

SCORE = (
    "val/mean/R@1"  # what rows are sorted by; each run has chosen its weights to use by its own best_metric
)
UNTOLD = {*RESUME_SAFE} - {
    "workers",
    "micro_batch_size",
    "memory",
    "compile",
}  # differences that no column is worth
DIRECTIONS = ("image_to_text", "text_to_image")
NOTE = (
    "R@1 in %, by group, on the val split, of the best checkpoint by validation; arrows: from the weights"
    " before training. To choose by val flatters; of the one that you choose: `python -m eval retrieval RUN"
    " --data SHARDS --split test`"
)


def recipes_in(folder: Path) -> dict[str, Recipe | None]:
    """The recipes of the runs in `folder` by their names; None of those that a cluster has not begun yet."""
    waiting = {path.parent.parent.name: None for path in sorted(folder.glob("*/slurm/recipe.yaml"))}
    return waiting | {
        path.parent.name: parse(flags_of(path)) for path in sorted(folder.glob("*/recipe.yaml"))
    }


def results(
    folder: Path, recipes: dict[str, Recipe | None], failed: dict[str, int] | None = None
) -> list[dict]:
    """What each run reached so far, the best first.

    Args:
        failed: exit codes of runs that a sweep saw fail.

    Returns:
        For each: `run`, its folder's name; `state`; `varied`, the keys that differ between the runs; `score`,
            `metrics`, `epoch` and
        `samples` of its best checkpoint, and which `weights` that gives away; `before`, the metrics before
        training; `pairs_per_s`, the median.
    """
    all_leaves = {name: leaves(dataclasses.asdict(recipe)) for name, recipe in recipes.items() if recipe}
    keys = list(dict.fromkeys(key for found in all_leaves.values() for key in found if key not in UNTOLD))
    varied = [key for key in keys if len({str(found.get(key)) for found in all_leaves.values()}) > 1]
    rows = []
    for name in recipes:
        row = {"run": name, "state": "not begun"} | _reached(folder / name)
        if failed and name in failed:
            row["state"] = f"failed, exit code {failed[name]}"
        rows.append(
            row | {"varied": {key: all_leaves[name].get(key) for key in varied} if name in all_leaves else {}}
        )
    return sorted(
        rows, key=lambda row: (-1 if row["score"] is None else row["score"], row["run"]), reverse=True
    )


def _reached(run: Path) -> dict:
    lines = (
        (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        if (run / "metrics.jsonl").is_file()
        else []
    )
    lines = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be in the making
    validations = [line for line in lines if SCORE in line]
    trained = [line for line in validations if line["samples"]]  # the first is of the weights before training
    state_file = run / "checkpoints" / "best" / "state.json"
    state = json.loads(state_file.read_text()) if state_file.is_file() else {}
    best = next((line for line in trained if line["samples"] == state["samples"]), None) if state else None
    weights = state.get("weights", TRAINED)
    metrics = _metrics(best or {}, prefix(weights))
    speeds = [line["time/pairs_per_s"] for line in lines if "time/pairs_per_s" in line]
    found = {
        "score": metrics.get(SCORE),
        "epoch": best and 1 + trained.index(best),
        "samples": best and best["samples"],
        "weights": best and weights,
        "metrics": metrics,
        "before": _metrics(validations[0] if validations and not validations[0]["samples"] else {}),
        "pairs_per_s": statistics.median(speeds) if speeds else None,
    }
    if (run / "status.json").is_file():
        found["state"] = json.loads((run / "status.json").read_text())["state"]
    return found


def _metrics(line: dict, of: str = "") -> dict[str, float]:
    return {
        name.removeprefix(of): value
        for name, value in line.items()
        if name.startswith((f"{of}val/", f"{of}control/"))
    }


def markdown(rows: list[dict]) -> str:
    """The rows as a table for people, in Markdown."""
    varied = list(dict.fromkeys(key for row in rows for key in row["varied"]))
    has_control = any(CONTROL in row["metrics"] for row in rows)
    titles = [
        *varied,
        "mean",
        *(name.replace("_", " ") for name in DIRECTIONS),
        *(["control, mean"] if has_control else []),
    ]
    cells = {}
    for row in rows:
        values = [_shown(row["varied"].get(key, "")) for key in varied]
        recalls = [
            _change(row, SCORE),
            *(_percent(row["metrics"].get(f"val/{name}/R@1")) for name in DIRECTIONS),
        ]
        control = [_change(row, CONTROL)] if has_control else []
        others = ["" if row[name] is None else f"{row[name]:.4g}" for name in ("epoch", "pairs_per_s")]
        cells[row["run"]] = [*values, *recalls, *control, *others, row["state"]]
    return "\n".join([*padded_table("run", (*titles, "epoch", "pairs/s", "state"), cells), "", NOTE])


def write(folder: Path, rows: list[dict], text: str) -> None:
    """sweep.md, the text, and sweep.json, the rows."""
    for name, content in (
        ("sweep.md", f"{text}\n"),
        ("sweep.json", json.dumps({"score": SCORE, "runs": rows}, indent=1) + "\n"),
    ):
        with atomic_file(folder / name) as partial:
            partial.write_text(content)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _change(row: dict, name: str) -> str:
    return " → ".join(filter(None, (_percent(row["before"].get(name)), _percent(row["metrics"].get(name)))))


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
