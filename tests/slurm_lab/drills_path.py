"""The whole path under a cluster's hands: a preparation that loses a task, the chain to the results, and many
kills.
"""

import contextlib
import itertools
import json
import math
import os
import random
import signal
import time
from collections import Counter

from slurm.pipeline import job, pipeline
from slurm.queue import ENDED, look_up
from slurm.script import Shape
from tests.slurm_lab import cluster
from tests.slurm_lab.ground import BUILD, Ground, Training, digests, python

TASKS, KILLS = 6, 30


def lost_task(ground: Ground) -> str:
    """6. One of six preparing tasks is killed: the merge refuses, the rerun does only what is missing, the
    bytes are the same.
    """
    folder, data, site = (
        ground.folder / "lost-task",
        ground.folder / "lost-task-shards",
        ground.site("lost-task"),
    )
    build = ("data_prep", "build", str(ground.icons), "--out", str(data), "--processes", "1", *BUILD)

    def prepare() -> list[Training]:
        number = job(
            "prepare",
            folder,
            Shape(gpus=0, time="10:00"),
            f"0-{TASKS - 1}",
            resumes=True,
            site=site,
            flags=build,
        )
        return [Training(ground, folder, f"{number}_{task}") for task in range(TASKS)]

    def merge(after: str) -> Training:
        words = ("data_prep", "merge", str(data), "--processes", "1")
        return Training(
            ground,
            folder,
            job("merge", folder, Shape(gpus=0, time="10:00"), after=[after], site=site, flags=words),
        )

    tasks = prepare()
    merging = merge(tasks[0].job.split("_")[0])
    tasks[3].until(lambda: _kill(tasks[3], "data_prep build"), "a process of the fourth task")
    ends = [task.end()["JobState"] for task in tasks]
    assert ends == ["FAILED" if number == 3 else "COMPLETED" for number in range(TASKS)], ends
    assert merging.end()["JobState"] == "CANCELLED", "the merge is not to wait for what will never be"
    assert "1 of 6 tasks have not finished: 3" in python("data_prep", "merge", data, expect=2)
    partial = data.with_name(f"{data.name}.partial")
    before = digests(partial, "part-*.sqlite")
    before.pop("part-00003-of-00006.sqlite", None)
    tasks = prepare()
    assert [(task.end()["JobState"], task.restarts) for task in tasks] == [("COMPLETED", 0)] * TASKS
    assert before.items() <= digests(partial, "part-*.sqlite").items(), "what was prepared was prepared again"
    assert merge(tasks[0].job.split("_")[0]).end()["JobState"] == "COMPLETED", merging.log
    tars = digests(data, "**/*.tar")
    assert tars == digests(ground.shards, "**/*.tar")
    return f"{len(before)} of {TASKS} parts kept, {len(tars)} tars equal those of one process"


def whole_path(ground: Ground) -> str:
    """7. Preparation, merge, training and evaluation as one submission end in a table of results."""
    run = ground.folder / "path"
    numbers = pipeline(
        [str(ground.icons)],
        str(ground.recipe),
        run,
        ground.folder / "path-shards",
        build=" ".join(BUILD),
        tasks=TASKS,
        shape=Shape(2, 1, "30:00"),
        site=ground.site("path"),
    )
    jobs = [Training(ground, run, number, ranks=2) for number in numbers]
    last = jobs[-1].end(600)
    states = [look_up(number) for number in numbers]
    assert [state["JobState"] for state in states] == ["COMPLETED"] * 4, (last, states)
    assert all(state["Restarts"] == "0" for state in states)
    for earlier, later in itertools.pairwise(states):
        assert earlier["EndTime"] <= later["StartTime"], (earlier, later)
    jobs[2].assert_equal()
    assert "R@1" in next((run / "slurm").glob("eval-*.log")).read_text()
    recall = json.loads((run / "test.json").read_text())["metrics"]["image_to_text/R@1"]
    return f"4 jobs, restarts 0, image to text R@1 {100 * recall:.1f} % in {run.name}/test.json"


def kills(ground: Ground) -> str:
    """8. Thirty times -9 on a random process of the job, or a node switched off, in one training."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance, hit, ended = random.Random(seed), Counter(), []

    def submitted() -> Training:
        return ground.train("kills", nodes=2, epochs=200, LAB_STEP_S=0.1, timeout_s=30)

    def alive(run: Training, attempts: float, samples: int) -> Training:
        """The training, when it runs and has had more attempts or saved more; submitted again if its batch
        script was killed.
        """
        while (
            not (_attempts(run) > attempts or run.checkpoint() > samples)
            or run.state["JobState"] != "RUNNING"
        ):
            if run.state["JobState"] in ENDED and (state := run.end()["JobState"]) in ENDED:
                assert state != "COMPLETED", f"finished after {sum(hit.values())} kills"
                ended.append(run.restarts)
                run = submitted()
            time.sleep(0.2)
        return run

    run, attempts, saved = submitted(), 0, 0
    while sum(hit.values()) < KILLS:
        # each kill meets an attempt that lives: a new one, or one that has gone on for four epochs, so that
        # the last kill was none
        run = alive(run, attempts, saved + 4 * 160)
        if (
            chance.random() < 0.75 or run.checkpoint() == saved
        ):  # the others while it starts, but not twice without a checkpoint between
            run = alive(run, math.inf, saved)
        attempts, saved = _attempts(run), run.checkpoint()
        time.sleep(chance.uniform(0, 3))
        if killed := _kill_something(run, chance):
            hit[killed] += 1
    while run.end(600)["JobState"] != "COMPLETED":
        ended.append(run.restarts)
        run = submitted()
    restarts, times = run.restarts + sum(ended), 1 + len(ended)
    assert _attempts(run) == restarts + times, (_attempts(run), restarts, times)
    run.assert_equal()
    what = ", ".join(f"{count} x {name}" for name, count in hit.most_common())
    return f"{KILLS} kills ({what}), restarts {restarts}, submitted {times} times, seed {seed}"


def _attempts(run: Training) -> int:
    return run.log.count(": begins, after")


def _kill(task: Training, word: str) -> bool:
    """Whether a process of the task with `word` in its command was there; it has had its -9."""
    pids = [pid for pid, line in cluster.pids_of(task.state["JobId"]).items() if word in line]
    for pid in pids:
        _kill_pid(pid)
    return bool(pids)


def _kill_pid(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself, or with another
        os.kill(pid, signal.SIGKILL)


def _kill_something(run: Training, chance: random.Random) -> str:
    """What was killed: a process of the job, each as likely, or now and then a node; empty where there was
    nothing to kill.
    """
    found = sorted(
        (pid, line) for pid, line in cluster.pids_of(run.job).items() if line and not line.startswith("sleep")
    )
    if chance.random() < 0.1 and run.state["JobState"] == "RUNNING":
        node = chance.choice(run.nodes)
        cluster.power_off(node)
        time.sleep(cluster.NODE_TIMEOUT_S + 8)
        cluster.power_on(node)
        return "a node"
    if not found:
        return ""
    pid, line = chance.choice(found)
    _kill_pid(pid)
    program = os.path.basename(line.split()[0])
    if program.startswith("python"):
        return "torchrun" if "torch.distributed.run" in line else "a rank"
    return "the batch script" if "slurm_script" in line else program.rstrip(":")
