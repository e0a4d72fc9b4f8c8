"""Search for a learning rate: short runs that differ in nothing else, a table, a plot and the rate to use.

  python -m train.lr train/recipes/icons.yaml --data SHARDS --runs runs/lr
      a quarter of the recipe's epochs at 0.1, 0.33, 1, 3 and 10 times its rate (--optim.lr sets the center)
  ... --rates 1e-6 3e-6 1e-5 --epochs-fraction 0.5
      these rates, half of the epochs; finished runs of other rates in the same folder count too

Every run has its full warm-up and cosine decay, the same seed and the same data. RUNS holds the runs, their
table (sweep.md, sweep.json) and the plot (lr.png). The same command resumes an unfinished search.

Any key of the recipe is a flag too: python -m train --help
"""

import sys
from dataclasses import dataclass

from data_prep.cli import Runs, print_guide
from data_prep.errors import UserError, exit_on_user_error
from train.recipe import Recipe, parse_with

PROG = "python -m train.lr RECIPE"
FACTORS = (0.1, 1 / 3, 1, 3, 10)


@dataclass(frozen=True)
class Search:
    """Options of the search."""

    runs: Runs
    """Folder for the runs, their table and the plot."""
    rates: tuple[float, ...] = ()
    """Peak learning rates to try; by default 0.1, 0.33, 1, 3 and 10 times optim.lr."""
    epochs_fraction: float = 0.25
    """Fraction of the recipe's epochs that each run trains, rounded; at least one epoch."""
    nproc: int = 1
    """Processes per run, one per GPU (torchrun's --nproc_per_node)."""


def read(arguments: list[str]) -> tuple[Search, Recipe]:
    return parse_with(Search, arguments, PROG, __doc__)


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments:
        print_guide(f"{PROG} --data SHARDS --runs RUNS [OPTIONS]", __doc__)
        return
    search, recipe = read([*arguments, "--run", "unused"])
    if not 0 < search.epochs_fraction <= 1:
        raise UserError(
            f"--epochs-fraction {search.epochs_fraction}: must be above 0 and at most 1 (all epochs)"
        )
    rates = search.rates or [float(f"{recipe.optim.lr * factor:.1e}") for factor in FACTORS]
    if len(set(rates)) < 2 or min(rates) <= 0:
        raise UserError(f"--rates {' '.join(map(str, rates))}: must be at least two different rates above 0")

    from train.tune.lr import find_rate
    from train.tune.sweep import plan

    epochs = max(1, round(search.epochs_fraction * recipe.epochs))
    vary = [f"epochs={epochs}", f"optim.lr={','.join(f'{rate:g}' for rate in sorted(set(rates)))}"]
    find_rate(search.runs, plan(arguments, vary, search.runs, read), search.nproc)


if __name__ == "__main__":
    exit_on_user_error(main)
