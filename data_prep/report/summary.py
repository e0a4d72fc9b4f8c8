"""The report of a build: report.json (counts), rejects.csv and leaks.csv (lists), report.html (a page)."""

import json
from collections import Counter
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import numpy as np

from data_prep.atomic import write_json
from data_prep.build.database import select
from data_prep.build.decisions import ACTIONS, Decision, write_decisions
from data_prep.build.feedback import FEEDBACK
from data_prep.build.plan import Plan
from data_prep.build.split import SPLITS
from data_prep.report.warnings import ASKED, HARMLESS, warnings
from data_prep.sheets import write_csv
from data_prep.store.remote import is_url
from data_prep.tables import are, counted
from data_prep.terminal import say

UNUSED, IGNORED = "unused_decisions.csv", "ignored.csv"
SIDES_PX = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class _Ordinal(NamedTuple):
    ordinal: int


def summarize(plan: Plan) -> dict:
    """The content of report.json."""
    reasons = Counter(reject.reason for reject in plan.rejects())
    fixes, extensions, sides, lengths = Counter(), Counter(), Counter(), Counter()
    images, captions = Counter(), Counter()
    members, weights = np.zeros(plan.rows + 1, np.int32), Counter()
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
        if image.weights:
            weights["captions_of_0"] += image.weights.count(0)
            weights["images_of_0_alone"] += not any(image.weights)
    firsts = np.flatnonzero(members)
    largest = int(members.argmax())
    groups_by_code = np.bincount(plan.codes[members > 0], minlength=1 + len(SPLITS))
    groups = {split: int(groups_by_code[code]) for code, split in enumerate(SPLITS, 1)}
    records, rejects = sum(captions.values()), sum(reasons.values())
    assert records + rejects == plan.rows, (records, rejects, plan.rows)
    is_short = any(not images[split] and getattr(plan.splitting, split, 1) for split in SPLITS)
    return {
        "rows": plan.rows,
        "lines": plan.lines,
        "records": records,
        "rejects": rejects,
        "asked": sum(reasons[reason] for reason in ASKED),  # of the rejects
        "unusable": sum(count for reason, count in reasons.items() if reason not in HARMLESS),
        "reasons": dict(reasons.most_common()),
        "ignored": dict(Counter(ignored.reason for ignored in plan.ignored()).most_common()),
        "images": sum(images.values()),
        "groups": sum(groups.values()),
        "fixes": dict(fixes.most_common()),
        "splits": {
            split: {"images": images[split], "captions": captions[split], "groups": groups[split]}
            for split in SPLITS
        },
        "largest_group": {
            "name": plan.group_name(largest) if largest else "",
            "images": int(members[largest]),
            "split": plan.split_of(largest) if largest else "",
        },
        "seed_that_fills_splits": plan.seed_that_fills_splits(firsts.tolist()) if is_short else 0,
        "nonfinite": int(plan.parts[0].get("nonfinite") or 0),  # values of columns that are text for JSON
        "captions_truncated": _count_long_captions(plan),
        "too_common": plan.too_common,
        "most_common": plan.most_common(),
        "weights": dict(weights),
        "leaks": len(plan.leaks()),
        "extensions": dict(extensions.most_common()),
        "shorter_side_px": {str(side): sides[side] for side in sorted(sides)},
        "caption_characters": {str(length): lengths[length] for length in sorted(lengths)},
        "group_images": {
            str(size): int(count) for size, count in enumerate(np.bincount(members)) if size and count
        },
        "decisions": {
            **(decisions := _decision_counts(plan)),
            "unused": len(unused := decisions["unused"]) - (marks := sum(map(_is_mark, unused))),
            "unused_marks": marks,
        },
    }


def _is_mark(cells: list[str]) -> bool:
    return Decision(*cells).note.startswith(FEEDBACK)


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

    summary["warnings"] = warnings(summary, settings)
    write_json(folder / "report.json", summary)
    inputs = list(settings["inputs"])
    write_rejects(folder / "rejects.csv", plan, inputs)
    if summary["ignored"]:
        ignored = ([entry.name, entry.reason, inputs[entry.input]] for entry in plan.ignored())
        write_csv(folder / IGNORED, ["path", "reason", "input"], ignored)
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
    write_csv(folder / "leaks.csv", header, leaks)
    if unused := _decision_counts(plan)["unused"]:
        write_decisions(folder / UNUSED, (Decision(*cells) for cells in unused))
    write_report_page(folder / "report.html", plan, summary, settings)


def write_rejects(path: Path, plan: Plan, inputs: list[str]) -> None:
    """Write every reject with its line, image path, reason, detail, input and caption."""
    rows = (
        [reject.line, reject.image, reject.reason, reject.detail, inputs[reject.input], reject.caption]
        for reject in plan.rejects()
    )
    write_csv(path, ["line", "path", "reason", "detail", "input", "caption"], rows)


def counted_rows(report: dict) -> str:
    """What records and rejects add up to: rows, or pairs where a row has several captions."""
    rows, lines = report["rows"], report["lines"]
    if rows == lines:
        return f"{rows} rows"
    return f"{rows} pairs of image and caption (from {counted(lines, 'row')})"


def print_report(out: str, report: dict) -> None:
    """Print the report in a few lines, what deserves attention, and which file to open next.

    Args:
        out: folder or URL of the build.
    """
    asked = f", {report['asked']} of them as asked" if report["asked"] else ""
    say(f"{counted_rows(report)} = {report['records']} records + {report['rejects']} rejects{asked}")
    for reason, count in report["reasons"].items():
        say(f"  {'left out' if reason in HARMLESS else 'rejected'}: {count} x {reason}")
    for reason, count in report["ignored"].items():
        say(f"  ignored: {count} x {reason}; see {out}/{IGNORED}")
    for fix, count in report["fixes"].items():
        say(f"  fixed: {count} x {fix}")
    if report["nonfinite"]:
        say(f"  {report['nonfinite']} values of other columns are NaN or Infinity, stored as text")
    if weights := report["weights"]:
        captions, images = counted(weights["captions_of_0"], "caption"), weights["images_of_0_alone"]
        say(f"  weights: {captions} of 0, which teach nothing; {counted(images, 'image')} with no other")
    if any(report["decisions"].values()):
        applied = ", ".join(f"{report['decisions'][action]} {action}" for action in ACTIONS)
        present = report["decisions"]["present"]
        known = f"; {counted(present, 'caption')} to add {are(present)} there already" if present else ""
        say(f"  decisions applied: {applied}{known}")
    if marks := report["decisions"]["unused_marks"]:
        say(f"  {counted(marks, 'mark')} of --feedback changed nothing; {out}/{UNUSED} lists them")
    for split, counts in report["splits"].items():
        say(
            f"  {split:5} {counted(counts['images'], 'image')}, {counted(counts['captions'], 'caption')},"
            f" {counted(counts['groups'], 'group')}"
        )
    for warning in report["warnings"]:
        say(f"warning: {warning}")
    lists = {"rejects.csv": report["rejects"], "leaks.csv": report["leaks"]}
    listed = "".join(f"; {name} lists {count}" for name, count in lists.items() if count)
    page = f"{out}/report.html"
    said = f"the report is {page}" if is_url(page) else f"open {quote(page)}"
    say(f"{said}{listed}")
