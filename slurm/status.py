"""Where a run stands, for whoever is woken by it: state, progress, jobs, the last lines that matter, and what
to do.
"""

import json
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import tyro

from data_prep.errors import UserError
from slurm.queue import ENDED, jobs_of, look_up
from slurm.script import LOGS

MATTERS = re.compile(r"^slurm: |error|warning|exitcode|Traceback|not finite|killed|oom", re.IGNORECASE)
SILENT_S = 300  # of a heartbeat that comes every ten seconds, but not during a validation or a save
WAITS = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED")


def status(run: Annotated[Path, tyro.conf.Positional], lines: int = 8) -> None:
    """Says where a run stands, and what to do.

    Args:
        run: Run folder.
        lines: So many of the last lines of its log that matter.
    """
    if not (run / LOGS).is_dir() and not (run / "status.json").is_file():
        raise UserError(
            f"{run}: neither a run nor submitted; python -m slurm submit RECIPE --run {run} --data SHARDS"
        )
    said = json.loads((run / "status.json").read_text()) if (run / "status.json").is_file() else {}
    checkpoints = sorted(path.name for path in (run / "checkpoints").glob("samples-*"))
    print(f"run         {run}: {said.get('state', 'not begun')}")
    print("".join(f"{name:<12}{value}\n" for name, value in said.items() if name != "state"), end="")
    print(f"checkpoints {', '.join(checkpoints) or 'none'}")
    known = [(number, kind, look_up(number)) for number, kind in jobs_of(run)[-8:]]
    for number, kind, job in known:
        print(f"job         {number} {kind}: {describe(job)}")
    silent_s = 0.0
    if said.get("state") == "running" and "time" in said:
        silent_s = (datetime.now(timezone.utc) - datetime.fromisoformat(said["time"])).total_seconds()
        print(f"heartbeat   {silent_s:.0f} s ago")
    states = [job.get("JobState", "") for _, kind, job in known if kind == "train"]
    waiting = any(state and state not in ENDED for state in states)
    of_sweep = (run.parent / LOGS / f"sweep-{number}.log" for number, _ in jobs_of(run))
    logs = sorted(
        [*(run / LOGS).glob("*.log"), *filter(Path.is_file, of_sweep)], key=lambda path: path.stat().st_mtime
    )
    if logs:
        important = [
            line for line in logs[-1].read_text(errors="replace").splitlines() if MATTERS.search(line)
        ]
        print(f"log         {logs[-1]}", *(f"  {line[:300]}" for line in important[-lines:]), sep="\n")
    last = "RUNNING" if "RUNNING" in states else (states or [""])[-1]  # of a chain, others wait
    print(
        f"to do       {advice(said.get('state', ''), waiting, last, (run / 'stop').exists(), silent_s, run)}"
    )


def describe(job: dict[str, str]) -> str:
    """A job in a few words."""
    if not job:
        return "the cluster has forgotten it"
    told = [job.get("JobState", "")]
    for name, text in (
        ("Restarts", "{} restarts"),
        ("NodeList", "on {}"),
        ("RunTime", "for {}"),
        ("Reason", "{}"),
        ("ExitCode", "exit code {}"),
    ):
        if job.get(name, "") not in ("", "0", "None", "(null)", "0:0", "00:00:00"):
            told.append(text.format(job[name]))
    if job.get("JobState") in WAITS and job.get("StartTime", "Unknown") != "Unknown":
        told.append(f"begins at {job['StartTime']} or before")
    return ", ".join(told)


def advice(
    state: str, job_is_alive: bool, last_job: str, stop_asked: bool, silent_s: float, run: Path
) -> str:
    """What to do about a run.

    Args:
        state: of status.json; empty where the run has not begun.
        job_is_alive: a training job runs or waits.
        last_job: how the newest training job ended, if it did.
        stop_asked: RUN/stop is there.
        silent_s: since the run last said that it runs.
    """
    again = "the same `python -m slurm submit` again goes on from the last checkpoint"
    if state == "finished":
        return f"nothing; numbers: python -m eval retrieval {run} --data SHARDS --split test"
    if last_job == "RUNNING" and silent_s > SILENT_S:
        return (
            f"it has said nothing for {silent_s / 60:.0f} min: a rank hangs, or its node is cut off; after"
            " the recipe's timeout_minutes it ends and is requeued by itself; at once: scontrol requeue JOB"
        )
    if job_is_alive and stop_asked:
        return "nothing; it stops at the end of its step"
    if job_is_alive and last_job in WAITS:
        return "nothing; it waits in the queue"
    if job_is_alive:
        return f"nothing; to stop it with a checkpoint: touch {run}/stop"
    if state == "stopped" or last_job == "CANCELLED":
        return f"it was stopped, and can go on: {again}"
    if last_job == "TIMEOUT":
        return f"its time limit came before it could stop: raise warn_s in the site file; {again}"
    if last_job:
        return (
            f"it ended and was not requeued; the reason is in the log above. When that is put right, {again}"
        )
    return "submit it: python -m slurm submit RECIPE ..."
