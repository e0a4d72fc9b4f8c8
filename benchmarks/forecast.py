"""How well `train.forecast` predicts: forecast, then train, on the grounds of benchmarks.quality.

    python -m benchmarks.forecast --icons OUT --clipart OUT2   five seeds, an hour for each on two cores
    python -m benchmarks.forecast --clipart OUT2 --seeds 0     one seed of one ground

For each seed: a forecast for all groups and its full run; a forecast for half of the groups, as if they were
all, and its full run. The full run of all groups checks the second forecast's "twice as many" too. What the
second says that the half is short of is checked by that run and two more of the half: of twice as many
epochs, and on first captions alone. Each seed has other parts, another order and other augmentations; base
and val split are the same. The same command continues after an interruption: runs and forecasts are in
OUT/forecast. OUT is that of benchmarks.quality; what it lacks (data, base) is made.
"""

import concurrent.futures
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import tyro

from benchmarks import quality, quality_data
from benchmarks.quality_data import call
from data_prep.cli import CONFIG
from data_prep.cores import cores
from data_prep.errors import Fault, UserError, exit_on_user_error
from data_prep.tables import markdown_table
from train.tune.table import results

EPOCHS = 8
PARTS = {"all": 1.0, "half": 0.5}  # of the groups, that a forecast takes for all there are
# Full runs, by name: the flags in which they differ from the others.
FULL = {part: ["--groups-fraction", fraction] for part, fraction in PARTS.items()}
FULL["longer"] = [*FULL["half"], "--epochs", 2 * EPOCHS]
FULL["first captions"] = [*FULL["half"], "--captions.sample", "first"]
# What the half may be short of: the run with more of it, and the one with less.
MORE = {"images": ("all", "half"), "epochs": ("longer", "half"), "captions": ("half", "first captions")}
# Batches of half the size of benchmarks.quality, so that a sixteenth of the groups is several steps.
FLAGS = [
    *quality.SEED,
    "--same-group",
    "positive",
    "--captions.sample",
    "random",
    "--captions.tag-dropout",
    0.7,
]
FLAGS += ["--augment.downscale-prob", 0.2, "--optim.lr", 5e-4, *quality.CPU]
FLAGS += ["--global-batch-size", 64, "--micro-batch-size", 64]


def main(
    icons: Path | None = None,
    clipart: Path | None = None,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    packages: Path | None = None,
    jobs: int = 0,
) -> None:
    """Forecast and train; print the tables.

    Args:
        icons, clipart: Folder of benchmarks.quality for each ground; one that is left out is not measured.
        seeds: Of the runs.
        packages: See benchmarks.quality.
        jobs: Seeds at a time, one thread each; 0 is one per core.
    """
    grounds = {name: out.absolute() for name, out in (("icons", icons), ("clipart", clipart)) if out}
    if not grounds:
        raise UserError("no ground; pass --icons OUT, --clipart OUT or both")
    for name, out in grounds.items():
        quality_data.make(out, packages, ground=name)
        quality.base(out, quality.BASE_EPOCHS)
    os.environ["OMP_NUM_THREADS"] = "1"
    work = [(out, seed) for seed in seeds for out in grounds.values()]
    with concurrent.futures.ProcessPoolExecutor(
        jobs or cores(), multiprocessing.get_context("spawn")
    ) as pool:
        found = dict(zip(work, pool.map(one, *zip(*work, strict=True)), strict=True))
    by_ground = {name: [found[out, seed] for seed in seeds] for name, out in grounds.items()}
    forecasts = {ground: [each for each, _ in seeds] for ground, seeds in by_ground.items()}
    print(each_forecast(forecasts))
    print()
    print(summary(forecasts))
    print()
    print(short_of({ground: [each for _, each in seeds] for ground, seeds in by_ground.items()}))


def one(out: Path, seed: int) -> tuple[list[dict], dict]:
    """What was forecast for one seed beside what came.

    Returns:
        The forecasts: "part", "times", "value", "low", "high", "measured". By name of MORE, the gain of the
        half: "value", "low", "high", "measured".
    """
    folder = out / "forecast" / str(seed)
    shared = [quality.SEED_RECIPE, "--model", f"local-dir:{out / 'base' / 'model'}", "--data", out / "B"]
    shared += ["--epochs", EPOCHS, "--seed", seed, *FLAGS]
    for part in PARTS:
        if not (folder / part / "forecast.json").is_file():
            call("train.forecast", *shared, *FULL[part], "--runs", folder / part)
            for checkpoints in (folder / part).glob("*/checkpoints"):
                shutil.rmtree(checkpoints)
    forecasts = {part: json.loads((folder / part / "forecast.json").read_text()) for part in PARTS}
    full = {name: full_run(folder / "full" / name, [*shared, *flags]) for name, flags in FULL.items()}
    measured, checked = {fraction: full[part] for part, fraction in PARTS.items()}, []
    for part, fraction in PARTS.items():
        for each in forecasts[part]["forecast"]:
            if each["times"] * fraction in measured:
                checked.append({"seed": seed, "part": part, "cost": forecasts[part]["cost"], **each})
                checked[-1]["measured"] = measured[each["times"] * fraction]
    return checked, gains(forecasts["half"], full)


