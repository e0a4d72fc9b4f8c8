"""Drills on trainings: what a cluster does to them, done on purpose. Each must end with the weights of the
undisturbed run.

A drill checks the state of the job, the number of restarts, and that weights and logged values are equal: the
state alone would also be right for a run that crashed and came back for another reason.
"""

import os
import signal
import time
from pathlib import Path

from slurm.queue import jobs_of_run
from slurm.script import Resources
from slurm.submit import sweep
from tests.slurm_lab import cluster
from tests.slurm_lab.fixtures import BUILD, TRAIN_MODULE, Fixtures, Training, python


def two_nodes(fixtures: Fixtures) -> str:
    """Two nodes, one torchrun on each, the shards copied to each node's own disk: the weights of two
    processes on one machine.
    """
    disk = cluster.STATE / "local"
    run = fixtures.train("two-nodes", nodes=2, stage=str(disk))
    run.until_samples(16)
    copies = [Path(f"/proc/{run.ranks_on(node)[0]}/root{disk}") for node in run.nodes]  # as the rank sees it
    assert [len(list(copy.glob("*/manifest.json"))) for copy in copies] == [1, 1]
    assert not list(disk.iterdir()), "a node's disk must not be visible from outside"
    run.assert_finishes(restarts=0)
    return "restarts 0"


def time_limit(fixtures: Fixtures) -> str:
    """The time limit is reached, several times if necessary: checkpoint, requeue, resume."""
    run = fixtures.train("time-limit", nodes=2, time_limit="4:00", warn_s=60, LAB_STEP_S=2)
    info = run.until_ended(1500)
    stops = run.log.count("the time limit is near: requesting a stop")
    # The last warning may come while the run is finishing: then nothing is requeued.
    assert 1 <= run.restarts <= stops <= run.restarts + 1, (
        f"{stops} stops, {run.restarts} restarts\n{run.log[-3000:]}"
    )
    assert info["JobState"] == "COMPLETED", info
    run.assert_equal()
    return f"restarts {run.restarts}"


def signal_at_start_up(fixtures: Fixtures) -> str:
    """The warning comes while the processes are still starting: it takes effect after the first step."""
    run = fixtures.train("start-up", nodes=2)
    run.until(lambda: "starts after" in run.log, "the batch script starts")
    warn(run)
    run.until_restart(1)
    assert 0 < run.checkpoint() < 160, run.checkpoint()
    run.assert_finishes(restarts=1)
    return "restarts 1"


def slow_save(fixtures: Fixtures) -> str:
    """The save after the warning takes 40 s, and is not cut short."""
    save_s = 40
    run = fixtures.train("slow-save", nodes=2, LAB_SAVE_S=save_s, warn_s=120)
    run.until_samples(200)
    warned = time.monotonic()
    warn(run)
    run.until_restart(1)
    assert time.monotonic() - warned > save_s, "the save was not slowed: nothing was tested"
    saved = run.checkpoint()
    assert saved >= 200, saved
    run.assert_finishes(restarts=1)
    assert_resumed(run, saved)
    return "restarts 1"


def chain(fixtures: Fixtures) -> str:
    """Where jobs may not requeue themselves: three jobs, each resuming where the previous one was stopped."""
    run = fixtures.train("chain", nodes=2, chain=3)
    jobs = [Training(fixtures, run.run, number, run.ranks) for number, _ in jobs_of_run(run.run)]
    for job, samples in zip(jobs[:2], (200, 500), strict=True):
        job.until_samples(samples)
        warn(job)
        info = job.until_ended()
        assert (info["JobState"], info["ExitCode"], job.restarts) == ("FAILED", "75:0", 0), info
    run.assert_finishes(restarts=0)
    return "3 jobs, restarts 0"


def preempted(fixtures: Fixtures) -> str:
    """A job of higher priority takes the nodes at once: Slurm kills and requeues."""
    run = fixtures.train("preempted", nodes=2, partition="low")
    run.until_samples(300)
    submit_preempting_job()
    run.assert_finishes(restarts=1)
    return "restarts 1"


