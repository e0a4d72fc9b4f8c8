"""The pipeline: inputs become shards, in steps that survive a kill.

OUT.partial/begun.json       what this build is of: inputs by hash, options, versions
OUT.partial/part-*.sqlite    rows and checked images (records.py, scan.py), one per task
OUT.partial/plan.sqlite      groups, splits and leaks over all parts (plan.py)
OUT.partial/train/*.tar      shards, each whole or not there
OUT/                         the same folder at the end, with manifest.json and the report, without the work files
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import PIL
import simplejpeg
import tyro

from data_prep.atomic import check_replaceable, sync
from data_prep.build.decisions import DROPPED, REMOVED, read_decisions
from data_prep.build.plan import Plan, Splitting, check_parts
from data_prep.build.records import Part, Reading, load
from data_prep.build.scan import Checks, check_root, scan
from data_prep.build.write import index_in_place, write_shards
from data_prep.errors import UserError
from data_prep.images import Rules, parse_color
from data_prep.inputs.sources import digest, expand, images_of, is_url
from data_prep.report.summary import print_report, summarize, write_json, write_rejects, write_report
from data_prep.shards import FORMAT

WORK = "begun.json"


@dataclass(frozen=True)
class Checking:
    """What is let in, and what becomes of images that have to change."""

    background: str = "white"
    """Color put behind transparent images."""
    max_pixels: int = Rules.max_pixels
    """Larger images are rejected, judged by their header: decompression bombs."""
    min_side_px: int = Rules.min_side_px
    """Images with a shorter side are rejected."""
    max_aspect: float = Rules.max_aspect
    """Images whose longer side is more than this many times the shorter one are rejected."""
    resize_px: int = 0
    """Larger images are resized, so that the shorter side has this; 0 leaves them."""
    encode: str = "png"
    """What changed images are stored as: png, jpeg (quality 95) or webp (lossless, smaller and faster to read
    than png).
    """
    trust: bool = False
    """Decode nothing: for files that were checked before. Only PNG, JPEG and WebP; equal files still share a
    group.
    """
    max_rejects: float = 0.01
    """More than this fraction of rejected rows ends the build."""

    def checks(self, in_place: bool) -> Checks:
        if self.encode not in ("png", "jpeg", "webp"):
            raise UserError(f"--encode {self.encode}: png, jpeg or webp is wanted")
        background = parse_color(self.background)
        rules = Rules(
            background, self.max_pixels, self.min_side_px, self.max_aspect, self.resize_px, self.encode
        )
        return Checks(rules, self.trust, in_place)


@dataclass(frozen=True)
class Work:
    """Who does it."""

    processes: int = 0
    """Worker processes; 0 is one per core."""
    num_tasks: int = 0
    """The work is cut in this many parts, one per task; then `merge`. In a Slurm array, its size by default.
    """
    task: int = -1
    """Which part this call does, from 0; in a Slurm array, its index by default."""

    def settled(self) -> "Work":
        """The same with what Slurm and the machine say filled in."""
        count, at = os.environ.get("SLURM_ARRAY_TASK_COUNT"), int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))
        num_tasks, task = self.num_tasks, self.task
        if not num_tasks and count:
            last = int(os.environ.get("SLURM_ARRAY_TASK_MAX", int(count) - 1))
            if last != int(count) - 1:
                raise UserError(
                    f"the array has {count} tasks but ends at {last}: --array=0-{int(count) - 1}, or --num-tasks, is wanted"
                )
            num_tasks = int(count)
        num_tasks, task = num_tasks or 1, task if task >= 0 else at
        if not 0 <= task < num_tasks:
            raise UserError(
                f"--task {task} of --num-tasks {num_tasks}: a number from 0 to {num_tasks - 1} is wanted"
            )
        if self.num_tasks > 1 and self.task < 0 and "SLURM_ARRAY_TASK_ID" not in os.environ:
            raise UserError(f"--num-tasks {num_tasks} without --task: which part is this?")
        return Work(self.processes or cores(), num_tasks, task)


def build(
    inputs: Annotated[list[str], tyro.conf.Positional],
    out: Path,
    read: Reading = Reading(),  # noqa: B008 frozen
    check: Checking = Checking(),
    split: Splitting = Splitting(),  # noqa: B008
    work: Work = Work(),
    images_per_shard: int = 1000,
    min_shards: int = 8,
    overwrite: bool = False,
) -> dict | None:
    """Check every image of the inputs and write train, val and test shards, with a manifest and a report.

    A build that was killed goes on where it was when the same command is given again.

    Args:
        inputs: CSV, TSV, JSONL or Parquet files, tars, or folders of images with .txt beside them; local, or
            URLs such as hf://datasets/USER/NAME. One row per caption; rows with the same image are captions
            of one image.
        out: Folder to write; it appears when everything is whole.
        images_per_shard: Images in one tar, about.
        min_shards: Tars of a split, at least: as many as readers, where another program wants one for each.
        overwrite: Replace `out`, and drop what an earlier build left unfinished, if they were made by this
            command.

    Returns:
        What report.json holds; None where other tasks have to end first.
    """
    if images_per_shard < 1 or min_shards < 1:
        raise UserError(
            f"--images-per-shard {images_per_shard}, --min-shards {min_shards}: at least 1 is wanted"
        )
    writing = {"images_per_shard": images_per_shard, "min_shards": min_shards}
    return _run("build", inputs, out, read, check, split, work, writing, overwrite)


def index(
    tars: Annotated[list[str], tyro.conf.Positional],
    out: Path,
    read: Reading = Reading(),  # noqa: B008 frozen
    check: Checking = Checking(),
    split: Splitting = Splitting(),  # noqa: B008
    work: Work = Work(),
    overwrite: bool = False,
) -> dict | None:
    """Check WebDataset tars that are there already, and index them so that training reads them where they
    lie.

    Nothing is copied or changed: images that would have to be put right are rejected, as are other bad ones.
        Splits are
    made of groups as in build, so train, val and test may be in one tar; the index knows which sample is
    whose.

    Args:
        tars: Tars of img2dataset, webdataset, open_clip or others: an image and a .txt or .json of one name
            follow each other.
        out: Folder for the index and the report; it appears when everything is whole.
        overwrite: Replace `out`, and drop what an earlier call left unfinished, if they were made by this
            command.

    Returns:
        What report.json holds; None where other tasks have to end first.
    """
    for tar in tars:
        if is_url(tar) or not tar.endswith(".tar"):
            raise UserError(
                f"{tar}: only local, uncompressed .tar files are read in place; build copies from others"
            )
    return _run("index", [os.path.abspath(tar) for tar in tars], out, read, check, split, work, {}, overwrite)


def _run(command, inputs, out, read, check, split, work, writing, overwrite) -> dict | None:
    check_replaceable(out, "manifest.json", overwrite)
    if min(split.val, split.test) < 0 or split.val + split.test >= 1:
        raise UserError(
            f"--val {split.val} and --test {split.test}: fractions that leave something for train are wanted"
        )
    work, checks = work.settled(), check.checks(in_place=command == "index")
    inputs = expand([str(source) for source in inputs])
    read = replace(read, images=read.images or images_of(inputs))
    check_root(read.images)
    decisions, decided = read_decisions(Path(read.decisions)) if read.decisions else ({}, "")
    folder = partial_of(out)
    begun = {
        "command": command,
        "format": FORMAT,
        "inputs": {source: digest(source) for source in inputs},
        "read": {**asdict(read), "decisions": decided},
        "check": {name: value for name, value in asdict(check).items() if name != "max_rejects"},
        "split": asdict(split),
        "write": writing,
        "num_tasks": work.num_tasks,
        "versions": {"pillow": PIL.__version__, "simplejpeg": simplejpeg.__version__},
    }
    _begin(folder, begun, overwrite)
    if not (folder / "manifest.json").exists():
        part = Part(folder, work.task, work.num_tasks)
        try:
            load(part, inputs, read, decisions.values())
            scan(part, inputs, read.images, checks, work.processes)
        finally:
            part.close()
    if work.num_tasks > 1:
        print(f"task {work.task} of {work.num_tasks} is done; when all are: python -m data_prep merge {out}")
        return None
    return merge(out, check.max_rejects, work.processes, overwrite)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin(folder: Path, begun: dict, overwrite: bool) -> None:
    """Make the folder of an unfinished build, or find it as it was left.

    Raises:
        UserError: it was begun with something else.
    """
    file = folder / WORK
    if found := next((name for name in (file, folder / "manifest.json") if name.is_file()), None):
        before = json.loads(found.read_text(encoding="utf-8"))  # the manifest begins with the same
        changed = [
            _change(name, before.get(name), begun[name]) for name in begun if before.get(name) != begun[name]
        ]
        if not changed:
            print(f"going on with {folder}")
            write_json(file, begun)
            return
        said = f"{folder}: begun with another {'; '.join(changed)}"
        if begun["num_tasks"] > 1:
            raise UserError(f"{said}. All tasks want the same command; delete the folder to start again")
        if not overwrite:
            raise UserError(
                f"{said}. Give the command as it was to go on, or --overwrite True to start again"
            )
        print(f"{said}; starting again")
        shutil.rmtree(folder)
    elif folder.exists() and any(
        not entry.name.startswith(".") for entry in folder.iterdir()
    ):  # another task may be beginning
        raise UserError(
            f"{folder}: has no {WORK}, so it was not made by this command, and is not written to; move it away"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, begun)


def _change(name: str, before, now) -> str:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{name} ({before}, now {now})"
    return ", ".join(
        f"{key} ({before.get(key)}, now {now.get(key)})"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    )


def merge(
    out: Annotated[Path, tyro.conf.Positional],
    max_rejects: float = Checking.max_rejects,
    processes: int = 0,
    overwrite: bool = False,
) -> dict:
    """Make shards of what the tasks of a build have checked, with one manifest and one report.

    Args:
        out: The folder that the tasks were given.
        max_rejects: More than this fraction of rejected rows ends the build.
        processes: Worker processes; 0 is one per core.
        overwrite: Replace `out` if it is there.

    Returns:
        What report.json holds.
    """
    folder = partial_of(out)
    if not (folder / WORK).is_file():
        raise UserError(
            f"{folder}: no unfinished build; begin one with: python -m data_prep build ... --out {out} --num-tasks N --task I"
        )
    check_replaceable(out, "manifest.json", overwrite)
    if not (folder / "manifest.json").exists():  # else it was killed after the last step but one
        _assemble(folder, out, max_rejects, processes or cores())
    for file in [
        *folder.glob("part-*"),
        *folder.glob("plan.sqlite*"),
        *folder.rglob(".*.partial"),
        folder / "looks.bin",
        folder / WORK,
    ]:
        file.unlink(missing_ok=True)
    if out.exists():
        shutil.rmtree(out)
    os.replace(folder, out)
    sync(out.parent)
    summary = json.loads((out / "report.json").read_text(encoding="utf-8"))
    print_report(out, summary, json.loads((out / "manifest.json").read_text(encoding="utf-8"))["split"])
    return summary


def partial_of(out: Path) -> Path:
    """The folder of an unfinished build."""
    return out.with_name(f"{out.name}.partial")


def _assemble(folder: Path, out: Path, max_rejects: float, processes: int) -> None:
    """From checked parts to everything but the folder's name; the manifest comes last."""
    begun = json.loads((folder / WORK).read_text(encoding="utf-8"))
    check_parts(folder, begun["num_tasks"])
    parts = [Part(folder, number, begun["num_tasks"], read_only=True) for number in range(begun["num_tasks"])]
    plan = Plan(folder, parts, Splitting(**begun["split"]), list(begun["inputs"]), begun["read"]["images"])
    summary = summarize(plan)
    _check_rejects(folder, begun, plan, summary, max_rejects)
    in_place = begun["command"] == "index"
    splits = (
        index_in_place(folder, out, plan, begun) if in_place else write_shards(folder, plan, begun, processes)
    )
    write_report(folder, plan, summary, begun)
    write_json(folder / "manifest.json", {**begun, "splits": splits})
    plan.close()
    for part in parts:
        part.close()


def _check_rejects(folder: Path, begun: dict, plan: Plan, summary: dict, max_rejects: float) -> None:
    intended = sum(summary["reasons"].get(reason, 0) for reason in (DROPPED, REMOVED))
    if summary["rejects"] - intended <= max_rejects * summary["rows"] and summary["records"]:
        return
    write_rejects(folder / "rejects.csv", plan, list(begun["inputs"]))
    table = "".join(f"\n  {count:8} x {reason}" for reason, count in summary["reasons"].items())
    first = next(plan.rejects())
    share = f"{summary['rejects']} of {summary['rows']} rows cannot be used ({summary['rejects'] / summary['rows']:.1%})"
    raise UserError(
        f"{share}, more than --max-rejects {max_rejects:g} allows:{table}\n"
        f"the first is line {first[1]}, {first[2]!r}: {', '.join(filter(None, first[3:]))}; all are in {folder / 'rejects.csv'}. "
        + (
            "Put the input right, or raise --max-rejects to leave them out"
            if summary["records"]
            else "Put the input right"
        )
    )
