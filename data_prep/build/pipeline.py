"""The commands build, index and merge: inputs become shards, in steps that survive a kill.

OUT.partial/settings.json    what this build is of: inputs by hash, options, versions (resume.py)
OUT.partial/part-*.sqlite    rows and checked images (records.py, scan.py), one per task
OUT.partial/plan.sqlite      groups, splits and leaks over all parts (plan.py)
OUT.partial/train/*.tar      shards, each complete or absent (write.py)
OUT/                         the same folder at the end, with manifest.json and the report, without work
                             files; or a URL, see target.py
"""

import json
import math
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import PIL
import simplejpeg
import tyro

from data_prep.atomic import LOCK, full_disk_as_oserror, locked, write_json
from data_prep.build.decisions import AppliedDecisions, read_decisions
from data_prep.build.feedback import read_feedback
from data_prep.build.options import Checking, Parallelism, Reading, Splitting
from data_prep.build.plan import Plan, check_parts
from data_prep.build.records import UNKNOWN_SPLIT, Part, load
from data_prep.build.resume import (
    SETTINGS,
    adopt,
    check_ours,
    read_settings,
    restart,
    retry_rejected,
    start_or_resume,
)
from data_prep.build.scan import Checks, scan
from data_prep.build.split import SPLITS
from data_prep.build.stored import Stored
from data_prep.build.target import JOURNAL, LocalTarget, StoreTarget, target_of
from data_prep.build.write import Changed, index_in_place, write_shards
from data_prep.cli import FolderOrUrl, OptionalFolder
from data_prep.cores import cores
from data_prep.errors import UserError
from data_prep.images import installed_version
from data_prep.inputs.cells import INVALID_WEIGHT
from data_prep.inputs.formats import images_folder
from data_prep.inputs.locations import check_root, forget_open_files
from data_prep.inputs.storage import digests, expand, is_url
from data_prep.masked import masked_url
from data_prep.report.summary import counted_rows, print_report, summarize, write_rejects, write_report
from data_prep.report.warnings import HARMLESS, transparent
from data_prep.shards import FORMAT, read_manifest
from data_prep.store.remote import place_of
from data_prep.strict_json import read_json
from data_prep.terminal import say


def build(
    inputs: Annotated[
        list[str], tyro.conf.arg(metavar="INPUT...", help_behavior_hint="(required)"), tyro.conf.Positional
    ],
    out: FolderOrUrl,
    read: Reading = Reading(),  # noqa: B008 frozen
    check: Checking = Checking(),  # noqa: B008
    split: Splitting = Splitting(),  # noqa: B008
    parallelism: Parallelism = Parallelism(),  # noqa: B008
    images_per_shard: int = 1000,
    min_shards: int = 8,
    work: OptionalFolder = None,
    overwrite: bool = False,
) -> dict | None:
    """Check every image of the inputs and write train, val and test shards, with a manifest and a report.

    A build that was killed resumes when the same command is run again. With other options, or inputs that
    were corrected, it keeps every checked image whose file and checks are the same.

    Args:
        inputs: CSV, TSV, JSONL or Parquet files, tars, or folders of images with .txt files beside them, each
            line of which is a caption; local, or URLs such as hf://datasets/USER/NAME. One row per caption;
            rows with the same image are captions of one image.
        out: Folder to write; it appears under this name when it is complete. Or a URL such as
            s3://bucket/shards, to which each tar is uploaded as it is written; the manifest comes last.
        images_per_shard: Images per tar, approximately.
        min_shards: Minimum number of tars per split, for readers that need one per process.
        work: Folder of an unfinished build to a URL, one for all tasks; by default in ~/.cache/cliptune.
        overwrite: Replace OUT, if this command made it.

    Returns:
        The content of report.json; None if other tasks have to finish first.
    """
    if images_per_shard < 1 or min_shards < 1:
        raise UserError(
            f"--images-per-shard {images_per_shard}, --min-shards {min_shards}: both must be at least 1"
        )
    writing = {"images_per_shard": images_per_shard, "min_shards": min_shards}
    return _run("build", inputs, target_of(out, work), read, check, split, parallelism, writing, overwrite)


