"""The batch script of a training, with bash scripts in place of srun and scontrol: every way in which a
training can end leads to the right exit code, and to a requeue or not.

test_slurm_lab.py tests it on a real Slurm.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from slurm.script import Resources
from slurm.submit import submit
from train.data.shares import Sets
from train.recipe import Recipe
from train.run.folder import Run
from train.world import World

RECIPE = ROOT / "train" / "recipes" / "demo.yaml"
REQUEUED, STOPPED, FINISHED = (
    (75, True),
    (75, False),
    (0, False),
)  # exit code, and whether a requeue was requested
SUPERSEDED = (4, False)

# What a fake training does comes after these lines.
SRUN = """#!/bin/bash
status() { echo "{\\"state\\": \\"$1\\"}" >"$RUN/status.json"; }
stopped_by() { cp "$RUN/stopped-by-$1.json" "$RUN/status.json"; touch "$RUN/status.json"; }
save() { mkdir -p "$RUN/checkpoints/samples-$1"; }
wait_for_stop() { touch "$RUN/waiting"; until [[ -s $RUN/stop ]]; do sleep 0.05; done; rm "$RUN/stop"; }
echo "$@" >>"$RUN/srun"
"""
SCONTROL = """#!/bin/bash
case $* in
*hostnames*) echo n1 ;;
requeue*) echo "$@" >>"$RUN/scontrol" ;;
*) echo "JobState=RUNNING PreemptTime=$PREEMPTED X=" ;;
esac
"""


@pytest.fixture
def shards(tmp_path) -> Path:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "manifest.json").write_text("{}")
    return tmp_path / "shards"


class Batch:
    """The batch script, started as Slurm would."""

    def __init__(self, folder: Path, shards: Path | Sets, chain: int = 1, stage: str = "", **site: int):
        self.run, self.bin, self.restart = folder / "run", folder / "bin", 0
        site_file = folder / "site.yaml"
        site_file.write_text(yaml.safe_dump(site))
        options = {"chain": chain, "stage": stage, "dry_run": True, "site": site_file}
        submit(RECIPE, self.run, shards, Resources(1, 1), **options)
        self.bin.mkdir()

    def start(self, srun: str, preempted: str = "None", job: str = "12") -> subprocess.Popen:
        """Start an attempt.

        Args:
            srun: bash, what the training does.
            preempted: scontrol's PreemptTime of the job.
        """
        for name, text in {"srun": SRUN + srun, "scontrol": SCONTROL}.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        environment = {
            "RUN": str(self.run),
            "PREEMPTED": preempted,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "POLL_S": "0.05",
            "SLURM_JOB_ID": job,
            "SLURM_RESTART_COUNT": str(self.restart),
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_NNODES": "1",
        }
        for name in ("scontrol", "waiting"):
            (self.run / name).unlink(missing_ok=True)
        script = self.run / "slurm" / "train.sbatch"
        with open(self.run / "slurm" / f"train-{job}.log", "ab") as log:
            return subprocess.Popen(["bash", script], env=environment, stdout=log, stderr=log)

    def result(self, *arguments, **options) -> tuple[int, bool]:
        """Run an attempt to its end: exit code, and whether it requested a requeue."""
        return self.wait(self.start(*arguments, **options))

    def wait(self, process: subprocess.Popen) -> tuple[int, bool]:
        code = process.wait(30)
        self.restart += 1
        requests = self.run / "scontrol"
        return code, requests.is_file() and requests.read_text() == "requeue 12\n"

    def signalled(self, srun: str, number: signal.Signals) -> tuple[int, bool]:
        """Run an attempt that gets a signal once its training has created RUN/waiting."""
        process = self.start(srun)
        deadline = time.monotonic() + 20
        while not (self.run / "waiting").exists():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        process.send_signal(number)
        return self.wait(process)

    def log(self) -> str:
        return (self.run / "slurm" / "train-12.log").read_text()

    def starts(self) -> list[str]:
        """The command lines of srun."""
        return (self.run / "srun").read_text().splitlines()


@pytest.fixture
def batch(tmp_path, shards) -> Batch:
    return Batch(tmp_path, shards)


def test_crashes_are_requeued_unless_three_in_a_row_make_no_progress(batch):
    assert batch.result("save 000100; status running; exit 1") == REQUEUED
    assert batch.result("status running; exit 1") == REQUEUED  # the first without a new checkpoint
    assert batch.result("status running; exit 1") == REQUEUED  # the second
    assert batch.result("save 000200; exit 1") == REQUEUED  # progress: the count starts again
    assert batch.result("exit 1") == REQUEUED
    assert batch.result("status stopped", preempted="2026-01-01") == REQUEUED  # a preemption does not count
    assert batch.result("exit 1") == REQUEUED
    assert batch.result("exit 1") == (1, False)  # the third without a new checkpoint
    assert "not requeued: 3 attempts in a row left no new checkpoint" in batch.log()
    assert batch.result("save 000300; status finished") == FINISHED
    assert "12.8" in (batch.run / "attempt").read_text()
    ports = [int(re.search(r"--master-port=(\d+)", line)[1]) for line in batch.starts()]
    assert len(set(ports)) == len(ports) == 9
    assert max(ports) < 29500


def test_errors_that_would_recur_are_not_requeued(batch):
    assert batch.result('echo "      exitcode  : 2 (pid: 4711)"; exit 1') == (2, False)
    assert batch.result('echo "      exitcode  : 3 (pid: 4711)"; exit 1') == (3, False)
    # Only the log of the current attempt counts.
    assert batch.result('echo "      exitcode  : -9 (pid: 2)"; exit 1') == REQUEUED


def test_a_requested_stop_is_not_requeued(batch):
    assert batch.result("save 000100; status stopped") == STOPPED
    assert batch.result("save 000200; exit 1") == REQUEUED, "the stop was that of the previous attempt"
    (batch.run / "stop").touch()
    assert batch.result("status running") == STOPPED
    assert len(batch.starts()) == 2, "the training was started although a stop was requested"
    assert batch.result("save 000300; status finished") == FINISHED, "a stop request is for one attempt"
    assert batch.result("exit 0") == FINISHED, "a finished run exits with 0 and writes nothing"


def status_of_a_stopped_training(folder: Path, requested_by: str) -> str:
    """status.json as training writes it: the batch script must understand it."""
    run = Run(Recipe(model="x:none", data="data", run=str(folder)), World())
    folder.mkdir()
    run.lock.acquire()
    run.end("stopped", 16, requested_by)
    return (folder / "status.json").read_text()


def test_a_stray_signal_is_not_a_requested_stop(batch, tmp_path):
    """slurmctld repeats "terminate step 12.0", meant for the previous attempt, if a node answers slowly."""
    for requested_by in ("signal", "file"):
        status = status_of_a_stopped_training(tmp_path / requested_by, requested_by)
        (batch.run / f"stopped-by-{requested_by}.json").write_text(status)
    assert batch.result("save 000100; stopped_by signal; exit 1") == REQUEUED
    assert batch.result("save 000200; stopped_by file; exit 1") == STOPPED


def test_the_warning_becomes_a_stop_request(batch):
    training = "wait_for_stop; save 000100; status stopped"
    assert batch.signalled(training, signal.SIGUSR1) == REQUEUED
    assert not (batch.run / "stop").exists()


def test_a_run_that_does_not_stop_in_time_is_requeued(tmp_path, shards):
    batch = Batch(tmp_path, shards, warn_s=1)
    assert batch.signalled('touch "$RUN/waiting"; sleep 8', signal.SIGUSR1) == REQUEUED
    assert batch.result("save 000100; exit 1") == REQUEUED, (
        "the script took its own stop request for a user's"
    )


def test_an_srun_that_waits_for_a_dead_daemon_is_killed(tmp_path, shards):
    batch = Batch(tmp_path, shards, warn_s=1)
    training = 'echo "srun: launch/slurm: _step_signal: Terminating StepId=12.0"; sleep 60'
    assert batch.result(training) == REQUEUED
    assert "srun did not exit after it terminated its step: killing srun" in batch.log()


def test_a_training_without_output_is_restarted(tmp_path, shards):
    """As when the daemons of both nodes are killed: the ranks end at their next write, and srun waits."""
    batch = Batch(tmp_path, shards, silent_s=2)
    assert batch.result("status running; sleep 60") == REQUEUED
    assert "no output in the log or in status.json for 2 s: killing srun" in batch.log()
    assert batch.result("for _ in {1..10}; do sleep 0.4; status running; done; status finished") == FINISHED


def test_a_cancelled_job_is_not_requeued(batch):
    # It is still starting, so it ends like a crash.
    assert batch.signalled('touch "$RUN/waiting"; sleep 0.5; exit 1', signal.SIGTERM) == STOPPED


def test_a_superseded_attempt_writes_nothing(batch):
    assert batch.result('echo 12.1 >"$RUN/attempt"; exit 1') == SUPERSEDED
    assert not (batch.run / "slurm" / "attempts_without_progress").exists()


def test_a_superseded_attempt_kills_its_srun_at_once(batch):
    started = time.monotonic()
    training = 'echo $$ >"$RUN/pid"; echo 12.1 >"$RUN/attempt"; sleep 60'
    assert batch.result(training) == SUPERSEDED
    assert time.monotonic() - started < 25
    pid = (batch.run / "pid").read_text().strip()
    assert not Path("/proc", pid).exists(), "srun would end the step of the next attempt"


def test_in_a_chain_the_next_job_resumes(tmp_path, shards):
    batch = Batch(tmp_path, shards, chain=2)
    training = "wait_for_stop; save 000100; status stopped"
    assert batch.signalled(training, signal.SIGUSR1) == STOPPED
    assert batch.result("save 000200; status finished", job="13") == FINISHED


def test_a_requested_stop_ends_the_whole_chain(tmp_path, shards):
    batch = Batch(tmp_path, shards, chain=3)
    assert batch.result("save 000100; status stopped") == STOPPED
    for number in ("13", "14"):
        assert batch.result("save 000200; status finished", job=number) == STOPPED
    assert len(batch.starts()) == 1


def test_shards_are_staged_once(batch, tmp_path, shards):
    stage, site = str(tmp_path / "local"), tmp_path / "site.yaml"
    submit(RECIPE, batch.run, shards, Resources(1, 1), stage=stage, dry_run=True, site=site)
    training = (
        'if [[ $* == *manifest* || $* == *"cp -r"* ]]; then exec "$@"; fi; save 000100; status finished'
    )
    for _ in range(2):  # the second attempt uses the first one's copy
        assert batch.result(training) == FINISHED
        [copy] = (tmp_path / "local").iterdir()
        assert (copy / "used").exists() == (batch.restart == 2)
        (copy / "used").touch()
    assert (copy / "manifest.json").read_text() == "{}"
    assert f"--data {copy} --run" in (batch.run / "srun").read_text()


# Copies as Slurm would; the training is finished at once.
COPIES = """
if [[ $* == *'mv -T'* ]]; then
  while [[ $1 != bash ]]; do shift; done
  exec "$@"
fi
status finished
"""


@pytest.mark.parametrize("staged", [False, True])
def test_several_data_sets_are_copied_to_the_nodes_and_passed_with_their_shares(tmp_path, staged):
    folders = [tmp_path / "icons", tmp_path / "a general=0.5 set"]
    for folder in folders:
        folder.mkdir()
        (folder / "manifest.json").write_text(f'{{"x": "{folder.name}"}}')
    data = {str(folder): share for folder, share in zip(folders, (0.7, 0.3), strict=True)}
    disk = tmp_path / "own disk"
    batch = Batch(tmp_path, data, stage=str(disk) if staged else "")
    assert batch.result(COPIES) == FINISHED, batch.log()
    if staged:
        read = [hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest() for folder in folders]
        folders = [disk / digest[:16] for digest in read]
        assert sorted(disk.iterdir()) == sorted(folders)
        assert [json.loads((folder / "manifest.json").read_text())["x"] for folder in folders] == [
            "icons",
            "a general=0.5 set",
        ]
    words = f" --data {folders[0]}=0.7 {folders[1]}=0.3 --run {batch.run}"
    assert words in batch.starts()[-1], batch.starts()
