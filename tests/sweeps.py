"""What the tests of train.sweep and train.lr share: small options, and trainings in this process."""

import json
from pathlib import Path

import pytest

from data_prep.errors import UserError
from eval.validation import validator
from train.loop import fit
from train.recipe import Recipe
from train.world import World

SMALL = ["--epochs", "2", "--global-batch-size", "64", "--micro-batch-size", "64", "--workers", "0"]
SMALL += ["--precision", "fp32", "--activation-checkpointing", "none", "--log-every-steps", "1"]
SMALL += ["--optim.warmup-fraction", "0.2"]


def call_main(main, *words) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["python -m", *map(str, words)])
        main()


def train_here(file: Path, recipe: Recipe, nproc: int, stop) -> int:
    """In place of train.tune.sweep.train_one: the start of a process costs seconds."""
    try:
        fit(recipe, World(), validator(recipe, World()))
    except UserError as error:
        return error.exit_code
    return 0


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
