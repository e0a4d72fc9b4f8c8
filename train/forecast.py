"""Forecast what a run will reach before paying for it: three short runs on an eighth, a quarter and half of
the training groups.

  python -m train.forecast train/recipes/icons.yaml --data SHARDS --runs runs/forecast
      R@1 on val with all groups and with twice as many, each with an 80 % interval, and what is short:
      images, captions per image or epochs

Each part of the groups is in the next one, and whole groups stay together. The short runs see at most 60 % of
the pairs of the full run; how many, and about how long that takes, is printed before they start. Where images
have several captions, a fourth run sees their first ones alone. RUNS holds the runs, forecast.md,
forecast.json and forecast.png. The same command resumes an unfinished forecast.

Any key of the recipe is a flag too: python -m train --help
"""

import sys
from dataclasses import dataclass

from data_prep.cli import Runs, print_guide
from data_prep.errors import exit_on_user_error
from train.recipe import Recipe, parse_with

PROG = "python -m train.forecast RECIPE"


@dataclass(frozen=True)
class Forecast:
    """Options of the forecast."""

    runs: Runs
    """Folder for the short runs, their table and the plot."""
    nproc: int = 1
    """Processes per run, one per GPU (torchrun's --nproc_per_node)."""


def read(arguments: list[str]) -> tuple[Forecast, Recipe]:
    return parse_with(Forecast, arguments, PROG, __doc__)


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments:
        print_guide(f"{PROG} --data SHARDS --runs RUNS [OPTIONS]", __doc__)
        return
    options, recipe = read([*arguments, "--run", "unused"])
    # Imported here, so that help and mistakes do not wait for torch. This command knows eval, as train does.
    from eval.validation import val_hits
    from train.tune.forecast import forecast, plan_runs

    short = plan_runs(arguments, recipe, options.runs, read)
    forecast(options.runs, recipe, short, options.nproc, val_hits)


if __name__ == "__main__":
    exit_on_user_error(main)
