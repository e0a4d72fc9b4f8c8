"""The data of benchmarks.quality, that anyone can make: icons of some fonts to know, icons of other fonts to
learn, and questions.

    domain A   trains the base: Font Awesome, Material Design, Elusive, Codicons, Tabler, Lucide, Bootstrap
    domain B   is fine-tuned on: Phosphor (five styles of each icon), Remix (two)
    questions  synonyms of test icons of B: of no icon the caption, and half of them part of none; those words
        only the base can know

Fonts come with the package qtawesome and with npm packages, synonyms with npm packages.
"""

import csv
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.quality_icons import Synonyms, drawn, fetch, synonyms, table
from data_prep.atomic import atomic_file
from data_prep.build.split import split_of
from data_prep.errors import Fault
from data_prep.icons import FONTS
from data_prep.shards import Shards

DOMAIN_B = ("phosphor", "remixicon")
STYLES = {font: FONTS[font] for font in DOMAIN_B} | {"tabler": {"filled"}}
SPLITS = {"A": {"val": 0.05, "test": 0.1}, "B": {"val": 0.1, "test": 0.3}}
HELD_OUT = 0.5  # of the synonyms of B: only asked for, never trained on; the others are, with other icons


def make(out: Path, packages: Path | None, limit: int = 0) -> None:
    """Write the shards OUT/A and OUT/B and OUT/questions.jsonl, or leave them as they are.

    Args:
        packages: folder of npm packages (.tgz); else npm fetches them, to OUT/packages.
        limit: icons to take; 0 for all.

    Raises:
        UserError: the packages are not there and cannot be fetched.
    """
    if (out / "questions.jsonl").is_file():
        return
    packages, icons = packages or fetch(out / "packages"), out / "icons"
    known = synonyms(packages)
    call("data_prep", "icons", "--out", icons, "--limit", limit, "--overwrite")
    rows = table(icons / "icons.csv") + drawn(packages, icons, limit // 8)
    for domain in SPLITS:
        with open(out / f"{domain}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "caption", "group", "split"])
            writer.writerows(captioned(rows, known, domain))
        columns = [
            word
            for name, column in (("image", "file"), *((each, each) for each in ("caption", "group", "split")))
            for word in (f"--{name}-column", column)
        ]
        places = ["--out", out / domain, "--images", icons, "--overwrite"]
        call("data_prep", "build", out / f"{domain}.csv", *places, *columns)
    captions = {caption for split in ("train", "val", "test") for caption in captions_of(out / "B", split)}
    asked = questions(rows, known, captions)
    with atomic_file(out / "questions.jsonl") as partial:
        partial.write_text(
            "".join(json.dumps({"text": text, "keys": keys}) + "\n" for text, keys in asked.items())
        )


def captioned(rows: list[dict], known: Synonyms, domain: str) -> Iterable[tuple[str, str, str, str]]:
    """(file, caption, group, split) of a domain: an icon's own names, and in train one more, its name and its
    synonyms, by commas.

    Args:
        rows: of icons.csv.
    """
    by_group = synonyms_of_groups(rows, known, domain)
    done = set()
    for row in rows:
        if (row["set"] in DOMAIN_B) == (domain == "B"):
            split = split_of(row["group"], **SPLITS[domain], seed="AB".index(domain))
            yield row["file_path"], row["caption"], row["group"], split
            words = [
                word for word in by_group.get(row["group"], ()) if domain == "A" or not is_held_out(word)
            ]
            if split == "train" and words and row["file_path"] not in done:
                yield row["file_path"], ", ".join((concept(row), *words)), row["group"], split
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
        if row["set"] in DOMAIN_B and split_of(row["group"], **SPLITS["B"], seed=1) == "test":
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
        if (row["set"] in DOMAIN_B) == (domain == "B"):
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
