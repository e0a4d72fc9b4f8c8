"""The data of benchmarks.quality, that anyone can make, on two grounds.

    icons    domain A, which trains the base: Font Awesome, Material Design, Elusive, Codicons, Tabler,
             Lucide, Bootstrap; domain B, which is fine-tuned on: Phosphor (five styles of each icon), Remix
             (two)
    clipart  images in colour. A: those icons, and two fifths of Openclipart's and Tux Paint's names; B: the
             other names, and the icon theme Oxygen in three sizes
    questions  synonyms and keywords of test images of B: of no image the caption, and half of them part of
             none; those words only the base can know

Captions are of two kinds, an icon's name and its name with synonyms.

Fonts come with the package qtawesome and npm packages, synonyms with npm packages, clip art with Debian's.
"""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from benchmarks.quality_clipart import colour_images, unpack
from benchmarks.quality_icons import Synonyms, drawn, fetch, synonyms, table, write_table
from data_prep.atomic import atomic_file
from data_prep.build.split import split_of
from data_prep.errors import Fault
from data_prep.icons import FONTS
from data_prep.shards import Shards

Ground = Literal["icons", "clipart"]
DOMAIN_B = ("phosphor", "remixicon")
STYLES = {font: FONTS[font] for font in DOMAIN_B} | {"tabler": {"filled"}}
COLUMNS = ["file", "name", "synonyms", "group", "split"]  # of a domain's table
SPLITS = {"A": {"val": 0.05, "test": 0.1}, "B": {"val": 0.1, "test": 0.3}}
WEIGHTED = "B-weighted"  # B's shards, with weights of which each group has the same sum
HELD_OUT = 0.5  # of the synonyms of B: only asked for, never trained on; the others are, with other icons


def make(out: Path, packages: Path | None, limit: int = 0, ground: Ground = "icons") -> None:
    """Write the shards OUT/A and OUT/B and OUT/questions.jsonl, or leave them as they are.

    Args:
        packages: folder of npm packages (.tgz) and of Debian's (.deb); else npm and apt-get fetch them, to
            OUT/packages.
        limit: icons to take; 0 for all.

    Raises:
        UserError: the packages are not there and cannot be fetched.
    """
    if (out / "questions.jsonl").is_file():
        return
    packages, icons = packages or fetch(out / "packages"), out / "icons"
    known = synonyms(packages)
    shutil.rmtree(icons, ignore_errors=True)  # of a call that was interrupted; others draw into it too
    call("data_prep", "icons", "--out", icons, "--limit", limit)
    rows = table(icons / "icons.csv") + drawn(packages, icons, limit // 8)
    rows = [row | {"domain": "B" if row["set"] in DOMAIN_B else "A"} for row in rows]
    if ground == "clipart":
        coloured, keywords = colour_images(unpack(packages, out))
        known_icons = [
            row | {"file_path": f"icons/{row['file_path']}"} for row in rows if row["domain"] == "A"
        ]
        rows = known_icons + coloured[:: 12 if limit else 1]
        known |= keywords
    for domain in SPLITS:
        with open(out / f"{domain}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(captioned(rows, known, domain))
        build(out, domain, ground)
    captions = {caption for split in ("train", "val", "test") for caption in captions_of(out / "B", split)}
    asked = questions(rows, known, captions)
    with atomic_file(out / "questions.jsonl") as partial:
        partial.write_text(
            "".join(json.dumps({"text": text, "keys": keys}) + "\n" for text, keys in asked.items())
        )


def build(out: Path, name: str, ground: Ground, *more: str) -> None:
    """Make the shards OUT/NAME of the table OUT/NAME.csv."""
    places = ["--images", out / "icons"]
    if ground == "clipart":
        # One image under two names is in two groups, so it may be in two splits: rejected, as are huge ones.
        places = ["--images", out, "--resize-px", 64, "--max-rejects", 0.02]
    columns = ["--image-column", "file", "--caption-column", "name,synonyms", "--group-column", "group"]
    columns += ["--split-column", "split", *more]
    call("data_prep", "build", out / f"{name}.csv", "--out", out / name, "--overwrite", *places, *columns)


def weigh(out: Path, ground: Ground) -> None:
    """Make the shards OUT/B-weighted of the table of B, where they are missing: each image weighs 1 / the
    images of its group.
    """
    if (out / WEIGHTED).is_dir():
        return
    rows = table(out / "B.csv")
    images = Counter(group for _, group in {(row["file"], row["group"]) for row in rows})
    weighted = (row | {"weight": 1 / images[row["group"]]} for row in rows)
    write_table(out / f"{WEIGHTED}.csv", [*COLUMNS, "weight"], weighted)
    build(out, WEIGHTED, ground, "--weight-column", "weight")


def captioned(rows: list[dict], known: Synonyms, domain: str) -> Iterable[tuple[str, str, str, str, str]]:
    """COLUMNS of a domain: an icon's own names, and in train its name and its synonyms, by commas; "" where
    there are none.

    Args:
        rows: of icons.csv.
    """
    by_group = synonyms_of_groups(rows, known, domain)
    done = set()
    for row in rows:
        if row["domain"] == domain:
            split = split_of(row["group"], **SPLITS[domain], seed="AB".index(domain))
            words = [
                word for word in by_group.get(row["group"], ()) if domain == "A" or not is_held_out(word)
            ]
            has_more = split == "train" and words and row["file_path"] not in done
            more = ", ".join((concept(row), *words)) if has_more else ""
            yield row["file_path"], row["caption"], more, row["group"], split
            done.add(row["file_path"])


def questions(rows: list[dict], known: Synonyms, captions: set[str]) -> dict[str, list[str]]:
    """Synonym -> images of B's test split that it means.

    Args:
        captions: all of B; what is one of them is not asked, nor what is held out and part of one.
    """
    by_group = synonyms_of_groups(rows, known, "B")
    parts = {part for caption in captions for part in caption.split(", ")}
    asked: dict[str, list[str]] = {}
    for row in rows:
        if row["domain"] == "B" and split_of(row["group"], **SPLITS["B"], seed=1) == "test":
            for word in by_group.get(row["group"], ()):
                if word not in captions and not (is_held_out(word) and word in parts):
                    asked.setdefault(word, []).append(row["file_path"])
    return asked


def is_held_out(word: str) -> bool:
    """Whether a synonym is only asked for: by its own hash, so in every icon that has it."""
    return (
        int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8, key=b"held out").digest(), "big")
        < HELD_OUT * 2**64
    )


def synonyms_of_groups(rows: list[dict], known: Synonyms, domain: str) -> dict[str, list[str]]:
    """Group -> the synonyms of its members in this domain, each once, without its names."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["domain"] == domain:
            found.setdefault(row["group"], {}).update(
                dict.fromkeys(known.get((row["set"], concept(row)), ()))
            )
    names = {(row["group"], row["caption"]) for row in rows}
    return {group: [word for word in words if (group, word) not in names] for group, words in found.items()}


def concept(row: dict) -> str:
    """An icon's name without its style, as its synonyms are listed: "airplane bold" -> "airplane"."""
    words = row["caption"].split()
    while len(words) > 1 and words[-1] in STYLES.get(row["set"], ()):
        words.pop()
    return " ".join(words)


def captions_of(shards: Path, split: str) -> set[str]:
    found = Shards(shards, split)
    return {caption for number in range(len(found)) for caption in found.captions(number)}


def call(*words) -> None:
    """Run one of the project's commands, quietly.

    Raises:
        Fault: it failed; the end of what it said is shown.
    """
    command = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Fault(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-2000:]}")
