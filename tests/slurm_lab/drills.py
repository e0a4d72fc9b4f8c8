"""What a cluster does to a training, done to it on purpose; each must end with the weights of one that nobody
disturbed.

A drill passes by the state of its job, the number of its restarts, and equal weights and logged numbers: by
its state alone, a run that crashed and came back for another reason would pass."""

import os
import signal
import time
from pathlib import Path

from slurm.queue import jobs_of
from slurm.script import Shape
from slurm.submit import sweep
from tests.slurm_lab import cluster
from tests.slurm_lab.ground import BUILD, Ground, Training, python


def two_nodes(ground: Ground) -> str:
    """1. Two nodes, one torchrun each, the shards copied to each node's own disk: the weights of two
    processes on one machine.
    """
    disk = cluster.STATE / "local"
    run = ground.train("two-nodes", nodes=2, stage=str(disk))
    run.until_samples(16)
    copies = [Path(f"/proc/{run.ranks_on(node)[0]}/root{disk}") for node in run.nodes]  # as the rank sees it
    assert [len(list(copy.glob("*/manifest.json"))) for copy in copies] == [1, 1]
    assert not list(disk.iterdir()), "a node's disk is its own"
    run.finished_equal(restarts=0)
    return "restarts 0"


def time_limit(ground: Ground) -> str:
    """2. The time limit comes, as often as it has to: checkpoint, requeue, resume."""
    run = ground.train("time-limit", nodes=2, time_limit="2:00", warn_s=60, LAB_STEP_S=0.8)
    state = run.end(600)
    stops = run.log.count("the time limit is near: stopping")
    # The last warning may come while the run is finishing: then there is nothing to requeue.
    assert 1 <= run.restarts <= stops <= run.restarts + 1, (
        f"{stops} stops, {run.restarts} restarts\n{run.log[-3000:]}"
    )
    assert state["JobState"] == "COMPLETED", state
    run.assert_equal()
    return f"restarts {run.restarts}"


def signal_at_start_up(ground: Ground) -> str:
    """2. The warning comes while the processes are still starting: it is kept for the first step."""
    run = ground.train("start-up", nodes=2)
    run.until(lambda: "begins, after" in run.log, "its script begins")
    warn(run)
    run.until_restart(1)
    assert 0 < run.checkpoint() < 160, run.checkpoint()
    run.finished_equal(restarts=1)
    return "restarts 1"


def slow_save(ground: Ground) -> str:
    """2. The save after the warning takes 40 s, and nobody cuts it short."""
    run = ground.train("slow-save", nodes=2, LAB_SAVE_S=40, warn_s=120)
    run.until_samples(200)
    warn(run)
    run.until_restart(1)
    saved = run.checkpoint()
    assert saved >= 200, saved
    run.finished_equal(restarts=1)
    assert f"going on after {saved} pairs" in run.log
    return "restarts 1"


def chain(ground: Ground) -> str:
    """2. Where jobs may not requeue themselves: three of them, each going on where the one before was
    stopped.
    """
    run = ground.train("chain", nodes=2, chain=3)
    jobs = [Training(ground, run.run, number, run.ranks) for number, _ in jobs_of(run.run)]
    for job, samples in zip(jobs[:2], (200, 500), strict=True):
        job.until_samples(samples)
        warn(job)
        state = job.end()
        assert (state["JobState"], state["ExitCode"], job.restarts) == ("FAILED", "75:0", 0), state
    run.finished_equal(restarts=0)
    return "3 jobs, restarts 0"


def preempted(ground: Ground) -> str:
    """3. A job of higher priority takes the nodes at once: Slurm kills and requeues."""
    run = ground.train("preempted", nodes=2, partition="low")
    run.until_samples(300)
    usurp()
    run.finished_equal(restarts=1)
    return "restarts 1"


def preempted_with_grace(ground: Ground) -> str:
    """3. The same, but the processes are told before: not one step is lost."""
    run = ground.train("grace", nodes=2, partition="grace")
    run.until_samples(200)
    usurp()
    run.until_restart(1)
    saved = run.checkpoint()
    run.finished_equal(restarts=1)
    assert "requeued: preempted" in run.log
    assert f"going on after {saved} pairs" in run.log
    return f"restarts 1, stopped and saved at {saved}"


def power_off(ground: Ground) -> str:
    """4. The second of two nodes is switched off in mid-step."""
    return _power_off(ground, "power-off", 1)


def power_off_first(ground: Ground) -> str:
    """4. The node of the batch script is switched off: nobody is left to requeue but Slurm."""
    return _power_off(ground, "power-off-first", 0)


def _power_off(ground: Ground, name: str, rank: int) -> str:
    run = ground.train(name, nodes=2)
    run.until_samples(300)
    lost = run.nodes[rank]
    cluster.power_off(lost)
    run.until_restart(1)
    assert lost not in run.nodes
    run.finished_equal(restarts=1)
    cluster.power_on(lost)
    until_all_idle()
    return "restarts 1"


def split_brain(ground: Ground) -> str:
    """4. A node is cut off, and trains on beside its successor, on the same disk: it notices, writes nothing,
    and ends.
    """
    run = ground.train("split-brain", LAB_STEP_S=0.6)
    run.until_samples(200)
    lost = run.nodes[0]
    cluster.cut(lost)
    run.until_restart(1)
    assert run.nodes[0] != lost
    run.until(lambda: (run.run / "attempt").read_text().strip().endswith(".1"), "the second attempt begins")
    before = time.monotonic()
    run.until(lambda: not run.ranks_on(lost), "the first attempt ends by itself", 60)
    fenced_s = time.monotonic() - before
    cluster.heal(lost)
    run.finished_equal(restarts=1)
    until_all_idle()
    return f"restarts 1, the old attempt ended {fenced_s:.0f} s after the new one began"


