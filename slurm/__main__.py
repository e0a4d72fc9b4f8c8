"""Runs on a Slurm cluster.

  python -m slurm submit RECIPE --run RUN --data SHARDS
      trains until the run is finished, through time limits, preemption, lost nodes and crashes
  python -m slurm sweep RECIPE ... --runs RUNS --data SHARDS --vary KEY=A,B
      one run for each recipe and combination of values, as a job array
  python -m slurm pipeline CAPTIONS.csv --recipe RECIPE --run RUN --data SHARDS
      data preparation, training, evaluation and publishing; each job starts after the previous one succeeded
  python -m slurm job NAME --folder FOLDER -- COMMAND
      any other command of the project
  python -m slurm status RUN
      state, jobs and log of a run, and what to do next

Examples:
  python -m slurm submit train/recipes/spectrum_icons.yaml --run runs/mine --data shards --nodes 2 --gpus 8
      --time 12:00:00 -- --optim.lr 1e-5
  python -m slurm sweep train/recipes/spectrum_icons.yaml --runs runs/sweep --data shards
      --vary optim.lr=5e-6,1e-5
  python -m slurm pipeline captions.csv --recipe train/recipes/spectrum_icons.yaml --run runs/mine
      --data shards --tasks 32
  python -m slurm job eval --folder runs/mine --gpus 8 -- eval retrieval runs/mine --data shards
      --json runs/mine/test.json

Words after `--` are passed to the training, or are the command of `job`. --dry-run writes and prints the
batch script without submitting it. Account, partition, modules and containers of your cluster are set in
slurm/site.yaml. A virtual cluster to try it on: python -m tests.slurm_lab
"""

from data_prep.cli import run_commands
from data_prep.errors import exit_on_user_error

COMMANDS = {
    "submit": "slurm.submit:submit",
    "sweep": "slurm.submit:sweep",
    "pipeline": "slurm.pipeline:pipeline",
    "job": "slurm.pipeline:job",
    "status": "slurm.status:status",
}


def main() -> None:
    run_commands("python -m slurm", __doc__, COMMANDS, rest="flags")


if __name__ == "__main__":
    exit_on_user_error(main)
