"""What a build made of its rows: report.json to count by, rejects.csv and leaks.csv to look up, report.html
to look at.
"""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np

from data_prep.atomic import atomic_file
from data_prep.build.decisions import WANTS, Decision, write_decisions
from data_prep.build.plan import Plan
from data_prep.build.split import SPLITS
from data_prep.report.page import write_page

UNUSED = "unused_decisions.csv"
SIDES_PX = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def summarize(plan: Plan) -> dict:
    """What report.json holds."""
    reasons: Counter = Counter(reason for _, _, _, reason, _ in plan.rejects())
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
        if image.fixes:
            fixes.update(image.fixes.split("\n"))
    of_groups = np.bincount(plan.codes[members > 0], minlength=1 + len(SPLITS))
    groups = {split: int(of_groups[1 + at]) for at, split in enumerate(SPLITS)}
    records, rejects = sum(captions.values()), sum(reasons.values())
    assert records + rejects == plan.rows, (records, rejects, plan.rows)
    unread = {ordinal for (ordinal,) in plan.db.execute("SELECT ordinal FROM rejects")}
    query = "SELECT ordinal FROM cut WHERE ordinal NOT IN (SELECT ordinal FROM rejects)"
    cut = sum(ordinal not in unread for part in plan.parts for (ordinal,) in part.db.execute(query))
    return {
        "rows": plan.rows,
        "records": records,
        "rejects": rejects,
        "reasons": dict(reasons.most_common()),
        "images": sum(images.values()),
        "groups": sum(groups.values()),
        "fixes": dict(fixes.most_common()),
        "splits": {
            split: {"images": images[split], "captions": captions[split], "groups": groups[split]}
            for split in SPLITS
        },
        "captions_cut": cut,
        "shared_by_too_many": plan.common,
        "leaks": len(plan.leaks()),
        "extensions": dict(extensions.most_common()),
        "shorter_side_px": {str(side): sides[side] for side in sorted(sides)},
        "caption_characters": {str(length): lengths[length] for length in sorted(lengths)},
        "group_images": {
            str(size): int(count) for size, count in enumerate(np.bincount(members)) if size and count
        },
        "decisions": {**(decided := _decided(plan)), "unused": len(decided["unused"])},
    }


def _decided(plan: Plan) -> dict:
    """See data_prep.build.decisions.Decided.counts; every part read all rows, so all say the same."""
    return json.loads(plan.parts[0].get("decided"))


def write_report(folder: Path, plan: Plan, summary: dict, begun: dict) -> None:
    """Write report.json, rejects.csv, leaks.csv and report.html."""
    write_json(folder / "report.json", summary)
    write_rejects(folder / "rejects.csv", plan, list(begun["inputs"]))
    with (
        atomic_file(folder / "leaks.csv") as partial,
        open(partial, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["image", "split", "near_identical_image", "its_split", "difference"])
        for a, b, difference in plan.leaks():
            writer.writerow(
                [
                    plan.image_of(a)[2],
                    plan.split_of(a),
                    plan.image_of(b)[2],
                    plan.split_of(b),
                    f"{difference:.4f}",
                ]
            )
    if unused := _decided(plan)["unused"]:
        write_decisions(folder / UNUSED, (Decision(*each) for each in unused))
    write_page(folder / "report.html", plan, summary, begun)


def write_rejects(path: Path, plan: Plan, inputs: list[str]) -> None:
    """Write every reject with its line, path, reason and detail, and the input that the line is of."""
    with atomic_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["line", "path", "reason", "detail", "input"])
        writer.writerows(
            [line, image, reason, detail, inputs[at]] for at, line, image, reason, detail in plan.rejects()
        )


def write_json(path: Path, value: dict) -> None:
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def print_report(out: Path, report: dict, splitting: dict) -> None:
    """The report in a few lines, with what to open next."""
    print(f"{report['rows']} rows = {report['records']} records + {report['rejects']} rejects")
    for reason, count in report["reasons"].items():
        print(f"  rejected: {count} x {reason}")
    for fix, count in report["fixes"].items():
        print(f"  put right: {count} x {fix}")
    if any(report["decisions"].values()):
        print(
            "  decisions applied: " + ", ".join(f"{report['decisions'][action]} {action}" for action in WANTS)
        )
    if unused := report["decisions"]["unused"]:
        print(
            f"  {unused} decisions fit no image or caption of the inputs, and changed nothing; they are in"
            f" {out / UNUSED}"
        )
    if report["captions_cut"]:
        print(f"  {report['captions_cut']} captions are longer than the model can read, and will be cut")
    for split, counts in report["splits"].items():
        print(
            f"  {split:5} {counts['images']} images, {counts['captions']} captions, {counts['groups']} groups"
        )
        if not counts["images"] and splitting.get(split, 1):
            print(
                f"        no group fell into {split}: there are few groups; a larger --{split} or another"
                " --seed helps"
            )
    if report["leaks"]:
        what = (
            "the earlier one is left out"
            if splitting["drop_leaks"]
            else "--drop-leaks True would leave one out"
        )
        print(
            f"  {report['leaks']} pairs of near-identical images were in different splits, listed in"
            f" {out / 'leaks.csv'}; {what}"
        )
    print(
        f"look at {out / 'report.html'}"
        + (f"; each reject is in {out / 'rejects.csv'}" if report["rejects"] else "")
    )
