"""Wrong captions for benchmarks.quality: B with captions of training images exchanged, and B after a review
of what `eval suspects` lists.
"""

from pathlib import Path

import numpy as np

from benchmarks import quality_data
from benchmarks.quality_data import COLUMNS, call
from benchmarks.quality_icons import table, write_table

SHARES = (5, 20)  # percent of the training images
LOOKED_AT = 2  # images that are reviewed, for each wrong one
WRONG, REVIEWED = "B-wrong-{}", "B-reviewed-{}"  # shards and their tables
PLACES = [name.format(share) for share in SHARES for name in (WRONG, REVIEWED)]


def make(out: Path, ground: quality_data.Ground) -> None:
    """Make the shards of PLACES, where they are missing.

    OUT/B-wrong-5: 5 % of the training images of B have each other's captions, drawn with a fixed seed.
    OUT/B-reviewed-5: the same without the wrong images among the first of the list of suspects that the base
    makes of B-wrong-5, of which twice as many are looked at as are wrong.
    """
    for share in SHARES:
        wrong_name, reviewed_name = WRONG.format(share), REVIEWED.format(share)
        rows, wrong = exchanged(table(out / "B.csv"), share / 100)
        if not (out / wrong_name).is_dir():
            write_table(out / f"{wrong_name}.csv", COLUMNS, rows)
            quality_data.build(out, wrong_name, ground)
        if not (out / reviewed_name).is_dir():
            listed = out / f"suspects-{share}.csv"
            base = f"local-dir:{out / 'base' / 'model'}"
            most = 3 * LOOKED_AT * len(wrong)  # of pairs; an image has up to three
            words = ["--data", out / wrong_name, "--csv", listed, "--most", most]
            call("eval", "suspects", base, *words)
            rows_listed = [row for row in table(listed) if row["reason"] == "does not fit"]
            seen = list(dict.fromkeys(row["image"] for row in rows_listed))[: LOOKED_AT * len(wrong)]
            found = wrong.intersection(seen)
            print(f"{share} %: {len(wrong)} wrong, {len(seen)} looked at, {len(found)} found", flush=True)
            kept = [row for row in rows if row["file"] not in found]
            write_table(out / f"{reviewed_name}.csv", COLUMNS, kept)
            quality_data.build(out, reviewed_name, ground)


def exchanged(rows: list[dict], share: float) -> tuple[list[dict], set[str]]:
    """The rows of a table of captions in which `share` of the training images, one of a group at most, have
    each other's captions; and the files of those.
    """
    captions: dict[str, list[dict]] = {}
    for row in rows:
        if row["split"] == "train":
            captions.setdefault(row["file"], []).append(row)
    files = np.random.default_rng(0).permutation(list(captions)).tolist()
    of_group = {captions[file][0]["group"]: file for file in files}
    drawn = list(of_group.values())[: round(share * len(files))]
    changed = [row for row in rows if row["file"] not in {*drawn}]
    for file, other in zip(drawn, np.roll(drawn, 1).tolist(), strict=True):
        own = {column: captions[file][0][column] for column in ("file", "group", "split")}
        changed += [row | own for row in captions[other]]
    return changed, set(drawn)
