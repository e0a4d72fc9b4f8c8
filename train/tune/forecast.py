"""Forecast what a run will reach (train.forecast): short runs on parts of the groups, then an extrapolation.

recipe -> RUNS/NAME, a run per part -> what each query of val scores -> train.tune.extrapolate
                                                    -> RUNS/forecast.md, forecast.json, forecast.png
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.atomic import atomic_file, write_json
from data_prep.errors import UserError
from data_prep.shards import Shards, read_manifest
from data_prep.store.remote import place_of
from data_prep.strict_json import read_json
from data_prep.tables import Table, counted, percent, text_of
from data_prep.terminal import say
from train.bench.rows import in_fresh_process
from train.bench.timing import measure_step
from train.data.sets import open_pairs
from train.recipe import Recipe, differences
from train.run.records import read_metrics
from train.tune.extrapolate import LEVEL, effective_data, gain, line_through, score_at
from train.tune.sweep import check_runs, plan, report_rest, train_all
from train.tune.table import SCORE, recipes_in, results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRACTIONS = (1 / 8, 1 / 4, 1 / 2)  # of the groups
CAPTIONS_FRACTION = 1 / 4  # of the run that sees first captions alone
MAX_COST = 0.6  # of the full run's pairs
MIN_CAPTIONS = 1.25  # per image, on average: with fewer, a run on first captions is the same run
COUNTED_IMAGES = 2000  # whose captions are counted
MIN_VAL_GROUPS = 20
TIMED_STEPS = 3
TWICE = {"images": "groups", "captions": "captions per image", "epochs": "epochs"}  # by what may be short
NOTE = (
    "R@1 by group, the mean of both directions, of the best checkpoint. The forecast and its intervals hold"
    " for this recipe and this val split alone."
)

# Of a run and its recipe: what each query of val scores, float [queries], and its group, int64 [queries].
Hits = Callable[[str, Recipe], tuple[np.ndarray, np.ndarray]]
Read = Callable[[list[str]], tuple[object, Recipe]]  # a command line -> the command's own options, a recipe


def plan_runs(arguments: list[str], recipe: Recipe, folder: Path, read: Read) -> dict[str, Recipe]:
    """The recipes of the short runs, by name: all of equally many epochs, as many as MAX_COST allows.

    Args:
        arguments, folder, read: see train.tune.sweep.plan.
        recipe: of the full run.

    Raises:
        UserError: the data or the recipe has too little of something.
    """
    check_data(recipe)
    fractions = [*FRACTIONS, *([CAPTIONS_FRACTION] if captions_per_image(recipe) else [])]
    pairs = sum(pairs_per_epoch(recipe, fraction) for fraction in fractions)
    epochs = int(MAX_COST * recipe.epochs * pairs_per_epoch(recipe, 1) / pairs)
    if not epochs:
        raise UserError(
            f"--epochs {recipe.epochs}: must be at least 2, because the short runs of a forecast have fewer"
            " epochs than the full run"
        )
    parts = ",".join(f"{recipe.groups_fraction * fraction:g}" for fraction in FRACTIONS)
    short = plan(arguments, [f"epochs={epochs}", f"groups_fraction={parts}"], folder, read)
    if len(fractions) > len(FRACTIONS):
        quarter = f"groups_fraction={recipe.groups_fraction * CAPTIONS_FRACTION:g}"
        short |= plan(arguments, [f"epochs={epochs}", quarter, "captions.sample=first"], folder, read)
    return short


def check_data(recipe: Recipe) -> None:
    """Raises:
    UserError: there is no val split, or val or the smallest part of train has too few groups.
    """
    if not isinstance(recipe.data, str):
        raise UserError("--data: several data sets; a forecast is made of one, so pass the one that matters")
    if not read_manifest(place_of(recipe.data))["splits"].get("val", {}).get("samples"):
        raise UserError(
            f"{recipe.data}: has no val split, on which a forecast is made; build shards with one: python -m"
            " data_prep build ... --val 0.1"
        )
    n_groups = n_groups_of(Shards(recipe.data, "val"))
    if n_groups < MIN_VAL_GROUPS:
        raise UserError(
            f"{recipe.data}: val has {counted(n_groups, 'group')}, too few for a forecast; it needs at least"
            f" {MIN_VAL_GROUPS}: build the shards with a larger --val, or from more images"
        )
    smallest = part(recipe, FRACTIONS[0])
    if len(smallest) < recipe.global_batch_size:
        raise UserError(
            f"{recipe.data}: an eighth of the training groups has {counted(len(smallest), 'image')}, fewer"
            f" than one batch of {recipe.global_batch_size}; pass a smaller --global-batch-size here and to"
            " the full run, or train without a forecast: with so few images the run itself is short"
        )


def part(recipe: Recipe, fraction: float) -> Shards:
    """The pairs of a fraction of the groups that the recipe trains on."""
    return open_pairs(dataclasses.replace(recipe, groups_fraction=recipe.groups_fraction * fraction))


def pairs_per_epoch(recipe: Recipe, fraction: float = 1) -> int:
    size = recipe.global_batch_size
    return len(part(recipe, fraction)) // size * size


def n_groups_of(shards: Shards) -> int:
    return len(np.unique(shards.groups))


def captions_per_image(recipe: Recipe) -> float:
    """The mean over training images; 0 where it is near one, or where the recipe takes the first alone."""
    if recipe.captions.sample == "first":
        return 0.0
    shards = open_pairs(recipe)
    numbers = np.unique(np.linspace(0, len(shards) - 1, COUNTED_IMAGES).astype(int)).tolist()
    mean = float(np.mean([len(shards.captions(number)) for number in numbers]))
    return mean if mean >= MIN_CAPTIONS else 0.0


def forecast(folder: Path, recipe: Recipe, short: dict[str, Recipe], nproc: int, hits: Hits) -> None:
    """Train the short runs that are not finished; print and write the forecast.

    Args:
        recipe: of the full run.
        short: of plan_runs().
        hits: see eval.validation.val_hits.

    Raises:
        UserError: a run cannot start, or the folder holds another forecast; none was started.
        Fault: runs failed.
    """
    finished = check_runs(folder, short, nproc)
    check_same(folder, recipe, short)
    announce(recipe, short, folder, nproc)
    failed, stopped = train_all(folder, short, finished, nproc)
    rows = {row["run"]: row for row in results(folder, short, failed)}
    if stopped or failed:
        say("The forecast is unfinished. The same command resumes it.")
        report_rest(folder, failed, stopped)
        return
    if diverged := [name for name, row in rows.items() if row["score"] is None]:
        raise UserError(
            f"{folder / diverged[0]}: the run diverged; pass a smaller --optim.lr (now {recipe.optim.lr:g})"
        )
    found = extrapolated(folder, recipe, short, rows, hits)
    say(text := text_of(parts_of(found)))
    with atomic_file(folder / "forecast.md") as partial:
        partial.write_text(f"{text}\n")
    with atomic_file(folder / "forecast.png") as partial:
        plot(found).savefig(partial, format="png", dpi=150)
    write_json(folder / "forecast.json", found)


def check_same(folder: Path, recipe: Recipe, short: dict[str, Recipe]) -> None:
    """Check that the folder holds no forecast of another recipe, which this one would replace.

    Raises:
        UserError: it does; names the keys that differ.
    """
    if (file := folder / "forecast.json").is_file():
        fix = "pass another --runs, or remove this file"
        before = read_json(file, {"forecast": [{"epochs": int}]}, fix)["forecast"]
        if before and before[0]["epochs"] != recipe.epochs:
            raise UserError(
                f"--epochs {recipe.epochs}: {file} is the forecast of a run of"
                f" {counted(before[0]['epochs'], 'epoch')}; pass another --runs"
            )
    for name, old in recipes_in(folder).items():
        if old is None or name in short or "groups_fraction=" not in name:
            continue
        if changed := min((differences(old, one) for one in short.values()), key=len):
            raise UserError(
                f"{folder / name}: is a run of another forecast ({'; '.join(changed)}, in the short runs);"
                " pass another --runs"
            )


def announce(recipe: Recipe, short: dict[str, Recipe], folder: Path, nproc: int) -> None:
    """Say what the short runs cost, before they start."""
    rows = results(folder, short)
    left = sum(run_pairs(short[row["run"]]) for row in rows if row["state"] != "finished")
    speeds = [row["pairs_per_s"] for row in rows if row["pairs_per_s"]]
    time = ""
    if left:
        speed = (
            speeds[0]
            if speeds
            else nproc * in_fresh_process(measure_step, recipe, TIMED_STEPS)["pairs_per_s"]
        )
        time = (
            f"; training alone takes about {minutes(left / speed)} at {speed:,.0f} pairs/s, and each run also"
            f" starts a process and validates {n_validations(next(iter(short.values())))} times"
        )
    say(
        f"{len(short)} short runs see {sum(map(run_pairs, short.values())):,} pairs,"
        f" {100 * cost_of(recipe, short):.0f} % of the full run's {run_pairs(recipe):,}{time}"
    )


def run_pairs(recipe: Recipe) -> int:
    """The pairs that a run sees."""
    return recipe.epochs * pairs_per_epoch(recipe)


def n_validations(recipe: Recipe) -> int:
    """Of a run: of the initial weights, and of each candidate after each epoch."""
    return 1 + recipe.epochs * (1 + len(recipe.wise_ft) + bool(recipe.ema))


def cost_of(recipe: Recipe, short: dict[str, Recipe]) -> float:
    """The pairs of the short runs, as a fraction of the full run's."""
    return sum(map(run_pairs, short.values())) / run_pairs(recipe)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} s"


