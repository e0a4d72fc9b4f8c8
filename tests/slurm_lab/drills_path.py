"""Drills on the whole path: a preparation that loses a task, the pipeline to its results, and many kills."""

import contextlib
import itertools
import json
import math
import os
import random
import signal
import time
from collections import Counter

import numpy as np
from PIL import Image

from slurm.pipeline import job, pipeline
from slurm.queue import ENDED, job_info
from slurm.script import Resources
from tests.slurm_lab import cluster
from tests.slurm_lab.fixtures import BUILD, Fixtures, Training, digests, kind_of, python
from tests.stores import Proxy, proxied, s3, upload

TASKS, KILLS = 6, 30


def store(fixtures: Fixtures) -> str:
    """Two nodes, shards in S3: the weights of local shards; of large images, each node fetches its share."""
    cache = cluster.STATE / "local"
    photos = fixtures.folder / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(96):  # of 270 kB: noise
        Image.fromarray(rng.integers(0, 256, (300, 300, 3), np.uint8)).save(photos / f"{number}.png")
    (photos / "pairs.csv").write_text("image,caption\n" + "".join(f"{n}.png,noise {n}\n" for n in range(96)))
    python("data_prep", "build", photos / "pairs.csv", "--out", photos / "shards", "--val", 0, "--test", 0)
    with s3() as files, proxied(Proxy(), f"{cluster.NET}.254") as proxy:
        shares = {}
        for name, shards, epochs in (("icons", fixtures.shards, 10), ("photos", photos / "shards", 1)):
            run = fixtures.train(
                f"store-{name}",
                nodes=2,
                epochs=epochs,
                data=upload(files, shards, name),
                flags=("--cache-dir", str(cache / name)),
                **{key: value for key, value in os.environ.items() if key.startswith("AWS_")},
            )
            if name == "icons":
                run.assert_finishes(restarts=0)
            else:
                assert run.until_ended()["JobState"] == "COMPLETED", run.log[-3000:]
            size = sum(path.stat().st_size for path in shards.glob("train/*.tar"))
            sent = Counter()
            for (client, path), n_bytes in proxy.sent_to.items():
                if path.startswith(f"/bucket/{name}/train/") and path.endswith(".tar"):
                    sent[client] += n_bytes
            assert len(sent) == 2, sent
            shares[name] = [n_bytes / size for n_bytes in sent.values()]
    assert max(shares["icons"]) <= 1, shares
    assert max(shares["photos"]) < 0.62, shares
    return ", ".join(
        f"{name}: {', '.join(f'{share:.0%}' for share in each)}" for name, each in shares.items()
    )


def lost_task(fixtures: Fixtures) -> str:
    """One of six tasks of a preparation is killed: the merge refuses, a second submission prepares only what
    is missing, and the tars are the same as those of one process.
    """
    folder, data = fixtures.folder / "lost-task", fixtures.folder / "lost-task-shards"
    site, cpu_only = fixtures.site("lost-task"), Resources(gpus=0, time="10:00")
    build = ("data_prep", "build", str(fixtures.icons), "--out", str(data), "--processes", "1", *BUILD)

    def prepare() -> list[Training]:
        array = f"0-{TASKS - 1}"
        number = job("prepare", folder, cpu_only, array, resumes=True, site=site, flags=build)
        return [Training(fixtures, folder, f"{number}_{task}") for task in range(TASKS)]

    def merge(tasks: list[Training]) -> Training:
        after, words = tasks[0].job.split("_")[0], ("data_prep", "merge", str(data), "--processes", "1")
        return Training(
            fixtures, folder, job("merge", folder, cpu_only, after=(after,), site=site, flags=words)
        )

    tasks = prepare()
    merging = merge(tasks)
    tasks[3].until(lambda: _kill(tasks[3], "data_prep build"), "a process of the fourth task")
    ends = [task.until_ended()["JobState"] for task in tasks]
    assert ends == ["FAILED" if number == 3 else "COMPLETED" for number in range(TASKS)], ends
    assert merging.until_ended()["JobState"] == "CANCELLED", "the merge must not wait for a failed job"
    refusal = python("data_prep", "merge", data, expect=2)
    assert "1 of 6 tasks have not finished, or had other options: 3" in refusal
    partial = data.with_name(f"{data.name}.partial")
    before = digests(partial, "part-*.sqlite")
    before.pop("part-00003-of-00006.sqlite", None)
    tasks = prepare()
    assert [(task.until_ended()["JobState"], task.restarts) for task in tasks] == [("COMPLETED", 0)] * TASKS
    assert before.items() <= digests(partial, "part-*.sqlite").items(), "a finished part was prepared again"
    assert merge(tasks).until_ended()["JobState"] == "COMPLETED", merging.log
    tars = digests(data, "**/*.tar")
    assert tars == digests(fixtures.shards, "**/*.tar")
    return f"{len(before)} of {TASKS} parts kept, {len(tars)} tars equal those of one process"


