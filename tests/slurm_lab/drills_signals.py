"""Drills on stop signals: however SIGTERM or SIGINT arrives, the run saves one checkpoint, says so once, and
ends.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.slurm_lab import cluster
from tests.slurm_lab.drills_training import assert_resumed, submit_preempting_job
from tests.slurm_lab.fixtures import ROOT, THREADS, TRAIN_MODULE, Fixtures

TERM, INT = signal.SIGTERM, signal.SIGINT
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node")
START_S, STOP_S = 300, 120  # patience, for a busy machine


class Way(NamedTuple):
    """How a signal reaches a training without Slurm.

    Attributes:
        ranks: 0 is `python -m train` alone, otherwise torchrun with so many.
        whom: "process", "group", or "timeout": timeout(1) in front, whose time is over.
    """

    ranks: int
    whom: str
    number: signal.Signals

    def __str__(self) -> str:
        launcher = f"torchrun, {self.ranks} rank{'s' * (self.ranks > 1)}" if self.ranks else "one process"
        to = "by timeout(1)" if self.whom == "timeout" else f"to the {self.whom}"
        return f"{launcher}: {self.number.name} {to}"


WAYS = tuple(
    Way(ranks, whom, number)
    for ranks in (0, 1, 2)
    for whom in ("process", "group", "timeout")
    for number in (TERM, INT)
)


class Launched:
    """A training that was started in a process group of its own, as a shell does it."""

    def __init__(self, fixtures: Fixtures, name: str, launcher: list[str]):
        """`launcher` is the command line up to the module."""
        self.run = fixtures.folder / name
        self.log = fixtures.folder / f"{name}.log"
        environment = {**os.environ, **THREADS, "LAB_STEP_S": "0.1"}
        with open(self.log, "wb") as file:
            self.process = subprocess.Popen(
                [*launcher, TRAIN_MODULE, *arguments(fixtures, self.run)],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)

    def pids(self) -> list[int]:
        """Processes that have the run's folder in their command line: launchers, ranks and workers."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has ended
                if str(self.run).encode() in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def until_trained(self) -> None:
        """Wait for the second step."""
        metrics, deadline = self.run / "metrics.jsonl", time.monotonic() + START_S
        while not metrics.is_file() or metrics.read_text().count("train/loss") < 2:
            assert self.process.poll() is None, self.text[-3000:]
            assert time.monotonic() < deadline, f"{metrics}: no step\n{self.text[-3000:]}"
            time.sleep(0.02)

    def until_stopped(self, exit_code: int, traceback: bool = False) -> str:
        """Wait for the end; it must leave one checkpoint, at the last step, one sentence, and no process.

        Args:
            exit_code: that of the launcher.
            traceback: whether the launcher prints one of its own.

        Returns:
            What was found, for a table.
        """
        sent = time.monotonic()
        code = self.process.wait(STOP_S)
        seconds = time.monotonic() - sent
        deadline = time.monotonic() + 20
        while left := self.pids():
            assert time.monotonic() < deadline, f"{left} are left\n{self.text[-3000:]}"
            time.sleep(0.1)
        log, status = self.text, json.loads((self.run / "status.json").read_text())
        assert (status["state"], status.get("requested_by")) == ("stopped", "signal"), (
            f"{status}\n{log[-3000:]}"
        )
        newest = max((self.run / "checkpoints").glob("samples-*")).name
        assert newest == status["checkpoint"] == f"samples-{status['samples']:012d}", f"{newest}, {status}"
        assert log.count(f"stopped after {status['samples']} pairs") == 1, log[-3000:]
        unwanted = "was killed|was ended by|DataLoader worker|^error" + "|^Traceback" * (not traceback)
        assert not re.search(unwanted, log, re.MULTILINE), log[-3000:]
        assert code == exit_code, f"exit code {code}, {exit_code} expected\n{log[-3000:]}"
        return f"exit code {code}, saved at {status['samples']}, {seconds:.1f} s"


def signals(fixtures: Fixtures) -> str:
    """SIGTERM and SIGINT without Slurm: to the process, to its group, by timeout(1); with and without
    torchrun.
    """
    return _table({str(way): lambda way=way: stop_by(fixtures, way) for way in WAYS})