def hang(ground: Ground) -> str:
    """4. A rank is stopped by SIGSTOP: the others do not wait for ever."""
    run = ground.train("hang", nodes=2, timeout_s=15)
    run.until_samples(200)
    for pid in run.ranks_on(run.nodes[1]):
        os.kill(pid, signal.SIGSTOP)
    run.until_restart(1)
    run.end(600)
    stray = run.log.count(
        "requeued: stopped by a signal"
    )  # slurmctld may repeat the end of the first step to the second
    run.finished_equal(restarts=1 + stray)
    return "restarts 1" + f" and {stray} by a stray signal" * bool(stray)


def cancelled(ground: Ground) -> str:
    """5. scancel: ends with a checkpoint, stays cancelled, and the same submission goes on."""
    run = ground.train("cancelled")
    run.until_samples(200)
    began = time.monotonic()
    cluster.call("scancel", run.job)
    state = run.end(60)
    took_s = time.monotonic() - began
    assert (state["JobState"], run.restarts, run.status["state"]) == ("CANCELLED", 0, "stopped"), (
        state,
        run.status,
    )
    saved = run.checkpoint()
    assert saved >= 200, saved
    time.sleep(8)  # longer than a requeued job waits
    assert run.state["JobState"] == "CANCELLED"
    again = ground.train("cancelled")
    again.finished_equal(restarts=0)
    assert f"going on after {saved} pairs" in again.log
    return f"restarts 0 and 0, ended in {took_s:.0f} s"


def stopped_by_hand(ground: Ground) -> str:
    """5. RUN/stop: ends with a checkpoint, is not requeued, and the same submission goes on."""
    run = ground.train("by-hand")
    run.until_samples(200)
    (run.run / "stop").touch()
    state = run.end(60)
    assert (state["JobState"], state["ExitCode"], run.restarts) == ("FAILED", "75:0", 0), state
    assert run.status["state"] == "stopped"
    ground.train("by-hand").finished_equal(restarts=0)
    return "restarts 0 and 0"


def always_crashes(ground: Ground) -> str:
    """5. A rank that always dies before a checkpoint: two requeues, not more."""
    run = ground.train("poison", LAB_CRASH_STEP=3)
    state = run.end()
    assert (state["JobState"], run.restarts) == ("FAILED", 2), state
    assert "not requeued: 3 attempts in a row left no new checkpoint" in run.log
    return "restarts 2"


def mistake(ground: Ground) -> str:
    """5. What would fail again is not requeued: a shard that was altered, exit code 2."""
    altered = Ground(ground.folder / "altered")
    python("data_prep", "build", ground.icons, "--out", altered.shards, "--processes", "1", *BUILD)
    shard = next((altered.shards / "train").glob("*.tar"))
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    altered.recipe.write_text(ground.recipe.read_text())
    run = altered.train("mistake")
    state = run.end()
    assert (state["JobState"], state["ExitCode"], run.restarts) == ("FAILED", "2:0", 0), state
    assert "altered since it was built" in run.log
    return "restarts 0"


def two_jobs_on_one_node(ground: Ground) -> str:
    """5. Two jobs share a node, and do not meet."""
    runs = [ground.train(f"neighbour-{number}", sbatch=("--nodelist=n1",)) for number in (1, 2)]
    runs[1].until_samples(16)
    assert runs[0].state["JobState"] == "RUNNING", "they were to run at the same time"
    for run in runs:
        run.finished_equal(restarts=0)
    return "restarts 0 and 0"


def sweep_task_requeued(ground: Ground) -> str:
    """5. One task of a sweep is requeued; the others do not notice."""
    number = sweep(
        [str(ground.recipe)],
        ground.folder / "sweep",
        ground.shards,
        [
            "workers=0,1",
            "keep_checkpoints=2,3",
        ],  # keys that change no weight, so that each run has the same end
        Shape(1, 1, "30:00"),
        site=ground.site("sweep", LAB_STEP_S=0.2),
        module="tests.slurm_lab.disturbed",
    )
    folders = sorted(path for path in (ground.folder / "sweep").iterdir() if path.name != "slurm")
    runs = [Training(ground, folder, f"{number}_{task}") for task, folder in enumerate(folders)]
    runs[3].until_samples(100)
    cluster.call("scontrol", "requeue", runs[3].job)
    for task, run in enumerate(runs):
        run.finished_equal(restarts=int(task == 3))
    return "restarts 0, 0, 0 and 1"


def warn(run: Training) -> None:
    """The signal that Slurm sends to the batch shell before the time limit."""
    cluster.call("scancel", "--global_batch_size", "--signal=USR1", run.job)


def usurp() -> None:
    """A job of higher priority that wants every node, for a moment."""
    cluster.call(
        "sbatch",
        "--partition=high",
        f"--nodes={cluster.NODES}",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "sleep 3",
    )


def until_all_idle() -> None:
    deadline = time.monotonic() + 90
    while not cluster.all_idle():
        assert time.monotonic() < deadline, cluster.call("sinfo", "-N", "-l")
        time.sleep(0.5)
