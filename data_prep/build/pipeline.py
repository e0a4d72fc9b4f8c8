"""The commands build, index and merge: inputs become shards, in steps that survive a kill.

OUT.partial/settings.json    what this build is of: inputs by hash, options, versions
OUT.partial/part-*.sqlite    rows and checked images (records.py, scan.py), one per task
OUT.partial/plan.sqlite      groups, splits and leaks over all parts (plan.py)
OUT.partial/train/*.tar      shards, each complete or absent (write.py)
OUT/                         the same folder at the end, with manifest.json and the report, without work files
"""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import PIL
import simplejpeg
import tyro

from data_prep.atomic import check_replaceable, sync, write_json
from data_prep.build.decisions import DROPPED, REMOVED, read_decisions
from data_prep.build.options import Checking, Parallelism, Reading, Splitting, cores
from data_prep.build.plan import Plan, check_parts
from data_prep.build.records import Part, load
from data_prep.build.scan import Checks, scan
from data_prep.build.write import index_in_place, write_shards
from data_prep.cli import Folder
from data_prep.errors import UserError
from data_prep.images import installed_version
from data_prep.inputs.formats import images_folder
from data_prep.inputs.locations import check_root
from data_prep.inputs.storage import digest, expand, is_url
from data_prep.report.summary import print_report, summarize, write_rejects, write_report
from data_prep.shards import FORMAT, read_manifest

SETTINGS = "settings.json"  # of an unfinished build; the manifest begins with the same keys


def build(
    inputs: Annotated[
        list[str], tyro.conf.arg(metavar="INPUT...", help_behavior_hint="(required)"), tyro.conf.Positional
    ],
    out: Folder,
    read: Reading = Reading(),  # noqa: B008 frozen
    check: Checking = Checking(),  # noqa: B008
    split: Splitting = Splitting(),  # noqa: B008
    parallelism: Parallelism = Parallelism(),  # noqa: B008
    images_per_shard: int = 1000,
    min_shards: int = 8,
    overwrite: bool = False,
) -> dict | None:
    """Check every image of the inputs and write train, val and test shards, with a manifest and a report.

    A build that was killed resumes when the same command is run again.

    Args:
        inputs: CSV, TSV, JSONL or Parquet files, tars, or folders of images with .txt files beside them, each
            line of which is a caption; local, or URLs such as hf://datasets/USER/NAME. One row per caption;
            rows with the same image are captions of one image.
        out: Folder to write; it appears under this name when it is complete.
        images_per_shard: Images per tar, approximately.
        min_shards: Minimum number of tars per split, for readers that need one per process.
        overwrite: Replace OUT and drop an unfinished build, if this command made them.

    Returns:
        The content of report.json; None if other tasks have to finish first.
    """
    if images_per_shard < 1 or min_shards < 1:
        raise UserError(
            f"--images-per-shard {images_per_shard}, --min-shards {min_shards}: both must be at least 1"
        )
    writing = {"images_per_shard": images_per_shard, "min_shards": min_shards}
    return _run("build", inputs, out, read, check, split, parallelism, writing, overwrite)


def index(
    tars: Annotated[
        list[str], tyro.conf.arg(metavar="TAR...", help_behavior_hint="(required)"), tyro.conf.Positional
    ],
    out: Folder,
    read: Reading = Reading(),  # noqa: B008 frozen
    check: Checking = Checking(),  # noqa: B008
    split: Splitting = Splitting(),  # noqa: B008
    parallelism: Parallelism = Parallelism(),  # noqa: B008
    overwrite: bool = False,
) -> dict | None:
    """Check existing WebDataset tars, and index them for training in place.

    Nothing is copied or changed: images that would have to be changed are rejected, like other bad images.
    Splits are made of groups as in build, so one tar may contain samples of train, val and test.

    Args:
        tars: Tars of img2dataset, webdataset, open_clip or others: an image is followed by a .txt or .json of
            the same name.
        out: Folder for the index and the report; it appears under this name when it is complete.
        overwrite: Replace OUT and drop an unfinished index, if this command made them.

    Returns:
        The content of report.json; None if other tasks have to finish first.
    """
    for tar in tars:
        if is_url(tar) or not tar.endswith(".tar"):
            raise UserError(
                f"{tar}: index reads local, uncompressed .tar files only; use build, which copies the images"
            )
    paths = [os.path.abspath(tar) for tar in tars]
    return _run("index", paths, out, read, check, split, parallelism, {}, overwrite)


