"""What is known so far, on the disk line by line, and the processes that find it out in the time left."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from data_prep.atomic import sync, write_json
from data_prep.rooms import environment

RESULTS, BEGUN = "results.jsonl", "begun.json"
OUT_OF_TIME = "out of time"
WHOLE = "all of it"  # the note that ends a part
SAID = 1500  # characters of a failed command's output that are kept


@dataclass(frozen=True)
class Started:
    name: str
    process: subprocess.Popen
    log: Path
    began: float


@dataclass(frozen=True)
class Record:
    """Notes in OUT/results.jsonl, and the moment at which all must be done.

    Attributes:
        deadline: as time.time() counts.
    """

    out: Path
    deadline: float

    @property
    def left_s(self) -> float:
        return self.deadline - time.time()

    def note(self, part: str, name: str, **values) -> None:
        """Write a line; it is on the disk when this returns, and whole."""
        line = json.dumps({"part": part, "name": name, **_rounded(values)}) + "\n"
        with open(self.out / RESULTS, "ab") as file:
            file.write(line.encode())  # one write: a kill leaves no half of a line
        sync(self.out / RESULTS)
        print(line, end="", flush=True)

    def begin(self, part: str, name: str) -> None:
        """Say what is measured next; a note follows, unless the process dies."""
        write_json(self.out / BEGUN, {"part": part, "name": name})

    def unfinished(self) -> dict | None:
        """What begin() said last, if no note of it follows."""
        file = self.out / BEGUN
        begun = json.loads(file.read_text()) if file.is_file() else None
        noted = [{key: line[key] for key in ("part", "name")} for line in self.notes()]
        return None if begun in noted else begun

    def notes(self) -> list[dict]:
        file = self.out / RESULTS
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def start(self, name: str, words: list, **variables: str) -> Started:
        """`python WORDS`, in a process group of its own; its output goes to OUT/logs/NAME.txt."""
        log = self.out / "logs" / f"{name}.txt"
        log.parent.mkdir(exist_ok=True)
        with open(log, "a") as output:
            process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                env={**environment(), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Started(name, process, log, time.time())

    def end(self, started: Started, limit_s: float = float("inf")) -> dict:
        """Wait for a process, at most so long, and no longer than there is time; then it is killed.

        Returns:
            {"s": seconds}, and for a failure "error" and the end of what it "said".
        """
        try:
            code = started.process.wait(max(1, min(limit_s, self.left_s)))
            error = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            error = OUT_OF_TIME
        kill(started)
        result = {"s": time.time() - started.began}
        return result | ({"error": error, "said": said(started)[-SAID:]} if error else {})


def kill(started: Started) -> None:
    """A process and what it has started; nothing where they have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.process.pid, signal.SIGKILL)
    started.process.wait()


def said(started: Started) -> str:
    return started.log.read_text(errors="replace")


def _rounded(value: object) -> object:
    """Four digits of each number; a table of fifteen is not read."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