def full_run(folder: Path, words: list) -> float:
    """R@1 on val of a run, which is trained if it is not there."""
    if not (folder / "result.json").is_file():
        call("train", *words, "--run", folder)
        (row,) = results(folder.parent, {folder.name: None})
        if row["state"] != "finished":
            raise Fault(f"{folder}: {row['state']} before its end; run the same command again")
        (folder / "result.json").write_text(json.dumps({"score": row["score"]}))
        shutil.rmtree(folder / "checkpoints")
    return json.loads((folder / "result.json").read_text())["score"]


def gains(forecast: dict, full: dict[str, float]) -> dict[str, dict]:
    """By name of MORE, what was forecast that the half gains by it, and what came: see one().

    The forecast of captions is of twice as many; here it is reduced to as many as there are for one.
    """
    found = {}
    for name, (more, less) in MORE.items():
        doublings = np.log2(forecast["captions_per_image"]) if name == "captions" else 1
        # No gain is forecast for epochs where the best one was early.
        each = forecast["gains"].get(name, dict.fromkeys(("value", "low", "high"), 0.0))
        found[name] = {end: doublings * value for end, value in each.items()}
        found[name]["measured"] = full[more] - full[less]
    return found


def each_forecast(found: dict[str, list[list[dict]]]) -> str:
    """A row for each forecast."""
    rows = [
        [
            ground,
            str(each["seed"]),
            f"{each['times']} x {each['part']}",
            *(f"{100 * each[name]:.1f}" for name in ("value", "low", "high", "measured")),
            "yes" if is_covered(each) else "no",
        ]
        for ground, seeds in found.items()
        for checked in seeds
        for each in checked
    ]
    columns = ["ground", "seed", "of", "forecast, %", "low", "high", "measured, %", "within"]
    return markdown_table(columns, rows, left=3)


def summary(found: dict[str, list[list[dict]]]) -> str:
    """Coverage and error, by ground and by how far the forecast reaches."""
    rows = []
    for ground in (*found, "both") if len(found) > 1 else found:
        seeds = [each for name, each in found.items() if ground in (name, "both")]
        forecasts = [each for checked in seeds for one in checked for each in one]
        for times, target in ((1, "all"), (2, "twice as many")):
            of = [each for each in forecasts if each["times"] == times]
            errors = np.array([each["value"] - each["measured"] for each in of])
            widths = [each["high"] - each["low"] for each in of]
            rows.append(
                [
                    ground,
                    target,
                    str(len(of)),
                    f"{100 * np.mean([is_covered(each) for each in of]):.0f}",
                    f"{100 * errors.mean():+.1f}",
                    f"{100 * np.abs(errors).mean():.1f}",
                    f"{100 * np.mean(widths):.1f}",
                    f"{100 * max(each['cost'] for each in of):.0f}",
                ]
            )
    columns = ["ground", "groups", "forecasts", "within the 80 % interval, %", "mean error, points"]
    columns += ["mean absolute error", "width of the interval", "cost, % of the full run"]
    return markdown_table(columns, rows, left=2)


def short_of(found: dict[str, list[dict]]) -> str:
    """For each ground and each of MORE, the gain that was forecast for the half and the one that came.

    Args:
        found: by ground, of each seed: see one().
    """
    rows = []
    for ground, seeds in found.items():
        promised, measured = ([largest(seed, key) for seed in seeds] for key in ("value", "measured"))
        for name in MORE:
            of = [seed[name] for seed in seeds]
            means = (100 * np.mean([each[key] for each in of]) for key in ("value", "measured"))
            rows.append(
                [
                    ground,
                    name,
                    *(f"{mean:+.1f}" for mean in means),
                    f"{sum(map(is_covered, of))} of {len(of)}",
                    *(str(names.count(name)) for names in (promised, measured)),
                ]
            )
    columns = ["ground", "more", "forecast, points", "measured", "within the 80 % interval"]
    columns += ["promised most, in seeds", "brought most, in seeds"]
    return markdown_table(columns, rows, left=2)


def largest(seed: dict[str, dict], key: str) -> str:
    return max(seed, key=lambda name: seed[name][key])


def is_covered(each: dict) -> bool:
    return each["low"] <= each["measured"] <= each["high"]


if __name__ == "__main__":
    exit_on_user_error(lambda: tyro.cli(main, config=CONFIG))
