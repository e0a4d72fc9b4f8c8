"""The commands of `python -m tests.slurm_lab`."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import tyro

from data_prep.atomic import atomic_file
from data_prep.cli import OptionalFile
from data_prep.errors import UserError
from tests.slurm_lab import cluster, drills_path, drills_signals, drills_training
from tests.slurm_lab.faults import faults
from tests.slurm_lab.fixtures import Fixtures

Drill = Callable[[Fixtures], str]

QUICK: tuple[Drill, ...] = (
    drills_training.mistake,
    drills_training.preempted_with_grace,
    drills_path.lost_task,
)
DRILLS: tuple[Drill, ...] = (
    drills_training.two_nodes,
    drills_path.store,
    drills_training.time_limit,
    drills_training.signal_at_start_up,
    drills_training.slow_save,
    drills_training.chain,
    drills_training.preempted,
    drills_training.preempted_with_grace,
    drills_training.power_off,
    drills_training.power_off_first,
    drills_training.split_brain,
    drills_training.hang,
    drills_training.cancelled,
    drills_signals.signals_to_a_job,
    drills_signals.signals_through_srun,
    drills_training.stopped_by_hand,
    drills_training.always_crashes,
    drills_training.mistake,
    drills_training.two_jobs_on_one_node,
    drills_training.sweep_task_requeued,
    drills_path.lost_task,
    drills_path.whole_path,
    drills_path.kills,
    faults,
    drills_signals.signals,
)


def up() -> None:
    """Start the cluster."""
    cluster.up()
    print(f"{cluster.NODES} nodes are idle; to use them: export SLURM_CONF={cluster.STATE}/slurm.conf")
    print("partitions: main; low and grace, both preempted by high: at once, or after a grace time")


def down() -> None:
    """Stop what `up` started, by process id, and remove its folder."""
    cluster.down()


def status() -> None:
    """Show nodes and queue."""
    print(cluster.call("sinfo"), cluster.call("squeue"), sep="\n\n")


def drills(
    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[DRILL ...]")] = (),
    quick: bool = False,
    out: OptionalFile = None,
) -> None:
    """Start a cluster, run the drills and stop the cluster; exit code 1 if a drill failed.

    Args:
        names: Drills to run; all by default.
        quick: Run only three short ones.
        out: JSON file of the results, written after each drill.
    """
    known = {drill.__name__: drill for drill in DRILLS}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{', '.join(unknown)}: no such drill; there are {', '.join(known)}")
    chosen = [known[name] for name in names] or (QUICK if quick else DRILLS)
    results, folder = [], Path(tempfile.mkdtemp(prefix="slurm-drills-"))
    with running_cluster():
        print(f"preparing icons, shards and a model in {folder}", flush=True)
        fixtures = Fixtures(folder)
        fixtures.prepare()
        for drill in chosen:
            results.append(run_drill(drill, fixtures))
            print(summary(results[-1]), flush=True)
            if out:
                with atomic_file(out) as partial:
                    partial.write_text(json.dumps(results, indent=1) + "\n")
    failed = [result["drill"] for result in results if not result["passed"]]
    seconds = sum(result["seconds"] for result in results)
    print(f"{len(results) - len(failed)} of {len(results)} drills passed in {seconds:.0f} s")
    if failed:
        print(f"failed: {', '.join(failed)}; their runs and logs are in {folder}")
        sys.exit(1)
    shutil.rmtree(folder)


def run_drill(drill: Drill, fixtures: Fixtures) -> dict:
    """The result of a drill. If it failed, that is its traceback, and its jobs are cancelled."""
    started = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result, passed = drill(fixtures), True
    # Anything that goes wrong in one drill must not keep the others from running.
    except (AssertionError, UserError, OSError, LookupError, ValueError, subprocess.SubprocessError):
        result, passed = traceback.format_exc(), False
        cluster.call("scancel", "--user=root", check=False)
    return {
        "drill": drill.__name__,
        "passed": passed,
        "seconds": time.monotonic() - started,
        "result": result,
        "what": drill.__doc__,
    }


def summary(result: dict) -> str:
    """One line on a result of `run_drill`."""
    verdict = "pass" if result["passed"] else "FAIL"
    return f"{verdict}  {result['drill']:22} {result['seconds']:5.0f} s  {result['result']}"


@contextlib.contextmanager
def running_cluster() -> Iterator[None]:
    """A cluster that runs inside of the context, and that Slurm's commands of this process use."""
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