def index(
    tars: Annotated[
        list[str], tyro.conf.arg(metavar="TAR...", help_behavior_hint="(required)"), tyro.conf.Positional
    ],
    out: FolderOrUrl,
    read: Reading = Reading(),  # noqa: B008 frozen
    check: Checking = Checking(),  # noqa: B008
    split: Splitting = Splitting(),  # noqa: B008
    parallelism: Parallelism = Parallelism(),  # noqa: B008
    full_check: bool = False,
    overwrite: bool = False,
) -> dict | None:
    """Check existing WebDataset tars, and index them for training in place.

    Nothing is copied or changed: images that would have to be changed are rejected, like other bad images.
    Splits are made of groups as in build, so one tar may contain samples of train, val and test.

    Args:
        tars: Tars of img2dataset, webdataset, open_clip or others: an image is followed by a .txt or .json of
            the same name. Local, or URLs such as s3://bucket/tars/*.tar.
        out: Folder for the index and the report; it appears under this name when it is complete.
        full_check: Read and check the images in tars behind URLs, too; else only their first bytes are read.
        overwrite: Replace OUT, if this command made it.

    Returns:
        The content of report.json; None if other tasks have to finish first.
    """
    if is_url(str(out)):
        raise UserError(f"--out {masked_url(str(out))}: index writes a folder of this machine; pass its path")
    for tar in tars:
        if not tar.endswith(".tar"):
            raise UserError(
                f"{tar}: index reads uncompressed .tar files only; use build, which copies the images"
            )
        if masked_url(tar) != tar:
            raise UserError(
                f"{masked_url(tar)}: has a password or signature, which the index would hold; give it to the"
                " store's client instead, in its files or environment variables"
            )
    paths = [tar if is_url(tar) else os.path.abspath(tar) for tar in tars]
    target = LocalTarget(Path(out))
    return _run("index", paths, target, read, check, split, parallelism, {}, overwrite, full_check)