def extrapolated(
    folder: Path, recipe: Recipe, short: dict[str, Recipe], rows: dict[str, dict], hits: Hits
) -> dict:
    """What forecast.json holds.

    Args:
        rows: of train.tune.table.results, by the run's name.
    """
    scored = {name: hits(str(folder / name), one) for name, one in short.items()}
    values, groups = {name: each for name, (each, _) in scored.items()}, next(iter(scored.values()))[1]
    plain = [name for name, one in short.items() if one.captions.sample == recipe.captions.sample]
    data = [
        effective_data(short[name].groups_fraction / recipe.groups_fraction, short[name].epochs)
        for name in plain
    ]
    line = line_through(np.stack([values[name] for name in plain]), groups, np.array(data))
    estimates = {times: score_at(line, effective_data(times, recipe.epochs)) for times in (1, 2)}
    full = effective_data(1, recipe.epochs)
    gains = {"images": gain(line, full, 2 * full)}
    if captions := captions_per_image(recipe):
        (first,) = set(short) - set(plain)
        (all_,) = (name for name in plain if short[name].groups_fraction == short[first].groups_fraction)
        pair = line_through(np.stack([values[first], values[all_]]), groups, np.array([1.0, captions]))
        gains["captions"] = gain(pair, 1, 2)
    best = best_epoch(folder / plain[-1])
    if best > short[plain[-1]].epochs / 2:
        gains["epochs"] = gain(line, full, effective_data(1, 2 * recipe.epochs))
    size = size_of(recipe)
    return {
        "metric": SCORE,
        "before": rows[plain[0]]["before"][SCORE],
        "short_runs": [
            {
                "run": name,
                **size_of(one),
                "captions": one.captions.sample,
                "value": float(values[name].mean()),
            }
            for name, one in short.items()
        ],
        "forecast": [
            {"times": times, **size, "groups": times * size["groups"], "images": times * size["images"]}
            | estimate.interval()._asdict()
            for times, estimate in estimates.items()
        ],
        "cost": cost_of(recipe, short),
        "captions_per_image": captions or None,
        "best_epoch": best,
        "gains": {name: each.interval(estimates[1].value)._asdict() for name, each in gains.items()},
        "level": LEVEL,
    }