def _table(ways: dict[str, Callable[[], str]]) -> str:
    """Try every way; what each left, one line each.

    Raises:
        AssertionError: some failed; all are in its text.
    """
    rows, failed = [], []
    for name, stop in ways.items():
        try:
            rows.append(f"{name}: {stop()}")
        except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
            failed.append(f"{name}: FAILED: {error}")
    assert not failed, "\n".join([*rows, *failed])
    return "\n      ".join([f"{len(rows)} ways", *rows])


def stop_by(fixtures: Fixtures, way: Way) -> str:
    """Train, send the signal after the second step, and check what is left."""
    front = ["timeout", f"--signal={way.number.name}", "1h"] if way.whom == "timeout" else []
    torchrun = [*TORCHRUN, str(way.ranks), "-m", "--"] if way.ranks else []
    name = f"signals-{way.ranks}-{way.whom}-{way.number.name}"
    with Launched(fixtures, name, [*front, sys.executable, "-m", *torchrun]) as training:
        training.until_trained()
        if way.whom == "timeout":
            training.process.send_signal(signal.SIGALRM)  # what its timer sends
        else:
            (os.kill if way.whom == "process" else os.killpg)(training.process.pid, way.number)
        # timeout(1) exits with 124 and torchrun with 1, whatever the training does
        code = 124 if way.whom == "timeout" else int(way.ranks > 0)
        return training.until_stopped(code, traceback=way.ranks > 0)


def signals_through_srun(fixtures: Fixtures) -> str:
    """SIGTERM and SIGINT to a training by a plain srun, without a batch script: by scancel, the time limit, a
    preemption. (After two Ctrl-C srun kills it.)
    """

    def by_scancel(job: str, _: Launched) -> None:
        cluster.call("scancel", job)

    def by_signal(number: signal.Signals) -> Callable:
        return lambda job, _: cluster.call("scancel", f"--signal={number.name}", job)

    def by_time_limit(job: str, _: Launched) -> None:
        cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=1")

    def by_preemption(job: str, _: Launched) -> None:
        submit_preempting_job()

    ways = {
        "scancel --signal=SIGTERM": (by_signal(TERM), "main"),
        "scancel --signal=SIGINT": (by_signal(INT), "main"),
        "scancel": (by_scancel, "main"),
        "the time limit": (by_time_limit, "main"),
        "preemption with a grace time": (by_preemption, "grace"),
    }
    return _table(
        {
            f"srun: {name}": lambda number=number, way=way: _stop_srun(fixtures, number, *way)
            for number, (name, way) in enumerate(ways.items())
        }
    )


def _stop_srun(fixtures: Fixtures, number: int, stop: Callable, partition: str) -> str:
    name = f"srun-{number}"
    words = ["srun", "--nodes=1", "--ntasks=1", "--cpus-per-task=2", "--time=60", f"--job-name={name}"]
    with Launched(fixtures, name, [*words, f"--partition={partition}", sys.executable, "-m"]) as training:
        training.until_trained()
        job = cluster.call("squeue", "--noheader", f"--name={name}", "--format=%i")
        stop(job, training)
        return training.until_stopped(0)


def signals_to_a_job(fixtures: Fixtures) -> str:
    """SIGTERM, then SIGINT to the steps of a submitted job on two nodes: a checkpoint, requeue, resume, for
    each.
    """
    run, saved = fixtures.train("signals-to-a-job", nodes=2), []
    for number in (TERM, INT):
        run.until_samples((saved[-1] if saved else 0) + 200)
        cluster.call("scancel", f"--signal={number.name}", run.job)
        run.until_restart(len(saved) + 1)
        saved.append(run.checkpoint())
        assert run.log.count(f"stopped after {saved[-1]} pairs") == 1, run.log[-3000:]
    run.assert_finishes(restarts=2)
    for samples in saved:
        assert_resumed(run, samples)
    assert not re.search("was killed|was ended by", run.log), run.log[-3000:]
    return f"restarts 2, stopped and saved at {saved[0]} and {saved[1]}"


def arguments(fixtures: Fixtures, run: Path) -> list[str]:
    """A training that is far from its end, with two workers; only a stop saves it within an epoch."""
    flags = {"--data": fixtures.shards, "--run": run, "--epochs": 100, "--workers": 2}
    flags |= {"--save_every_minutes": 60}
    return [str(fixtures.recipe), *(str(word) for flag in flags.items() for word in flag)]