def _run(
    command: str,
    inputs: list[str],
    target: LocalTarget | StoreTarget,
    read: Reading,
    check: Checking,
    split: Splitting,
    parallelism: Parallelism,
    writing: dict,
    overwrite: bool,
    full_check: bool = False,
) -> dict | None:
    split.check()
    forget_open_files()
    parallelism = parallelism.resolved()
    is_index = command == "index"
    checks = Checks(check.rules(), check.skip_decode, in_place=is_index, full_check=full_check)
    inputs = expand([str(source) for source in inputs])
    read = replace(read, images=read.images or images_folder(inputs))
    check_root(read.images)
    if split.keep_splits:
        read_manifest(place_of(split.keep_splits))  # before all images are checked, not after
    decisions, decisions_sha256 = read_decisions(Path(read.decisions)) if read.decisions else ({}, "")
    folder = target.work
    read_too = filter(None, [read.decisions, read.feedback])
    check_ours(folder)
    target.check(overwrite, [*inputs, read.images, *read_too])
    marks, unused, marks_sha256 = [], [], ""
    if read.feedback:
        marks, unused, marks_sha256 = read_feedback(Path(read.feedback), split.keep_splits, decisions)
    applied = AppliedDecisions([*decisions.values(), *marks], unused)
    # Settings are written into the manifest, which is shared: a URL is there without its password.
    sources = {masked_url(source): source for source in inputs}
    inputs = list(sources.values())
    hashes = {"decisions": decisions_sha256, "feedback": marks_sha256}
    recorded = {**asdict(read), "images": masked_url(read.images), **hashes}
    checking = {name: value for name, value in asdict(check).items() if name != "max_rejects"}
    if is_index and not full_check and any(map(is_url, inputs)):
        checking["unread"] = True
    settings = {
        "command": command,
        "format": FORMAT,
        "inputs": dict(zip(sources, digests(inputs, in_place=is_index), strict=True)),
        "read": recorded,
        "check": checking,
        "split": asdict(split),
        "write": writing,
        "num_tasks": parallelism.num_tasks,
        "versions": library_versions(),
    }
    if parallelism.num_tasks == 1:
        with full_disk_as_oserror(folder), locked(folder, "building in"):
            _check_images(folder, settings, inputs, read, applied, checks, parallelism)
            return _merge(target, check.max_rejects, parallelism.processes)
    with full_disk_as_oserror(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _check_images(folder, settings, inputs, read, applied, checks, parallelism)
    done = f"task {parallelism.task} of {parallelism.num_tasks} has finished"
    say(f"{done}; after all tasks, run: python -m data_prep merge {target.arguments}")
    return None


def library_versions() -> dict[str, str]:
    """What images are decoded with; "" for an optional library that is not installed."""
    optional = {name: installed_version(name) for name in ("resvg_py", "pillow_heif")}
    return {"pillow": PIL.__version__, "simplejpeg": simplejpeg.__version__, **optional}


def _check_images(
    folder: Path,
    settings: dict,
    inputs: list[str],
    read: Reading,
    decisions: AppliedDecisions,
    checks: Checks,
    parallelism: Parallelism,
) -> None:
    """Read the inputs, and check the images of this task's part that are not checked yet."""
    start_or_resume(folder, settings)
    if (folder / "manifest.json").exists():
        return
    part = Part(folder, parallelism.task, parallelism.num_tasks)
    try:
        adopt(part, settings)
        load(part, inputs, read, decisions, Stored(checks.full_check) if checks.in_place else None)
        if not (folder / SPLITS[0]).exists():  # shards are of the images that were accepted before
            retry_rejected(part)
        scan(part, inputs, read.images, checks, parallelism.processes)
    finally:
        is_empty = part.is_empty()
        part.close()
        if is_empty and part.parts == 1:  # an input cannot be read: nothing half-made is left
            shutil.rmtree(folder)


def merge(
    out: Annotated[FolderOrUrl, tyro.conf.Positional],
    max_rejects: float = Checking.max_rejects,
    processes: int = 0,
    work: OptionalFolder = None,
    overwrite: bool = False,
) -> dict:
    """Write the shards, manifest and report of a build that was divided into tasks.

    Args:
        out: The folder or URL that was passed to the tasks as --out.
        max_rejects: Stop if more than this fraction of rows is rejected.
        processes: Worker processes; 0 is one per core.
        work: The folder that was passed to the tasks as --work.
        overwrite: Replace FOLDER if it exists.

    Returns:
        The content of report.json.
    """
    target = target_of(out, work)
    folder = target.work
    if not (folder / SETTINGS).is_file():
        raise UserError(
            f"{folder}: no unfinished build; start one with: python -m data_prep build ... --out"
            f" {target.arguments} --num-tasks N --task I"
        )
    settings = read_settings(folder)
    target.check(overwrite, [*settings["inputs"], settings["read"]["images"]])
    Checking(max_rejects=max_rejects).rules()  # raises for an invalid one
    with full_disk_as_oserror(folder), locked(folder, "building in"):
        return _merge(target, max_rejects, processes or cores())


def _merge(target: LocalTarget | StoreTarget, max_rejects: float, processes: int) -> dict:
    folder = target.work
    if not (folder / "manifest.json").exists():  # else it was killed after the last step but one
        _write_all(target, max_rejects, processes)
    summary = read_json(folder / "report.json", dict, f"delete {folder}, and run the build again")
    work_files = [
        *folder.glob("part-*"),
        *folder.glob("plan.sqlite*"),
        *folder.rglob(".*.partial"),
        folder / "phash.bin",
        folder / SETTINGS,
        folder / LOCK,
    ]
    target.finish(work_files)
    print_report(str(target), summary)
    return summary


def _write_all(target: LocalTarget | StoreTarget, max_rejects: float, processes: int) -> None:
    """Write everything from the checked parts; the manifest comes last, as the mark of a complete folder."""
    folder = target.work
    settings = read_settings(folder)
    inputs, n_parts = list(settings["inputs"]), settings["num_tasks"]
    check_parts(folder, n_parts, settings)
    parts = [Part(folder, number, n_parts, read_only=True) for number in range(n_parts)]
    plan = Plan(folder, parts, Splitting(**settings["split"]), inputs, settings["read"]["images"])
    summary, changed = summarize(plan), ""
    _check_rejects(folder, settings, plan, summary, max_rejects)
    if settings["command"] == "index":
        splits = index_in_place(folder, target.out, plan, settings)
    else:
        try:
            splits = write_shards(target, plan, settings, processes)
        except Changed as error:
            changed = str(error)  # the error itself would keep the parts' tables open
        if changed:
            for opened in (plan, *parts):
                opened.close()
            _start_over(folder, n_parts)
            again = "the same command" if n_parts == 1 else "all tasks, then merge,"
            raise UserError(f"{changed}; run {again} again, to check what has changed")
    write_report(folder, plan, summary, settings)
    write_json(folder / "manifest.json", {**settings, "splits": splits})
    plan.close()
    for part in parts:
        part.close()


def _start_over(folder: Path, n_parts: int) -> None:
    """Let the next command look for changed images; shards may hold other images than it finds."""
    (folder / JOURNAL).unlink(missing_ok=True)
    for split in SPLITS:
        shutil.rmtree(folder / split, ignore_errors=True)
    for number in range(n_parts):
        part = Part(folder, number, n_parts)
        restart(part, json.loads(part.get("settings")), keep=True)
        part.close()


def _check_rejects(folder: Path, settings: dict, plan: Plan, summary: dict, max_rejects: float) -> None:
    """Raise a UserError if too many rows are rejected, or all. What the user asked to drop does not count,
    and neither do rows that repeat others.
    """
    rows, unusable = summary["rows"], summary["unusable"]
    if unusable <= max_rejects * rows and summary["records"]:
        return
    write_rejects(folder / "rejects.csv", plan, list(settings["inputs"]))
    counts = {reason: n for reason, n in summary["reasons"].items() if reason not in HARMLESS or not unusable}
    reasons = "".join(f"\n  {n:8} x {reason}" for reason, n in counts.items())
    first = next(reject for reject in plan.rejects() if reject.reason in counts)
    # in a folder, the line is only the number of the image
    in_folder = first.image and Path(list(settings["inputs"])[first.input]).is_dir()
    place = repr(first.image) if in_folder else f"line {first.line}, {first.image!r}"
    why = ", ".join(filter(None, (first.reason, first.detail)))
    head = f"{unusable} of {counted_rows(summary)} cannot be used ({unusable / rows:.1%}), more than"
    head += f" --max-rejects {max_rejects:g} allows"
    fix = "Fix the input"
    for reason, option in (INVALID_WEIGHT, "--weight-column"), (UNKNOWN_SPLIT, "--split-column"):
        if 2 * counts.get(reason, 0) > rows:
            fix += f", or pass another {option}: most rows have an {reason} there"
    if summary["records"]:
        enough = math.ceil(100 * unusable / rows) / 100
        fix += f", or pass --max-rejects {enough:g} to leave them out"
    elif unusable:
        head = f"none of the {counted_rows(summary)} can be used"
    else:
        head = f"no image is left: all of {counted_rows(summary)} are left out as asked"
        fix = "Leave out less"
    hints = transparent(summary["reasons"], settings["check"]["background"], "pass another --background")
    hints = "".join(f"\n{hint}" for hint in hints)
    raise UserError(
        f"{head}:{reasons}\nthe first is {place}: {why}; all are in {folder / 'rejects.csv'}. {fix}{hints}"
    )