def preempted_with_grace(fixtures: Fixtures) -> str:
    """A job of higher priority takes the nodes after a grace time: no step is lost."""
    run = fixtures.train("grace", nodes=2, partition="grace")
    run.until_samples(200)
    submit_preempting_job()
    run.until_restart(1)
    saved = run.checkpoint()
    run.assert_finishes(restarts=1)
    assert "requeued: preempted" in run.log
    assert_resumed(run, saved)
    return f"restarts 1, stopped and saved at {saved}"


def power_off(fixtures: Fixtures) -> str:
    """The second of two nodes is switched off during a step."""
    return _power_off(fixtures, "power-off", 1)


def power_off_first(fixtures: Fixtures) -> str:
    """The node of the batch script is switched off: only Slurm is left to requeue."""
    return _power_off(fixtures, "power-off-first", 0)


def _power_off(fixtures: Fixtures, name: str, rank: int) -> str:
    run = fixtures.train(name, nodes=2)
    run.until_samples(300)
    lost = run.nodes[rank]
    cluster.power_off(lost)
    run.until_restart(1)
    assert lost not in run.nodes
    run.assert_finishes(restarts=1)
    cluster.power_on(lost)
    until_all_idle()
    return "restarts 1"


def split_brain(fixtures: Fixtures) -> str:
    """A node is cut off from the network and trains on beside its successor, on the same disk: it notices,
    writes nothing, and exits.
    """
    run = fixtures.train("split-brain", LAB_STEP_S=0.6)
    run.until_samples(200)
    lost = run.nodes[0]
    cluster.disconnect(lost)
    run.until_restart(1)
    assert run.nodes[0] != lost
    run.until(lambda: (run.run / "attempt").read_text().strip().endswith(".1"), "the second attempt starts")
    started = time.monotonic()
    run.until(
        lambda: not run.ranks_on(lost) + run.ranks_on(lost, workers=True), "the first attempt exits", 60
    )
    fenced_s = time.monotonic() - started
    cluster.reconnect(lost)
    run.assert_finishes(restarts=1)
    until_all_idle()
    return f"restarts 1, the old attempt exited {fenced_s:.0f} s after the new one started"


def hang(fixtures: Fixtures) -> str:
    """A rank is stopped by SIGSTOP: the others do not wait without limit."""
    run = fixtures.train("hang", nodes=2, timeout_s=15)
    run.until_samples(200)
    for pid in run.ranks_on(run.nodes[1]):
        os.kill(pid, signal.SIGSTOP)
    run.until_restart(1)
    run.until_ended(900)
    # slurmctld may repeat the termination of the first attempt's step to a later one, whose step has the same
    # number. That attempt stops after its current step, or fails if it is still starting; both are requeued.
    later_attempts = run.log.split(": starts after")[2:]
    stray = sum("Received 15 death signal" in log and "requeued: " in log for log in later_attempts)
    run.assert_finishes(restarts=1 + stray)
    return "restarts 1" + f" and {stray} by a stray signal" * bool(stray)


def cancelled(fixtures: Fixtures) -> str:
    """scancel: the job ends with a checkpoint and stays cancelled; the same submission resumes."""
    run = fixtures.train("cancelled")
    run.until_samples(200)
    started = time.monotonic()
    cluster.call("scancel", run.job)
    info = run.until_ended(120)
    took_s = time.monotonic() - started
    assert (info["JobState"], run.restarts, run.status["state"]) == ("CANCELLED", 0, "stopped"), (
        info,
        run.status,
    )
    saved = run.checkpoint()
    assert saved >= 200, saved
    time.sleep(8)  # longer than a requeued job waits in the queue
    assert run.state == "CANCELLED"
    again = fixtures.train("cancelled")
    again.assert_finishes(restarts=0)
    assert_resumed(again, saved)
    return f"restarts 0 and 0, ended after {took_s:.0f} s"