def whole_path(fixtures: Fixtures) -> str:
    """Preparation, merge, training and evaluation as one submission end in a table of results."""
    run = fixtures.folder / "path"
    numbers = pipeline(
        (str(fixtures.icons),),
        fixtures.recipe,
        run,
        fixtures.folder / "path-shards",
        build=" ".join(BUILD),
        tasks=TASKS,
        resources=Resources(2, 1, "30:00"),
        site=fixtures.site("path"),
    )
    jobs = [Training(fixtures, run, number, ranks=2) for number in numbers]
    jobs[-1].until_ended(1500)
    infos = [job_info(number) for number in numbers]
    states = [(info["JobState"], info["Restarts"]) for info in infos]
    assert states == [("COMPLETED", "0")] * 4, f"{states}\n{jobs[-1].log[-3000:]}"
    for earlier, later in itertools.pairwise(infos):
        assert earlier["EndTime"] <= later["StartTime"], (earlier, later)
    jobs[2].assert_equal()
    assert "R@1" in next((run / "slurm").glob("eval-*.log")).read_text()
    recall = json.loads((run / "test.json").read_text())["metrics"]["image_to_text/R@1"]
    return f"4 jobs, restarts 0, image to text R@1 {100 * recall:.1f} % in {run.name}/test.json"


class RepeatedKills:
    """One training that is killed again and again.

    Attributes:
        run: the training, as it was submitted last.
        killed: what was killed, and how often.
        attempts_at_kill, saved_at_kill: attempts and newest checkpoint at the last kill.
        restarts: those of earlier submissions.
        submissions: number of times that the training was submitted.
    """

    def __init__(self, fixtures: Fixtures, seed: int):
        self.fixtures, self.random, self.killed = fixtures, random.Random(seed), Counter()
        self.attempts_at_kill, self.saved_at_kill, self.restarts, self.submissions = 0, 0, 0, 0
        self._submit()

    def _submit(self) -> None:
        self.run = self.fixtures.train("kills", nodes=2, epochs=200, LAB_STEP_S=0.1, timeout_s=30)
        self.submissions += 1

    def submit_again(self) -> None:
        self.restarts += self.run.restarts
        self._submit()

    @property
    def attempts(self) -> int:
        """Number of times that the batch script started."""
        return self.run.log.count(": starts after")

    def until_alive(self, attempts: float, samples: int) -> None:
        """Wait until the training runs, with more attempts or a later checkpoint than given.

        A training whose batch script was killed has ended, and is submitted again.
        """
        while (
            not (self.attempts > attempts or self.run.checkpoint() > samples) or self.run.state != "RUNNING"
        ):
            if self.run.state in ENDED and (state := self.run.until_ended()["JobState"]) in ENDED:
                assert state != "COMPLETED", f"finished after {sum(self.killed.values())} kills"
                self.submit_again()
            time.sleep(0.2)

    def kill_once(self) -> None:
        """Kill something while the training runs."""
        # A new attempt, or the old one after four more epochs: then the last kill did not end it.
        self.until_alive(self.attempts_at_kill, self.saved_at_kill + 4 * 160)
        # Three of four kills come after a new checkpoint, the others during the start; but never two of those
        # in a row, because three attempts without a checkpoint are not requeued.
        if self.random.random() < 0.75 or self.run.checkpoint() == self.saved_at_kill:
            self.until_alive(math.inf, self.saved_at_kill)
        self.attempts_at_kill, self.saved_at_kill = self.attempts, self.run.checkpoint()
        time.sleep(self.random.uniform(0, 3))
        if name := _kill_something(self.run, self.random):
            self.killed[name] += 1


def kills(fixtures: Fixtures) -> str:
    """Thirty times SIGKILL for a random process of the job, or a node switched off, in one training."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    training = RepeatedKills(fixtures, seed)
    while training.killed.total() < KILLS:
        training.kill_once()
    while training.run.until_ended(1500)["JobState"] != "COMPLETED":
        training.submit_again()
    restarts, submissions = training.restarts + training.run.restarts, training.submissions
    assert training.attempts == restarts + submissions, (training.attempts, restarts, submissions)
    training.run.assert_equal()
    what = ", ".join(f"{count} x {name}" for name, count in training.killed.most_common())
    return f"{KILLS} kills ({what}), restarts {restarts}, submitted {submissions} times, seed {seed}"


def _kill(task: Training, word: str) -> bool:
    """Kill the Python processes of a task whose command line contains `word`; whether there were any.

    Not its srun, whose command line contains `word` too: its process could then finish the work.
    """
    processes = cluster.processes_of(task.info["JobId"])
    pids = [pid for pid, line in processes.items() if word in line and _program(line).startswith("python")]
    for pid in pids:
        _kill_pid(pid)
    return bool(pids)


def _program(line: str) -> str:
    return os.path.basename(line.split()[0])


def _kill_pid(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(pid, signal.SIGKILL)


def _kill_something(run: Training, rng: random.Random) -> str:
    """Kill one process of the job at random, or one time in ten switch off a node.

    Returns:
        What was killed; empty where there was nothing to kill.
    """
    processes = sorted(
        (pid, line)
        for pid, line in cluster.processes_of(run.job).items()
        if line and not line.startswith("sleep")
    )
    if rng.random() < 0.1 and run.state == "RUNNING":
        node = rng.choice(run.nodes)
        cluster.power_off(node)
        time.sleep(cluster.NODE_TIMEOUT_S + 8)
        cluster.power_on(node)
        return "a node"
    if not processes:
        return ""
    pid, line = rng.choice(processes)
    kind = kind_of(pid, line)
    _kill_pid(pid)
    return kind or ("the batch script" if "slurm_script" in line else _program(line).rstrip(":"))