def size_of(recipe: Recipe) -> dict[str, int]:
    split = open_pairs(recipe)
    return {"groups": n_groups_of(split), "images": len(split), "epochs": recipe.epochs}


def best_epoch(run: Path) -> int:
    lines = read_metrics(run / "metrics.jsonl")
    scores = [line[SCORE] for line in lines if SCORE in line and line["samples"]]
    return 1 + scores.index(max(scores))


def parts_of(found: dict) -> list[str | Table]:
    """What is printed.

    Args:
        found: of extrapolated().
    """
    rows = [["before training", "", "", "", percent(found["before"]), ""]]
    for run in found["short_runs"]:
        kind = ", first captions" if run["captions"] != found["short_runs"][0]["captions"] else ""
        rows.append([f"short run{kind}", *sizes(run), percent(run["value"]), ""])
    for each in found["forecast"]:
        name = "forecast: all" if each["times"] == 1 else "forecast: twice as many"
        rows.append(
            [name, *sizes(each), percent(each["value"]), f"{percent(each['low'])} to {percent(each['high'])}"]
        )
    percents = f"{100 * found['level']:.0f} % interval"
    gains = [
        [
            f"twice as many {TWICE[name]}",
            f"{100 * each['value']:+.1f}",
            f"{100 * each['low']:+.1f} to {100 * each['high']:+.1f}",
        ]
        for name, each in found["gains"].items()
    ]
    if "epochs" not in found["gains"]:
        gains.append(["more epochs", f"none: best after epoch {found['best_epoch']}", ""])
    return [
        Table(["", "groups", "images", "epochs", "R@1 on val, %", percents], rows),
        Table(["instead of the full run", "R@1, points", percents], gains),
        warning(found) or verdict(found["gains"]),
        NOTE,
    ]


