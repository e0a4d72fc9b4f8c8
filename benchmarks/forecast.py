"""How well `train.forecast` predicts: forecast, then train, on the grounds of benchmarks.quality.

    python -m benchmarks.forecast --icons OUT --clipart OUT2   five seeds, an hour for each on two cores
    python -m benchmarks.forecast --clipart OUT2 --seeds 0     one seed of one ground

For each seed: a forecast for all groups and its full run; a forecast for half of the groups, as if they were
all, and its full run. The full run of all groups checks the second forecast's "twice as many" too. Each seed
has other parts, another order and other augmentations; base and val split are the same. The same command
continues after an interruption: runs and forecasts are in OUT/forecast. OUT is that of benchmarks.quality;
what it lacks (data, base) is made.
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
    print(each_forecast(by_ground))
    print()
    print(summary(by_ground))


def one(out: Path, seed: int) -> list[dict]:
    """The forecasts of one seed beside what came: "part", "times", "value", "low", "high", "measured"."""
    folder, checked, measured = out / "forecast" / str(seed), [], {}
    shared = [quality.SEED_RECIPE, "--model", f"local-dir:{out / 'base' / 'model'}", "--data", out / "B"]
    shared += ["--epochs", EPOCHS, "--seed", seed, *FLAGS]
    for part, fraction in PARTS.items():
        own = [*shared, "--groups-fraction", fraction]
        if not (folder / part / "forecast.json").is_file():
            call("train.forecast", *own, "--runs", folder / part)
            for checkpoints in (folder / part).glob("*/checkpoints"):
                shutil.rmtree(checkpoints)
        full = folder / "full" / part
        if not (full / "result.json").is_file():
            call("train", *own, "--run", full)
            (row,) = results(full.parent, {part: None})
            if row["state"] != "finished":
                raise Fault(f"{full}: {row['state']} before its end; run the same command again")
            (full / "result.json").write_text(json.dumps({"score": row["score"]}))
            shutil.rmtree(full / "checkpoints")
        measured[fraction] = json.loads((full / "result.json").read_text())["score"]
    for part, fraction in PARTS.items():
        forecast = json.loads((folder / part / "forecast.json").read_text())
        for each in forecast["forecast"]:
            if each["times"] * fraction in measured:
                checked.append({"seed": seed, "part": part, "cost": forecast["cost"], **each})
                checked[-1]["measured"] = measured[each["times"] * fraction]
    return checked


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


def is_covered(each: dict) -> bool:
    return each["low"] <= each["measured"] <= each["high"]


if __name__ == "__main__":
    exit_on_user_error(lambda: tyro.cli(main, config=CONFIG))
