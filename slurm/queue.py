"""What Slurm knows about jobs: scontrol for jobs in the queue, sacct for ended ones where the cluster keeps
accounting.
"""

import re
import shutil
import subprocess
from pathlib import Path

JOBS = "slurm/jobs"  # in a run folder: one line per job, its number and its name
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
)


def record_job(run: Path, number: str, name: str) -> None:
    """Append a submitted job to the run's list of jobs."""
    (run / JOBS).parent.mkdir(parents=True, exist_ok=True)
    with open(run / JOBS, "a") as file:
        file.write(f"{number} {name}\n")


def jobs_of_run(run: Path) -> list[tuple[str, str]]:
    """(number, name) of every job that was submitted for a run, the oldest first."""
    text = (run / JOBS).read_text(errors="replace") if (run / JOBS).is_file() else ""
    return re.findall(r"^([0-9_]+) (\S+)$", text, re.MULTILINE)


def active_jobs(run: Path) -> list[str]:
    """Numbers of the run's training jobs that run or wait in the queue."""
    if not shutil.which("squeue"):
        return []
    numbers = [number for number, name in jobs_of_run(run) if name == "train"]
    return [number for number in numbers if job_info(number).get("JobState", "") not in ("", *ENDED)]


def job_info(number: str) -> dict[str, str]:
    """The fields of `scontrol show job`.

    For a job that has left the queue, those that sacct has of it: JobState, ExitCode, Restarts, RunTime,
    NodeList. Empty where neither knows the job.
    """
    if info := parse_fields(_output("scontrol", "--oneliner", "show", "job", number)):
        return info
    names = ("JobState", "ExitCode", "Restarts", "RunTime", "NodeList")
    columns = "State,ExitCode,Restarts,Elapsed,NodeList"
    lines = _output("sacct", "-X", "-n", "-P", "-j", number, "-o", columns).splitlines()
    values = lines[-1].split("|") if lines else []
    # Only the first word of a value: the state can be "CANCELLED by 1000".
    return {name: value.split()[0] if value else "" for name, value in zip(names, values, strict=False)}


def parse_fields(text: str) -> dict[str, str]:
    """ "JobId=1 JobState=RUNNING Restarts=0" -> {"JobId": "1", ...}; of an array's lines, the first."""
    return dict(re.findall(r"(?:^|\s)([A-Z][\w:/]*)=(\S*)", text.splitlines()[0])) if text.strip() else {}


def _output(*words: str) -> str:
    if not shutil.which(words[0]):
        return ""
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    return result.stdout if result.returncode == 0 else ""
