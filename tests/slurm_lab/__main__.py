"""A real Slurm on this machine, to try things on and to drill on; as root, with Debian's packages (see up).

python -m tests.slurm_lab up           three nodes of four cores and two counted GPUs; then: export SLURM_CONF=/tmp/slurm-lab/slurm.conf
python -m tests.slurm_lab drills       every drill, on a cluster of its own, with a table and a JSON; --quick True the short ones
python -m tests.slurm_lab status       what it does
python -m tests.slurm_lab down         ends what up started, and nothing else
"""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Annotated

import tyro

from data_prep.atomic import atomic_file
from data_prep.errors import UserError, exit_on_user_error
from tests.slurm_lab import cluster
from tests.slurm_lab import drills as training
from tests.slurm_lab import drills_path as path
from tests.slurm_lab.faults import faults
from tests.slurm_lab.ground import Ground

QUICK = (training.mistake, training.preempted_with_grace, path.lost_task)
DRILLS = (
    training.two_nodes,
    training.time_limit,
    training.signal_at_start_up,
    training.slow_save,
    training.chain,
    training.preempted,
    training.preempted_with_grace,
    training.power_off,
    training.power_off_first,
    training.split_brain,
    training.hang,
    training.cancelled,
    training.stopped_by_hand,
    training.always_crashes,
    training.mistake,
    training.two_jobs_on_one_node,
    training.sweep_task_requeued,
    path.lost_task,
    path.whole_path,
    path.kills,
    faults,
)


def up() -> None:
    """Brings the cluster up, as root on Linux, with munge, slurmctld, slurmd, slurm-client and iproute2
    installed.
    """
    cluster.up()
    print(f"{cluster.NODES} nodes are idle; to use them: export SLURM_CONF={cluster.STATE}/slurm.conf")
    print("partitions: main; low and grace, which are preempted by high, at once and after a grace")


def down() -> None:
    """Ends what up started, by process id, and removes its folder."""
    cluster.down()


def status() -> None:
    """Shows nodes and queue."""
    print(cluster.call("sinfo"), cluster.call("squeue"), sep="\n\n")


def drills(
    names: Annotated[list[str], tyro.conf.Positional] = [], quick: bool = False, json: Path | None = None
) -> None:
    """Brings a cluster up, runs the drills, and takes it down; exit code 1 if one failed.

    Args:
        names: Drills to run; none are all.
        quick: Only three short ones: those of the tests.
        json: File to write the results to.
    """
    known = {drill.__name__: drill for drill in DRILLS}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"no drill {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [known[name] for name in names] or (QUICK if quick else DRILLS)
    results, folder = [], Path(tempfile.mkdtemp(prefix="slurm-drills-"))
    with lab():
        print(f"preparing icons, shards and a model in {folder}", flush=True)
        ground = Ground(folder)
        ground.prepare()
        for drill in chosen:
            results.append(run(drill, ground))
            print(line(results[-1]), flush=True)
    failed = [result["drill"] for result in results if not result["passed"]]
    print(
        f"{len(results) - len(failed)} of {len(results)} drills passed in"
        f" {sum(result['seconds'] for result in results):.0f} s"
    )
    if json:
        write(json, results)
    if failed:
        print(f"failed: {', '.join(failed)}; their runs and logs are in {folder}")
        sys.exit(1)
    shutil.rmtree(folder)


def run(drill, ground: Ground) -> dict:
    """What came of a drill; what it printed is shown if it failed, and its jobs are cancelled."""
    said, began = io.StringIO(), time.monotonic()
    try:
        with contextlib.redirect_stdout(said):
            found, passed = drill(ground), True
    except (
        AssertionError,
        UserError,
        OSError,
        LookupError,
        ValueError,
    ):  # whatever went wrong in it, the others are to run
        found, passed = traceback.format_exc(), False
        cluster.call("scancel", "--user=root", check=False)
    return {
        "drill": drill.__name__,
        "passed": passed,
        "seconds": time.monotonic() - began,
        "found": found,
        "what": drill.__doc__,
    }


def line(result: dict) -> str:
    return (
        f"{'pass' if result['passed'] else 'FAIL'}  {result['drill']:22} {result['seconds']:5.0f} s "
        f" {result['found']}"
    )


def write(file: Path, results: list[dict]) -> None:
    with atomic_file(file) as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n")


@contextlib.contextmanager
def lab():
    """The cluster, up inside and down after; its configuration is what Slurm's commands in this process read."""
    cluster.up()
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(cluster.STATE / "slurm.conf")
    try:
        yield
    finally:
        cluster.down()
        os.environ.pop("SLURM_CONF")
        if before:
            os.environ["SLURM_CONF"] = before


def main() -> None:
    if len(sys.argv) == 1:
        print(__doc__.strip())
        return
    tyro.extras.subcommand_cli_from_dict(
        {"up": up, "down": down, "status": status, "drills": drills},
        prog="python -m tests.slurm_lab",
        description=__doc__,
        config=(tyro.conf.FlagConversionOff,),
    )


if __name__ == "__main__":
    exit_on_user_error(main)
