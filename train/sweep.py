"""Train a grid of recipe values, one run after another, and compare the runs in one table.

  python -m train.sweep train/recipes/icons.yaml --data SHARDS --runs runs/sweep \\
      --vary optim.lr=1e-5,3e-5 --vary global_batch_size=128,256
      one run per combination (four here), in RUNS/NAME
  ... --nproc 2
      each run on two GPUs
  python -m train.sweep --table runs/sweep
      only the table, of any folder of runs: of `python -m slurm sweep`, of runs in progress, of runs started
      by hand

The same command again resumes: finished runs are skipped, unfinished ones resumed; a failed run is listed and
the next one starts. To stop: touch RUNS/stop, or Ctrl-C. The table is printed and written to RUNS/sweep.md
and RUNS/sweep.json.

Any key of the recipe is a flag too and applies to all runs: python -m train --help
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from data_prep.cli import Runs, print_guide
from data_prep.errors import UserError, exit_on_user_error
from train.recipe import Recipe, parse_with

PROG = "python -m train.sweep RECIPE"


@dataclass(frozen=True)
class Sweep:
    """Options of the sweep."""

    runs: Runs
    """Folder for the runs and their table."""
    vary: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A recipe key and its values, optim.lr=1e-5,3e-5. Repeat it for a grid."""
    nproc: int = 1
    """Processes per run, one per GPU (torchrun's --nproc_per_node)."""


def read(arguments: list[str]) -> tuple[Sweep, Recipe]:
    return parse_with(Sweep, arguments, PROG, __doc__)


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments:
        print_guide(f"{PROG} --data SHARDS --runs RUNS --vary KEY=VALUES [OPTIONS]", __doc__)
        return
    if arguments[0] == "--table":
        if len(arguments) != 2:
            raise UserError(
                f"--table {' '.join(arguments[1:])}: must be one folder of runs and no other option:"
                " python -m train.sweep --table RUNS"
            )
        from train.tune.sweep import print_table

        print_table(Path(arguments[1]))
        return
    sweep, _ = read([*arguments, "--run", "unused"])

    from train.tune.sweep import plan, train_grid

    train_grid(sweep.runs, plan(arguments, list(sweep.vary), sweep.runs, read), sweep.nproc)


if __name__ == "__main__":
    exit_on_user_error(main)
