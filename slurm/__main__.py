"""Runs on a cluster with Slurm.

  python -m slurm submit train/recipes/spectrum_icons.yaml --run runs/mine --data shards --nodes 2 --gpus 8
      --time 12:00:00 trains, through time limits, preemption, lost nodes and crashes, until it is finished;
      -- before flags of the training
  python -m slurm sweep train/recipes/spectrum_icons.yaml --runs runs/sweep --data shards --vary
      optim.lr=5e-6,1e-5 the same for each recipe and value, as one array; what they reached: python -m
      train.sweep --table runs/sweep
  python -m slurm pipeline captions.csv --recipe train/recipes/spectrum_icons.yaml --run runs/mine --data
      shards --tasks 32 preparation, merge, training, evaluation and publishing, each waiting for the one
      before
  python -m slurm job eval --folder runs/mine --gpus 8 -- eval retrieval runs/mine --data shards --json
      out.json any other command
  python -m slurm status runs/mine
      where a run stands, and what to do

Account, partition, modules and containers stand in slurm/site.yaml. With --dry-run True the script is written
and printed, and not submitted. Each command has --help. A cluster to try it on: python -m tests.slurm_lab"""

import functools
import sys

import tyro

from data_prep.errors import exit_on_user_error
from slurm.pipeline import job, pipeline
from slurm.status import status
from slurm.submit import submit, sweep


def main() -> None:
    words = sys.argv[1:]
    if not words:
        print(__doc__.strip())
        return
    at = words.index("--") if "--" in words else len(words)
    takes_flags = {"submit": submit, "sweep": sweep, "pipeline": pipeline, "job": job}
    commands = {
        name: functools.partial(command, flags=tuple(words[at + 1 :]))
        for name, command in takes_flags.items()
    }
    tyro.extras.subcommand_cli_from_dict(
        {**commands, "status": status},
        args=words[:at],
        prog="python -m slurm",
        description=__doc__,
        config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes),
    )


if __name__ == "__main__":
    exit_on_user_error(main)
