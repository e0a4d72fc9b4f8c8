"""What Slurm knows about jobs: in the queue by squeue and scontrol, ended ones by sacct, where the cluster
keeps books.
"""

import re
import shutil
import subprocess
from pathlib import Path

JOBS = "slurm/jobs"  # in a run folder: a line for each job, its number and what it does
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


def add_job(run: Path, number: str, kind: str) -> None:
    (run / JOBS).parent.mkdir(parents=True, exist_ok=True)
    with open(run / JOBS, "a") as file:
        file.write(f"{number} {kind}\n")


def jobs_of(run: Path) -> list[tuple[str, str]]:
    """(number, what it does) of every job that was submitted for a run, the oldest first."""
    lines = (run / JOBS).read_text().splitlines() if (run / JOBS).is_file() else []
    return [(line.split()[0], line.split()[1]) for line in lines]


def unfinished(run: Path) -> list[str]:
    """Numbers of the run's jobs that train or wait to train."""
    jobs = [number for number, kind in jobs_of(run) if kind == "train"]
    return (
        [number for number in jobs if look_up(number).get("JobState", "") not in ("", *ENDED)]
        if shutil.which("squeue")
        else []
    )


def look_up(number: str) -> dict[str, str]:
    """What `scontrol show job` says, or in short what sacct does (JobState, Restarts, ExitCode, Reason);
    empty where neither knows.
    """
    if found := fields(_output("scontrol", "--oneliner", "show", "job", number)):
        return found
    line = _output(
        "sacct", "-X", "-n", "-P", "-j", number, "-o", "State,ExitCode,Restarts,Elapsed,NodeList"
    ).splitlines()
    names = ("JobState", "ExitCode", "Restarts", "RunTime", "NodeList")
    known = dict(zip(names, line[-1].split("|"), strict=False)) if line else {}
    return {name: value.split()[0] if value else "" for name, value in known.items()}  # "CANCELLED by 1000"


def fields(line: str) -> dict[str, str]:
    """ "JobId=1 JobState=RUNNING Restarts=0" -> {"JobId": "1", ...}; of an array's lines, the first."""
    return dict(re.findall(r"(?:^|\s)([A-Z][\w:/]*)=(\S*)", line.splitlines()[0])) if line.strip() else {}


def _output(*words: str) -> str:
    if not shutil.which(words[0]):
        return ""
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    return result.stdout if result.returncode == 0 else ""
