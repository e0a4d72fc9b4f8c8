"""The report of a build: report.json (counts), rejects.csv and leaks.csv (lists), report.html (a page)."""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.atomic import atomic_file, write_json
from data_prep.build.database import select
from data_prep.build.decisions import ACTIONS, Decision, write_decisions
from data_prep.build.plan import Plan
from data_prep.build.split import SPLITS

UNUSED, IGNORED = "unused_decisions.csv", "ignored.csv"
SIDES_PX = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class _Ordinal(NamedTuple):
    ordinal: int


def summarize(plan: Plan) -> dict:
    """The content of report.json."""
    reasons = Counter(reject.reason for reject in plan.rejects())
    fixes, extensions, sides, lengths = Counter(), Counter(), Counter(), Counter()
    images, captions = Counter(), Counter()
    members = np.zeros(plan.rows + 1, np.int32)
    for image in plan.images():
        images[image.split] += 1
        captions[image.split] += len(image.captions)
        members[image.group] += 1
        extensions[image.extension] += 1
        if image.width:
            sides[max(side for side in SIDES_PX if side <= max(8, min(image.width, image.height)))] += 1
        for caption in image.captions:
            lengths[10 * (len(caption) // 10)] += 1
        fixes.update(image.fixes)
    groups_by_code = np.bincount(plan.codes[members > 0], minlength=1 + len(SPLITS))
    groups = {split: int(groups_by_code[code]) for code, split in enumerate(SPLITS, 1)}
    records, rejects = sum(captions.values()), sum(reasons.values())
    assert records + rejects == plan.rows, (records, rejects, plan.rows)
    return {
        "rows": plan.rows,
        "records": records,
        "rejects": rejects,
        "reasons": dict(reasons.most_common()),
        "ignored": dict(Counter(ignored.reason for ignored in plan.ignored()).most_common()),
        "images": sum(images.values()),
        "groups": sum(groups.values()),
        "fixes": dict(fixes.most_common()),
        "splits": {
            split: {"images": images[split], "captions": captions[split], "groups": groups[split]}
            for split in SPLITS
        },
        "captions_truncated": _count_long_captions(plan),
        "too_common": plan.too_common,
        "leaks": len(plan.leaks()),
        "extensions": dict(extensions.most_common()),
        "shorter_side_px": {str(side): sides[side] for side in sorted(sides)},
        "caption_characters": {str(length): lengths[length] for length in sorted(lengths)},
        "group_images": {
            str(size): int(count) for size, count in enumerate(np.bincount(members)) if size and count
        },
        "decisions": {**(decisions := _decision_counts(plan)), "unused": len(decisions["unused"])},
    }


def _count_long_captions(plan: Plan) -> int:
    """Captions of included images that are longer than the model can read."""
    excluded = {reject.ordinal for reject in select(plan.db, _Ordinal, "FROM rejects")}
    query = "FROM long_captions WHERE ordinal NOT IN (SELECT ordinal FROM rejects)"
    return sum(
        caption.ordinal not in excluded for part in plan.parts for caption in select(part.db, _Ordinal, query)
    )


def _decision_counts(plan: Plan) -> dict:
    """See AppliedDecisions.counts. Every part reads all rows, so all parts have the same counts."""
    return json.loads(plan.parts[0].get("decisions"))


def write_report(folder: Path, plan: Plan, summary: dict, settings: dict) -> None:
    """Write report.json, rejects.csv, ignored.csv, leaks.csv and report.html."""
    from data_prep.report.page import write_report_page  # imports jinja2, which no other step needs

    write_json(folder / "report.json", summary)
    inputs = list(settings["inputs"])
    write_rejects(folder / "rejects.csv", plan, inputs)
    if summary["ignored"]:
        ignored = ([entry.name, entry.reason, inputs[entry.input]] for entry in plan.ignored())
        _write_csv(folder / IGNORED, ["path", "reason", "input"], ignored)
    leaks = (
        [
            plan.row(leak.a)[1].image,
            plan.split_of(leak.a),
            plan.row(leak.b)[1].image,
            plan.split_of(leak.b),
            f"{leak.difference:.4f}",
        ]
        for leak in plan.leaks()
    )
    header = ["image", "split", "near_identical_image", "its_split", "difference"]
    _write_csv(folder / "leaks.csv", header, leaks)
    if unused := _decision_counts(plan)["unused"]:
        write_decisions(folder / UNUSED, (Decision(*cells) for cells in unused))
    write_report_page(folder / "report.html", plan, summary, settings)


def write_rejects(path: Path, plan: Plan, inputs: list[str]) -> None:
    """Write every reject with its line, image path, reason, detail and input."""
    rows = (
        [reject.line, reject.image, reject.reason, reject.detail, inputs[reject.input]]
        for reject in plan.rejects()
    )
    _write_csv(path, ["line", "path", "reason", "detail", "input"], rows)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    with atomic_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def print_report(out: Path, report: dict, splitting: dict) -> None:
    """Print the report in a few lines, and which file to open next.

    Args:
        splitting: the options of Splitting, as in the manifest.
    """
    print(f"{report['rows']} rows = {report['records']} records + {report['rejects']} rejects")
    for reason, count in report["reasons"].items():
        print(f"  rejected: {count} x {reason}")
    for reason, count in report["ignored"].items():
        print(f"  ignored: {count} x {reason}; see {out / IGNORED}")
    for fix, count in report["fixes"].items():
        print(f"  fixed: {count} x {fix}")
    if any(report["decisions"].values()):
        print(
            "  decisions applied: "
            + ", ".join(f"{report['decisions'][action]} {action}" for action in ACTIONS)
        )
    if unused := report["decisions"]["unused"]:
        print(
            f"  {unused} decisions match no image or caption of the inputs, and were not applied; see"
            f" {out / UNUSED}"
        )
    if report["captions_truncated"]:
        print(
            f"  {report['captions_truncated']} captions are longer than the context length, and will be"
            " truncated"
        )
    for split, counts in report["splits"].items():
        print(
            f"  {split:5} {counts['images']} images, {counts['captions']} captions, {counts['groups']} groups"
        )
        if not counts["images"] and splitting.get(split, 1):
            fix = "lower --val and --test" if split == SPLITS[0] else f"raise --{split}"
            print(f"        {split} is empty because there are few groups; {fix} or change --seed")
    if report["leaks"]:
        action = (
            "the image of the earlier split was dropped"
            if splitting["drop_leaks"]
            else "pass --drop-leaks to drop the image of the earlier split"
        )
        print(
            f"  {report['leaks']} pairs of near-identical images are in different splits, listed in"
            f" {out / 'leaks.csv'}; {action}"
        )
    rejects = f"; all rejects are in {out / 'rejects.csv'}" if report["rejects"] else ""
    print(f"open {out / 'report.html'}{rejects}")
