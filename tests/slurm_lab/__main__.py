"""A real Slurm cluster on this machine, and drills on it.

  python -m tests.slurm_lab up
      starts three nodes with four cores and two GPUs each (in Slurm's books only); to use them:
      export SLURM_CONF=/tmp/slurm-lab/slurm.conf
  python -m tests.slurm_lab drills
      starts a cluster, runs every drill (an hour or more), prints a line for each, and stops the cluster
  python -m tests.slurm_lab drills --quick
      three short drills, about a minute and a half
  python -m tests.slurm_lab drills hang faults
      the named drills
  python -m tests.slurm_lab status
      nodes and queue
  python -m tests.slurm_lab down
      stops what `up` started, and nothing else

Run it from the root of the repository, as root on Linux, with Debian's packages munge, slurmctld, slurmd,
slurm-client and iproute2. One cluster at a time.
"""

from data_prep.cli import run_commands
from data_prep.errors import exit_on_user_error

COMMANDS = {name: f"tests.slurm_lab.command:{name}" for name in ("up", "down", "status", "drills")}


def main() -> None:
    run_commands("python -m tests.slurm_lab", __doc__, COMMANDS)


if __name__ == "__main__":
    exit_on_user_error(main)
