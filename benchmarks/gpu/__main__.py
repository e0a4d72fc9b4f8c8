"""A quarter of an hour on one GPU tells everything: each figure is written as soon as it is known.

    python -m benchmarks.gpu --out OUT --limit 470      in order of value, until the time is over
    python -m benchmarks.gpu --out OUT --limit 300      again: what was left out
    python -m benchmarks.gpu --out OUT --dry            all of it on a CPU, with a tiny model

OUT/results.jsonl has a line per figure, OUT/table.md all of them with the card's name, OUT/kernels.txt the
kernels of a step, OUT/logs what each command printed. A check that fails is written down, and the others
follow; each has a process of its own. Two calls with one OUT make one table.
"""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import tyro

from benchmarks.gpu import smoke, step
from benchmarks.gpu.record import OUT_OF_TIME, SAID, WHOLE, Record, said
from benchmarks.gpu.sizes import DRY, Sizes
from benchmarks.gpu.speed import SCRATCH
from benchmarks.gpu.table import LEFT_OUT, table
from data_prep.errors import UserError, exit_on_user_error

RESERVE_S = 10  # for the table
STARTS = 3  # of the process that takes the step apart, if checks end it
DRY_ICONS = 240


class Part(NamedTuple):
    """Attributes:
    least_s: with less time left it is not started.
    most_s: after so long it is ended, for what follows.
    """

    name: str
    least_s: float
    most_s: float


# In order of value.
PARTS = [
    Part(smoke.PART, 60, 150),
    Part("commands", 40, 90),
    Part(step.PART, 60, 240),
    Part("whole path", 70, 180),
    Part("whole path beside --torchcompile", 110, 200),
    Part("tests", 60, 150),
    Part("small model", 40, 90),
    Part("checkpoint", 40, 90),
    Part("index", 30, 90),
]


def run_part(part: Part, record: Record, sizes: Sizes, data: str) -> None:
    dry = sizes == DRY
    if not dry:
        record = replace(record, deadline=min(record.deadline, time.time() + part.most_s))
    place = [record.out, record.deadline, data, "dry" if dry else "full"]
    if part.name == smoke.PART:
        smoke.smoke(record, sizes, data)
    elif part.name == "commands":
        smoke.commands(record, sizes, data)
    elif part.name == step.PART:
        run_step(record, place)
    elif part.name == "tests":
        run_tests(record, dry)
    else:
        started = record.start(part.name, ["-m", "benchmarks.gpu.speed", *place, part.name])
        record.note(part.name, WHOLE, **record.end(started))


def unfinished(part: Part, record: Record) -> str:
    """A part that must be started again, with what it lacks; "" if it has all that it can have."""
    ends = [note for note in record.notes() if (note["part"], note["name"]) == (part.name, WHOLE)]
    last = ends[-1] if ends else {}
    if record.left_s > 0 and last.get("error") != OUT_OF_TIME and not last.get("left out"):
        return ""
    return ": ".join(filter(None, (part.name, ", ".join(last.get("left out", ())))))


def run_step(record: Record, place: list) -> None:
    """Take the step apart, and go on with the next check where one has ended the process."""
    for _ in range(STARTS):
        started = record.start(step.PART, ["-m", "benchmarks.gpu.step", *place])
        result = record.end(started)
        if "error" not in result or record.left_s < 1:
            break
        if dead := record.unfinished():
            record.note(**dead, **result)
    if "error" in result:
        record.note(step.PART, WHOLE, **result)


def run_tests(record: Record, dry: bool) -> None:
    """The tests marked cuda, where pytest is installed; a dry run lists them, and `make test` runs them."""
    words = ["-m", "pytest", "tests/train/test_cuda.py", "-p", "no:cacheprovider"]
    started = record.start("tests", [*words, *(["--collect-only"] if dry else ["-m", "cuda"])])
    result = record.end(started)
    lines = said(started).strip().splitlines() or [""]
    record.note("tests", "marked cuda", summary=lines[-1][:SAID], **result)


def shards_of(data: str, out: Path, dry: bool) -> str:
    """The shards to train on; of a dry run, a few drawn icons.

    Raises:
        UserError: there are none.
    """
    if not dry:
        if not Path(data, "manifest.json").is_file():
            raise UserError(f"--data {data}: no shards there; pass --data SHARDS, or make them: make demo")
        return str(Path(data).absolute())
    shards = out / "icons" / "shards"
    if not (shards / "manifest.json").is_file():
        words = {"image": "file_path", "caption": "caption", "group": "group"}
        columns = [word for name, column in words.items() for word in (f"--{name}-column", column)]
        for line in (
            ["icons", "--out", out / "icons", "--limit", DRY_ICONS],
            ["build", out / "icons" / "icons.csv", "--out", shards, "--images-per-shard", 40, *columns],
        ):
            command = [sys.executable, "-m", "data_prep", *map(str, line)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return str(shards)


def main(out: Path, limit: float = 470, data: str = "data/icons/shards", dry: bool = False) -> None:
    """Measure what can be measured on one GPU, in order of value.

    Args:
        out: Folder for the figures; one that holds some is completed.
        limit: Seconds from now; what does not fit is left out and named.
        data: Shards to train on.
        dry: All of it on a CPU, with a tiny model.
    """
    started = time.time()
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("OMP_NUM_THREADS", "1" if dry else "4")
    data = shards_of(data, out, dry)
    record = Record(out, started + limit - RESERVE_S)
    finished = {line["name"] for line in record.notes() if line["part"] == "finished"}
    left_out = []
    for part in (part for part in PARTS if part.name not in finished):
        if record.left_s < (1 if dry else part.least_s):
            left_out.append(part.name)
            continue
        record.note("began", part.name, left_s=record.left_s)
        found = smoke.isolated(lambda part=part: run_part(part, record, DRY if dry else Sizes(), data))
        if found:
            record.note(part.name, WHOLE, **found)
        if missing := unfinished(part, record):
            left_out.append(missing)
        else:
            record.note("finished", part.name)
    record.note(LEFT_OUT, "parts", parts=left_out)
    text = table(record.notes(), dry)
    (out / "table.md").write_text(text)
    print(text)
    for name in ("runs", "exported", "index", "large-index", SCRATCH):
        shutil.rmtree(out / name, ignore_errors=True)  # gigabytes that nobody looks at


if __name__ == "__main__":
    exit_on_user_error(lambda: tyro.cli(main, description=__doc__))
