"""The state of a run on a cluster: progress, jobs, the relevant lines of its log, and what to do next."""

import re
from datetime import datetime, timezone
from pathlib import Path
from shlex import quote
from typing import Annotated

import tyro

from data_prep.cli import Run
from data_prep.errors import UserError
from data_prep.terminal import say
from slurm.queue import ENDED, job_info, jobs_of_run
from slurm.script import LOGS
from train.run.records import read_status

RELEVANT = re.compile(r"^slurm: |error|warning|exitcode|Traceback|not finite|killed|oom", re.IGNORECASE)
SILENT_S = 300  # status.json is written every ten seconds, but not during a validation or a save
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED")


def status(run: Annotated[Run, tyro.conf.Positional], lines: int = 8) -> None:
    """Show the state of a run, its jobs and the relevant lines of its log, and what to do next.

      python -m slurm status runs/mine

    Args:
        run: Run folder.
        lines: Number of log lines to show.
    """
    status_file = run / "status.json"
    if not (run / LOGS).is_dir() and not status_file.is_file():
        raise UserError(
            f"{run}: not a run, and not submitted; submit it: python -m slurm submit RECIPE --run"
            f" {quote(str(run))} --data SHARDS"
        )
    values = dict(read_status(run))
    state = values.pop("state", "")
    checkpoints = sorted(path.name for path in (run / "checkpoints").glob("samples-*"))
    say(f"run         {run}: {state or 'not started'}")
    for name, value in values.items():
        say(f"{name:<11} {value}")
    say(f"checkpoints {', '.join(checkpoints) or 'none'}")
    jobs = [(number, name, job_info(number)) for number, name in jobs_of_run(run)[-8:]]
    for number, name, info in jobs:
        say(f"job         {number} {name}: {describe(info)}")
    silent_s = 0.0
    if state == "running" and "time" in values:
        silent_s = (datetime.now(timezone.utc) - datetime.fromisoformat(values["time"])).total_seconds()
        say(f"heartbeat   {silent_s:.0f} s ago")
    if log := newest_log(run):
        relevant = [text for text in log.read_text(errors="replace").splitlines() if RELEVANT.search(text)]
        say(f"log         {log}", *(f"  {text[:300]}" for text in relevant[-lines:]), sep="\n")
    job_states = [info.get("JobState", "") for _, name, info in jobs if name == "train"]
    say(f"to do       {advice(state, job_states, (run / 'stop').exists(), silent_s, run)}")


def newest_log(run: Path) -> Path | None:
    """The log of a job of the run that was written to last."""
    of_sweeps = (run.parent / LOGS / f"sweep-{number}.log" for number, _ in jobs_of_run(run))
    logs = [*(run / LOGS).glob("*.log"), *filter(Path.is_file, of_sweeps)]
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)


def describe(info: dict[str, str]) -> str:
    """One line on a job; see job_info."""
    if not info:
        return "no longer known to Slurm"
    words = [info.get("JobState", "")]
    for name, text in (
        ("Restarts", "{} restarts"),
        ("NodeList", "on {}"),
        ("RunTime", "for {}"),
        ("Reason", "{}"),
        ("ExitCode", "exit code {}"),
    ):
        if info.get(name, "") not in ("", "0", "None", "(null)", "0:0", "00:00:00"):
            words.append(text.format(info[name]))
    if info.get("JobState") in WAITING and info.get("StartTime", "Unknown") != "Unknown":
        words.append(f"expected to start at {info['StartTime']} or earlier")
    return ", ".join(words)


def advice(state: str, job_states: list[str], stop_requested: bool, silent_s: float, run: Path) -> str:
    """What to do about a run.

    Args:
        state: of status.json; empty where the run has not started.
        job_states: Slurm's states of the run's training jobs, the oldest first; "" where it knows none. Empty
            for a run that `train` alone has started.
        stop_requested: RUN/stop exists.
        silent_s: seconds since the run last wrote status.json.
    """
    folder = quote(str(run))
    if state == "finished":
        return f"nothing, it is finished; to evaluate it: python -m eval retrieval {folder} --data SHARDS"
    if state and not job_states:
        return _advice_without_jobs(state, stop_requested, silent_s, run)
    is_active = any(job_state and job_state not in ENDED for job_state in job_states)
    last_job = "RUNNING" if "RUNNING" in job_states else (job_states or [""])[-1]  # the rest of a chain waits
    resume = "to resume from the last checkpoint, run the same `python -m slurm submit` again"
    if last_job == "RUNNING" and silent_s > SILENT_S:
        return (
            f"no heartbeat for {silent_s / 60:.0f} min: a rank hangs, or its node is cut off. After the"
            " recipe's timeout_minutes the job ends and is requeued; to do that now: scontrol requeue JOB"
        )
    if is_active and stop_requested:
        return "nothing; it stops at the end of its current step"
    if is_active and last_job in WAITING:
        return "nothing; it waits in the queue"
    if is_active:
        return f"nothing; to stop it with a checkpoint: touch {quote(str(run / 'stop'))}"
    if state == "stopped" or last_job == "CANCELLED":
        return f"it was stopped; {resume}"
    if last_job == "TIMEOUT":
        return f"it reached its time limit before it could stop: increase warn_s in the site file; {resume}"
    if last_job:
        return f"it ended and was not requeued; the reason is in the log above. After fixing it, {resume}"
    return f"submit it: python -m slurm submit RECIPE --run {folder} --data SHARDS"


def _advice_without_jobs(state: str, stop_requested: bool, silent_s: float, run: Path) -> str:
    """What to do about a run that was started without Slurm and is not finished; see advice()."""
    resume = f"to resume from the last checkpoint: python -m train {quote(str(run / 'recipe.yaml'))}"
    if state == "stopped":
        return f"it was stopped; {resume}"
    if state == "failed":
        return f"it failed, and said why where it was started; after fixing that, {resume}"
    if silent_s > SILENT_S:
        return f"no heartbeat for {silent_s / 60:.0f} min; if its process has ended, {resume}"
    if stop_requested:
        return "nothing; it stops at the end of its current step"
    return f"nothing; to stop it with a checkpoint: touch {quote(str(run / 'stop'))}"