def _run(
    command: str,
    inputs: list[str],
    out: Path,
    read: Reading,
    check: Checking,
    split: Splitting,
    parallelism: Parallelism,
    writing: dict,
    overwrite: bool,
) -> dict | None:
    check_replaceable(out, "manifest.json", overwrite)
    split.check()
    parallelism = parallelism.resolved()
    checks = Checks(check.rules(), check.skip_decode, in_place=command == "index")
    inputs = expand([str(source) for source in inputs])
    read = replace(read, images=read.images or images_folder(inputs))
    check_root(read.images)
    if split.keep_splits:
        read_manifest(Path(split.keep_splits))  # before all images are checked, not after
    decisions, decisions_sha256 = read_decisions(Path(read.decisions)) if read.decisions else ({}, "")
    folder = partial_of(out)
    settings = {
        "command": command,
        "format": FORMAT,
        "inputs": {source: digest(source) for source in inputs},
        "read": {**asdict(read), "decisions": decisions_sha256},
        "check": {name: value for name, value in asdict(check).items() if name != "max_rejects"},
        "split": asdict(split),
        "write": writing,
        "num_tasks": parallelism.num_tasks,
        "versions": {
            "pillow": PIL.__version__,
            "simplejpeg": simplejpeg.__version__,
            **{name: installed_version(name) for name in ("resvg_py", "pillow_heif")},
        },
    }
    _start_or_resume(folder, settings, overwrite)
    if not (folder / "manifest.json").exists():
        part = Part(folder, parallelism.task, parallelism.num_tasks)
        try:
            try:
                load(part, inputs, read, decisions.values())
            except UserError:
                if part.parts == 1:  # nothing is in it, and the corrected command has other options
                    shutil.rmtree(folder)
                raise
            scan(part, inputs, read.images, checks, parallelism.processes)
        finally:
            part.close()
    if parallelism.num_tasks > 1:
        print(
            f"task {parallelism.task} of {parallelism.num_tasks} has finished; after all tasks, run:"
            f" python -m data_prep merge {out}"
        )
        return None
    return merge(out, check.max_rejects, parallelism.processes, overwrite)