def stopped_by_hand(fixtures: Fixtures) -> str:
    """RUN/stop: the job ends with a checkpoint and is not requeued; the same submission resumes."""
    run = fixtures.train("by-hand")
    run.until_samples(200)
    (run.run / "stop").touch()
    info = run.until_ended(120)
    assert (info["JobState"], info["ExitCode"], run.restarts) == ("FAILED", "75:0", 0), info
    assert run.status["state"] == "stopped"
    fixtures.train("by-hand").assert_finishes(restarts=0)
    return "restarts 0 and 0"


def always_crashes(fixtures: Fixtures) -> str:
    """A rank that always crashes before a checkpoint: two requeues, not more."""
    run = fixtures.train("crashes", LAB_CRASH_STEP=3)
    info = run.until_ended()
    assert (info["JobState"], run.restarts) == ("FAILED", 2), info
    assert "not requeued: 3 attempts in a row left no new checkpoint" in run.log
    return "restarts 2"


def mistake(fixtures: Fixtures) -> str:
    """An error that would recur is not requeued: an altered shard, exit code 2."""
    altered = Fixtures(fixtures.folder / "altered")
    python("data_prep", "build", fixtures.icons, "--out", altered.shards, "--processes", "1", *BUILD)
    for shard in (altered.shards / "train").glob("*.tar"):
        shard.write_bytes(bytes(byte ^ 1 for byte in shard.read_bytes()))
    altered.recipe.write_text(fixtures.recipe.read_text())
    run = altered.train("mistake")
    info = run.until_ended()
    assert (info["JobState"], info["ExitCode"], run.restarts) == ("FAILED", "2:0", 0), info
    assert "altered since it was built" in run.log
    return "restarts 0"


def two_jobs_on_one_node(fixtures: Fixtures) -> str:
    """Two jobs share a node and do not interfere."""
    runs = [fixtures.train(f"neighbour-{number}", sbatch=("--nodelist=n1",)) for number in (1, 2)]
    runs[1].until_samples(16)
    assert runs[0].state == "RUNNING", "both jobs must run at the same time"
    for run in runs:
        run.assert_finishes(restarts=0)
    return "restarts 0 and 0"


def sweep_task_requeued(fixtures: Fixtures) -> str:
    """One task of a sweep is requeued; the others are not affected."""
    number = sweep(
        (str(fixtures.recipe),),
        fixtures.folder / "sweep",
        fixtures.shards,
        ("workers=1,2", "keep_checkpoints=2,3"),  # these keys change no weights: every run ends the same
        Resources(1, 1, "30:00"),
        site=fixtures.site("sweep", LAB_STEP_S=0.2),
        module=TRAIN_MODULE,
    )
    folders = sorted(path for path in (fixtures.folder / "sweep").iterdir() if path.name != "slurm")
    runs = [Training(fixtures, folder, f"{number}_{task}") for task, folder in enumerate(folders)]
    runs[3].until_samples(100)
    cluster.call("scontrol", "requeue", runs[3].job)
    for task, run in enumerate(runs):
        run.assert_finishes(restarts=int(task == 3))
    return "restarts 0, 0, 0 and 1"


def warn(run: Training) -> None:
    """Send the signal that Slurm sends to the batch shell before the time limit."""
    cluster.call("scancel", "--batch", "--signal=USR1", run.job)


def submit_preempting_job() -> None:
    """Submit a job of higher priority that takes every node for three seconds."""
    cluster.call(
        "sbatch",
        "--partition=high",
        f"--nodes={cluster.NODES}",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "sleep 3",
    )


def assert_resumed(run: Training, samples: int) -> None:
    """The log must say that the training resumed after so many samples."""
    assert f"resuming after {samples} pairs" in run.log, run.log[-3000:]


def until_all_idle() -> None:
    """Wait until every node is idle."""
    deadline = time.monotonic() + 180
    while not cluster.all_idle():
        assert time.monotonic() < deadline, cluster.call("sinfo", "-N", "-l")
        time.sleep(0.5)