def sizes(run: dict) -> list[str]:
    return [f"{run[name]:,}" for name in ("groups", "images", "epochs")]


def warning(found: dict) -> str:
    """Where the short runs show no learning, what to do; else nothing."""
    if max(run["value"] for run in found["short_runs"]) > found["before"]:
        return ""
    return (
        "No short run is better than the weights before training, so the forecast means little. From random"
        " weights, or with few steps, more --epochs may be what is missing; else search for a learning rate"
        " first: python -m train.lr"
    )


def verdict(gains: dict[str, dict]) -> str:
    """What the run is short of: the largest gain that is clear, and others that may be as large; where none
    is clear, the largest and its interval.
    """
    largest = max(gains, key=lambda name: gains[name]["value"])
    if gains[largest]["value"] <= 0:
        return "Short of nothing: no doubling promises a gain."
    clear = {name: each for name, each in gains.items() if each["low"] > 0}
    if not clear:
        value, low, high = (f"{100 * gains[largest][key]:+.1f}" for key in ("value", "low", "high"))
        return (
            f"Perhaps short of {largest}: there twice as many promise most, {value} points, but it may be"
            f" nothing ({low} to {high})."
        )
    most = max(each["value"] for each in clear.values())
    names = [name for name in clear if clear[name]["high"] >= most]
    names.sort(key=lambda name: -clear[name]["value"])
    return f"Short of {' or '.join(names)}: there twice as many promise most."


def plot(found: dict) -> "Figure":
    """R@1 over the groups: the short runs, and the forecast with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    kind = found["short_runs"][0]["captions"]
    runs = [run for run in found["short_runs"] if run["captions"] == kind]
    axis.plot(
        [run["groups"] for run in runs],
        [100 * run["value"] for run in runs],
        marker="o",
        label=f"short runs, {counted(runs[0]['epochs'], 'epoch')}",
    )
    expected = found["forecast"]
    values, lows, highs = (
        100 * np.array([each[name] for each in expected]) for name in ("value", "low", "high")
    )
    axis.errorbar(
        [each["groups"] for each in expected],
        values,
        [values - lows, highs - values],
        marker="s",
        linestyle="none",
        capsize=3,
        color="C1",
        label=f"forecast, {counted(expected[0]['epochs'], 'epoch')}, {100 * found['level']:.0f} % interval",
    )
    axis.axhline(100 * found["before"], color="gray", linestyle="dotted", label="before training")
    ticks = [each["groups"] for each in (*runs, *expected)]
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set(xlabel="groups to train on", ylabel="mean R@1 of both directions on val, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure
