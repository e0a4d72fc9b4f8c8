"""Every end of a run leads where it should: the batch script between two stand-ins, for srun and scontrol.

On a real Slurm it is tested by test_slurm_lab.
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from slurm.script import Shape
from slurm.submit import submit

RECIPE = str(ROOT / "train" / "recipes" / "demo.yaml")


@pytest.fixture
def shards(tmp_path) -> Path:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "manifest.json").write_text("{}")
    return tmp_path / "shards"


SRUN = """#!/bin/bash
status() { echo "{\\"state\\": \\"$1\\"}" >"$RUN/status.json"; }
save() { mkdir -p "$RUN/checkpoints/samples-$1"; }
echo "$@" >>"$RUN/srun"
"""
SCONTROL = """#!/bin/bash
case $* in
*hostnames*) echo n1 ;;
requeue*) echo "$@" >>"$RUN/scontrol" ;;
*) echo "JobState=RUNNING PreemptTime=$PREEMPTED X=" ;;
esac
"""


class Batch:
    """The batch script as Slurm would start it; `srun` is what the training does, in bash."""

    def __init__(self, folder: Path, shards: Path, chain: int = 1, **site: int):
        self.run, self.bin, self.restart = folder / "run", folder / "bin", 0
        (folder / "site.yaml").write_text(yaml.safe_dump(site))
        submit(RECIPE, self.run, shards, Shape(1, 1), chain=chain, dry_run=True, site=folder / "site.yaml")
        self.bin.mkdir()

    def begin(self, srun: str, preempted: str = "None", job: str = "12") -> subprocess.Popen:
        for name, text in {"srun": SRUN + srun, "scontrol": SCONTROL}.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        environment = {
            "RUN": str(self.run),
            "PREEMPTED": preempted,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
        }
        environment |= {
            "SLURM_JOB_ID": job,
            "SLURM_RESTART_COUNT": str(self.restart),
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_NNODES": "1",
        }
        (self.run / "scontrol").unlink(missing_ok=True)
        with open(self.run / "slurm" / f"train-{job}.log", "ab") as log:
            return subprocess.Popen(
                ["bash", self.run / "slurm" / "train.sbatch"], env=environment, stdout=log, stderr=log
            )

    def end(self, *arguments, **options) -> tuple[int, bool]:
        """Exit code, and whether it asked Slurm to requeue it."""
        return self.wait(self.begin(*arguments, **options))

    def wait(self, process: subprocess.Popen) -> tuple[int, bool]:
        code = process.wait(30)
        self.restart += 1
        asked = self.run / "scontrol"
        return code, asked.is_file() and asked.read_text() == "requeue 12\n"

    def until(self, condition) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, (self.run / "slurm" / "train-12.log").read_text()
            time.sleep(0.05)


@pytest.fixture
def batch(tmp_path, shards) -> Batch:
    return Batch(tmp_path, shards)


def test_the_ends_of_a_run(batch):
    assert batch.end("save 000100; status running; exit 1") == (75, True)  # crashed, with a new checkpoint
    assert batch.end("status running; exit 1") == (75, True)  # without one, the first
    assert batch.end("status running; exit 1") == (75, True)  # the second
    assert batch.end("save 000200; exit 1") == (75, True)  # progress: counted anew
    assert batch.end("exit 1") == (75, True)
    assert batch.end("status stopped", preempted="2026-01-01") == (75, True)  # no fault of the run's
    assert batch.end("exit 1") == (75, True)
    assert batch.end("exit 1") == (1, False)  # the third without a checkpoint between
    assert batch.end("save 000300; status finished") == (0, False)
    assert "12.8" in (batch.run / "attempt").read_text()
    started = (batch.run / "srun").read_text().splitlines()
    ports = [int(re.search(r"--master-port=(\d+)", line)[1]) for line in started]
    assert len(set(ports)) == len(ports) == 9
    assert max(ports) < 29500


def test_what_would_fail_again_is_not_requeued(batch):
    assert batch.end('echo "      exitcode  : 2 (pid: 4711)"; exit 1') == (2, False)
    assert batch.end('echo "      exitcode  : 3 (pid: 4711)"; exit 1') == (3, False)
    assert batch.end('echo "      exitcode  : -9 (pid: 2)"; exit 1') == (
        75,
        True,
    )  # and the log before this attempt does not count


def test_a_stop_by_hand_is_not_requeued(batch):
    assert batch.end("save 000100; status stopped") == (75, False)
    assert batch.end("save 000200; exit 1") == (75, True), "it was stopped by hand before this attempt"
    (batch.run / "stop").touch()
    assert batch.end("status running") == (75, False)
    assert len((batch.run / "srun").read_text().splitlines()) == 2, (
        "it was started although a stop was asked for"
    )
    assert batch.end("save 000300; status finished") == (0, False), "the wish was fulfilled, and is forgotten"
    assert batch.end("exit 0") == (0, False), "a finished run says so, and writes nothing"


def test_a_stray_signal_is_not_a_stop_by_hand(batch):
    """slurmctld repeats "terminate step 12.0", which was for the step of the attempt before, where a node was
    slow to answer.
    """
    assert batch.end(
        """save 000100; echo '{"state": "stopped", "asked_by": "signal"}' >"$RUN/status.json"; exit 1"""
    ) == (75, True)
    assert batch.end(
        """save 000200; echo '{"state": "stopped", "asked_by": "file"}' >"$RUN/status.json"; exit 1"""
    ) == (75, False)


def test_the_warning_becomes_a_stop(batch):
    process = batch.begin(
        'touch "$RUN/waits"; until [[ -s $RUN/stop ]]; do sleep 0.1; done; rm "$RUN/stop"; save 000100;'
        " status stopped"
    )
    batch.until((batch.run / "waits").exists)
    process.send_signal(signal.SIGUSR1)
    assert batch.wait(process) == (75, True)
    assert not (batch.run / "stop").exists()


def test_a_run_that_does_not_stop_in_time_is_requeued_all_the_same(tmp_path, shards):
    batch = Batch(tmp_path, shards, warn_s=2)
    process = batch.begin('touch "$RUN/waits"; sleep 8')
    batch.until((batch.run / "waits").exists)
    process.send_signal(signal.SIGUSR1)
    assert batch.wait(process) == (75, True)
    assert batch.end("save 000100; exit 1") == (75, True), "our own stop of before was taken for one by hand"


def test_an_srun_that_waits_for_a_dead_daemon_is_ended(tmp_path, shards):
    batch = Batch(tmp_path, shards, warn_s=2)
    assert batch.end('echo "srun: launch/slurm: _step_signal: Terminating StepId=12.0"; sleep 60') == (
        75,
        True,
    )
    assert (
        "srun does not end after it has ended its step" in (batch.run / "slurm" / "train-12.log").read_text()
    )


def test_a_training_without_a_word_is_begun_again(tmp_path, shards):
    """The daemons of both nodes were killed, then the processes ended when they next wrote to them; srun
    hears of neither.
    """
    batch = Batch(tmp_path, shards, silent_s=6)
    assert batch.end("status running; sleep 60") == (75, True)
    assert (
        "no word in the log or in status.json for 6 s: killing srun"
        in (batch.run / "slurm" / "train-12.log").read_text()
    )
    assert batch.end("for _ in 1 2 3 4 5 6 7 8 9; do sleep 1; status running; done; status finished") == (
        0,
        False,
    )


def test_scancel_stays_cancelled(batch):
    process = batch.begin('touch "$RUN/waits"; sleep 2; exit 1')  # still starting, so it ends like a crash
    batch.until((batch.run / "waits").exists)
    process.send_signal(signal.SIGTERM)
    assert batch.wait(process) == (75, False)


def test_an_attempt_that_was_taken_over_touches_nothing(batch):
    assert batch.end('echo 12.1 >"$RUN/attempt"; exit 1') == (4, False)
    assert not (batch.run / "slurm" / "fruitless").exists()


def test_an_attempt_that_was_taken_over_ends_its_srun_at_once(batch):
    began = time.monotonic()
    assert batch.end('echo $$ >"$RUN/pid"; echo 12.1 >"$RUN/attempt"; sleep 60; touch "$RUN/went-on"') == (
        4,
        False,
    )
    assert time.monotonic() - began < 25
    assert not Path("/proc", (batch.run / "pid").read_text().strip()).exists(), (
        "srun would end the step of the successor"
    )


def test_in_a_chain_the_next_job_goes_on(tmp_path, shards):
    batch = Batch(tmp_path, shards, chain=2)
    process = batch.begin(
        'touch "$RUN/waits"; until [[ -s $RUN/stop ]]; do sleep 0.1; done; save 000100; status stopped'
    )
    batch.until((batch.run / "waits").exists)
    process.send_signal(signal.SIGUSR1)
    assert batch.wait(process) == (75, False)
    assert batch.end("save 000200; status finished", job="13") == (0, False)


def test_a_stop_by_hand_ends_the_whole_chain(tmp_path, shards):
    batch = Batch(tmp_path, shards, chain=3)
    assert batch.end("save 000100; status stopped") == (75, False)
    for number in ("13", "14"):
        assert batch.end("save 000200; status finished", job=number) == (75, False)
    assert len((batch.run / "srun").read_text().splitlines()) == 1


def test_shards_are_staged_once(batch, tmp_path, shards):
    site = tmp_path / "site.yaml"
    submit(RECIPE, batch.run, shards, Shape(1, 1), stage=str(tmp_path / "local"), dry_run=True, site=site)
    runs_it = 'if [[ $* == *manifest* || $* == *"cp -r"* ]]; then exec "$@"; fi; save 000100; status finished'
    for _ in range(2):  # the second finds the first one's copy
        assert batch.end(runs_it) == (0, False)
        [copy] = (tmp_path / "local").iterdir()
        assert (copy / "seen").exists() == (batch.restart == 2)
        (copy / "seen").touch()
    assert (copy / "manifest.json").read_text() == "{}"
    assert f"--data {copy} --run" in (batch.run / "srun").read_text()
