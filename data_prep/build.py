"""The pipeline from a CSV to shards.

read_rows -> pair -> check every image (in parallel) -> split by group -> shards, manifest, report
"""

import csv as csv_module
import hashlib
import json
import multiprocessing
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated

import PIL
import tyro
import webdataset

from data_prep.atomic import atomic_folder, check_replaceable
from data_prep.errors import UserError
from data_prep.images import MAX_PIXELS, BadImage, CheckedImage, check, parse_color
from data_prep.progress import progress
from data_prep.records import Picture, Reject, pair, read_rows
from data_prep.shards import FORMAT, Sample, sha256_of, write_shard
from data_prep.split import SPLITS, group_id, split_of


def build(
    csv: Annotated[Path, tyro.conf.Positional],
    out: Path,
    image_column: str,
    caption_column: str,
    group_column: str = "",
    images: Path | None = None,
    delimiter: str = ",",
    encoding: str = "utf-8-sig",
    background: str = "white",
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    images_per_shard: int = 1000,
    max_pixels: int = MAX_PIXELS,
    processes: int | None = None,
    overwrite: bool = False,
) -> dict:
    """Check every image of a CSV and write train, val and test shards, with a manifest and a report.

    Args:
        csv: The CSV: one row per caption; rows with the same image are captions of one image.
        out: Folder to write; it appears when everything is whole.
        image_column: Column of image paths.
        caption_column: Column of captions.
        group_column: Column that joins images that show the same thing; a group is never split over train and val.
        images: Folder that image paths are relative to, and may not leave; by default the CSV's own.
        delimiter: Between the cells of a row.
        encoding: Of the CSV, as Python names it: utf-8, latin-1, utf-16.
        background: Color put behind transparent images.
        val: Fraction of groups for validation.
        test: Fraction of groups for the final test.
        seed: Another number makes another split.
        images_per_shard: Images in one tar.
        max_pixels: Larger images are rejected, judged by their header.
        processes: Worker processes for the image checks; by default one per core.
        overwrite: Replace `out` if it is there and was made by this command.

    Returns:
        What report.json holds.
    """
    check_replaceable(out, "manifest.json", overwrite)
    if min(val, test) < 0 or val + test >= 1:
        raise UserError(f"--val {val} and --test {test}: fractions that leave something for train are wanted")
    if images_per_shard < 1:
        raise UserError(f"--images-per-shard {images_per_shard}: at least 1 is wanted")
    check_one = partial(_check_file, background=parse_color(background), max_pixels=max_pixels)
    rows = read_rows(csv, image_column, caption_column, group_column, delimiter, encoding)
    pictures, rejects = pair(rows, images or csv.parent)
    pictures.sort(key=_key)  # keys are hashes, so this mixes the shards, and the same way every time

    fixes, groups = Counter(), {split: set() for split in SPLITS}
    with atomic_folder(out) as folder:
        writers = {split: _SplitWriter(folder / split, images_per_shard) for split in SPLITS}
        for picture, checked in zip(pictures, _checked(check_one, pictures, processes), strict=True):
            if isinstance(checked, BadImage):
                rejects += [Reject(row.line, row.image, checked.reason, checked.detail) for row in picture.rows]
                continue
            split = split_of(picture.group, val, test, seed)
            writers[split].add(_sample(picture, checked), group_id(picture.group), checked.extension)
            fixes.update(checked.fixes)
            groups[split].add(picture.group)
        entries = {split: writer.close() for split, writer in writers.items()}
        rejects.sort(key=lambda reject: reject.line)
        summary = _summarize(csv, len(rows), rejects, fixes, groups, entries)
        options = {
            "image_column": image_column,
            "caption_column": caption_column,
            "group_column": group_column,
            "delimiter": delimiter,
            "encoding": encoding,
            "background": background,
            "val": val,
            "test": test,
            "seed": seed,
            "images_per_shard": images_per_shard,
            "max_pixels": max_pixels,
        }
        manifest = {
            "format": FORMAT,
            "input_sha256": sha256_of(csv),
            "options": options,
            "versions": {"pillow": PIL.__version__, "webdataset": webdataset.__version__},
            "splits": entries,
        }
        _write_json(folder / "manifest.json", manifest)
        _write_json(folder / "report.json", summary)
        with open(folder / "rejects.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv_module.writer(file)
            writer.writerow(["line", "path", "reason", "detail"])
            writer.writerows([reject.line, reject.image, reject.reason, reject.detail] for reject in rejects)
    _print_report(out, summary)
    return summary


def _summarize(csv: Path, n_rows: int, rejects: list[Reject], fixes: Counter, groups: dict[str, set], entries: dict[str, dict]) -> dict:
    """What report.json holds; a build that nothing came out of is refused, with the reasons."""
    reasons = Counter(reject.reason for reject in rejects)
    records = sum(entry["captions"] for entry in entries.values())
    assert records + len(rejects) == n_rows, (records, len(rejects), n_rows)
    if not records:
        first = rejects[0]
        raise UserError(
            f"{csv}: none of its {n_rows} rows can be used: "
            + ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
            + f"; the first is line {first.line}, {first.image!r}: {first.reason}, {first.detail}".rstrip(", ")
        )
    return {
        "rows": n_rows,
        "records": records,
        "rejects": len(rejects),
        "reasons": dict(reasons.most_common()),
        "images": sum(entry["samples"] for entry in entries.values()),
        "groups": sum(len(names) for names in groups.values()),
        "fixes": dict(fixes.most_common()),
        "splits": {
            split: {"images": entry["samples"], "captions": entry["captions"], "groups": len(groups[split])}
            for split, entry in entries.items()
        },
    }


def _check_file(picture: Picture, background: tuple[int, int, int], max_pixels: int) -> CheckedImage | BadImage:
    try:
        return check(picture.path.read_bytes(), background, max_pixels)
    except BadImage as bad:
        return bad
    except OSError as error:
        return BadImage("unreadable file", os.strerror(error.errno or 0))


def _checked(check_one, pictures: list[Picture], processes: int | None):
    """check_one of each picture, in order, whatever the number of processes."""
    processes = processes or os.cpu_count() or 1
    bar = partial(progress, total=len(pictures), desc="checking images", unit="image")
    if processes == 1:
        yield from bar(map(check_one, pictures))
        return
    with multiprocessing.Pool(processes) as pool:
        yield from bar(pool.imap(check_one, pictures, chunksize=16))


def _key(picture: Picture) -> str:
    return hashlib.blake2b(picture.rows[0].image.encode(), digest_size=8).hexdigest()


def _sample(picture: Picture, checked: CheckedImage) -> Sample:
    meta = {
        "key": _key(picture),
        "image": picture.rows[0].image,
        "captions": picture.captions,
        "group": picture.group,
        "width": checked.width,
        "height": checked.height,
        "sha256": hashlib.sha256(checked.data).hexdigest(),
    }
    return Sample(meta["key"], checked.data, picture.captions, meta)


class _SplitWriter:
    """Collects the samples of one split and writes a shard whenever one is full."""

    def __init__(self, folder: Path, images_per_shard: int):
        self.folder, self.images_per_shard = folder, images_per_shard
        self.pending: list[tuple[Sample, int, str]] = []
        self.shards: list[dict] = []
        self.captions = 0
        folder.mkdir()

    def add(self, sample: Sample, group: int, extension: str) -> None:
        self.pending.append((sample, group, extension))
        self.captions += len(sample.captions)
        if len(self.pending) == self.images_per_shard:
            self._flush()

    def _flush(self) -> None:
        samples, groups, extensions = zip(*self.pending, strict=True)
        path = self.folder / f"{self.folder.name}-{len(self.shards):06d}.tar"
        self.shards.append(write_shard(path, samples, groups, extensions))
        self.pending.clear()

    def close(self) -> dict:
        if self.pending:
            self._flush()
        return {"samples": sum(shard["samples"] for shard in self.shards), "captions": self.captions, "shards": self.shards}


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _print_report(out: Path, report: dict) -> None:
    print(f"{report['rows']} rows = {report['records']} records + {report['rejects']} rejects")
    for reason, count in report["reasons"].items():
        print(f"  rejected: {count} x {reason} (each is listed in {out / 'rejects.csv'})")
    for fix, count in report["fixes"].items():
        print(f"  put right: {count} x {fix}")
    for split, counts in report["splits"].items():
        print(f"  {split:5} {counts['images']} images, {counts['captions']} captions, {counts['groups']} groups")
        if not counts["images"]:
            print(f"        no group fell into {split}: there are few groups; a larger --{split} or another --seed helps")
    print(f"shards and report.json are in {out}")