def _start_or_resume(folder: Path, settings: dict, overwrite: bool) -> None:
    """Create the folder of an unfinished build, or resume in it.

    Raises:
        UserError: it was started with other settings, or is not ours.
    """
    file = folder / SETTINGS
    # A build that was killed after its last step but one has a manifest already.
    if existing := next((path for path in (file, folder / "manifest.json") if path.is_file()), None):
        before = json.loads(existing.read_text(encoding="utf-8"))
        changes = [
            _describe_change(name, before.get(name), value)
            for name, value in settings.items()
            if before.get(name) != value
        ]
        if not changes:
            print(f"resuming {folder}")
            write_json(file, settings)
            return
        change = f"{folder}: started with another {'; '.join(changes)}"
        if settings["num_tasks"] > 1:
            raise UserError(f"{change}. All tasks need the same command; delete the folder to start again")
        if not overwrite:
            raise UserError(f"{change}. Pass the same options to resume, or --overwrite to start again")
        print(f"{change}; starting again")
        shutil.rmtree(folder)
    elif folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        # Hidden files are allowed: another task may be writing its settings at this moment.
        raise UserError(
            f"{folder}: has no {SETTINGS}, so it was not made by this command, and is not written to; move it"
            " away"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


def _describe_change(name: str, before, now) -> str:
    if name == "inputs":
        changed = [source for source in before if source in now and before[source] != now[source]]
        if changed:
            return f"content of {', '.join(changed)}"
        return f"input ({', '.join(before)}, now {', '.join(now)})"
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{name} ({before}, now {now})"
    return ", ".join(
        f"{key} ({before.get(key)}, now {now.get(key)})"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    )


def merge(
    out: Annotated[Folder, tyro.conf.Positional],
    max_rejects: float = Checking.max_rejects,
    processes: int = 0,
    overwrite: bool = False,
) -> dict:
    """Write the shards, manifest and report of a build that was divided into tasks.

    Args:
        out: The folder that was passed to the tasks as --out.
        max_rejects: Stop if more than this fraction of rows is rejected.
        processes: Worker processes; 0 is one per core.
        overwrite: Replace FOLDER if it exists.

    Returns:
        The content of report.json.
    """
    folder = partial_of(out)
    if not (folder / SETTINGS).is_file():
        raise UserError(
            f"{folder}: no unfinished build; start one with: python -m data_prep build ... --out {out}"
            " --num-tasks N --task I"
        )
    check_replaceable(out, "manifest.json", overwrite)
    if not (folder / "manifest.json").exists():  # else it was killed after the last step but one
        _write_all(folder, out, max_rejects, processes or cores())
    for file in [
        *folder.glob("part-*"),
        *folder.glob("plan.sqlite*"),
        *folder.rglob(".*.partial"),
        folder / "phash.bin",
        folder / SETTINGS,
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


def _write_all(folder: Path, out: Path, max_rejects: float, processes: int) -> None:
    """Write everything from the checked parts; the manifest comes last, as the mark of a complete folder."""
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    inputs, n_parts = list(settings["inputs"]), settings["num_tasks"]
    check_parts(folder, n_parts)
    parts = [Part(folder, number, n_parts, read_only=True) for number in range(n_parts)]
    plan = Plan(folder, parts, Splitting(**settings["split"]), inputs, settings["read"]["images"])
    summary = summarize(plan)
    _check_rejects(folder, inputs, plan, summary, max_rejects)
    if settings["command"] == "index":
        splits = index_in_place(folder, out, plan, settings)
    else:
        splits = write_shards(folder, plan, settings, processes)
    write_report(folder, plan, summary, settings)
    write_json(folder / "manifest.json", {**settings, "splits": splits})
    plan.close()
    for part in parts:
        part.close()


def _check_rejects(folder: Path, inputs: list[str], plan: Plan, summary: dict, max_rejects: float) -> None:
    """Raise a UserError if too many rows are rejected, or all. Rows that decisions drop do not count."""
    intended = sum(summary["reasons"].get(reason, 0) for reason in (DROPPED, REMOVED))
    if summary["rejects"] - intended <= max_rejects * summary["rows"] and summary["records"]:
        return
    write_rejects(folder / "rejects.csv", plan, inputs)
    share = summary["rejects"] / summary["rows"]
    reasons = "".join(f"\n  {count:8} x {reason}" for reason, count in summary["reasons"].items())
    first = next(plan.rejects())
    why = ", ".join(filter(None, (first.reason, first.detail)))
    fix = "Fix the input" + (", or raise --max-rejects to leave them out" if summary["records"] else "")
    count = f"{summary['rejects']} of {summary['rows']} rows cannot be used ({share:.1%}), more than"
    count += f" --max-rejects {max_rejects:g} allows"
    if not summary["records"]:
        count = f"none of the {summary['rows']} rows can be used"
    raise UserError(
        f"{count}:{reasons}\nthe first is line {first.line}, {first.image!r}:"
        f" {why}; all are in {folder / 'rejects.csv'}. {fix}"
    )
