"""The data of benchmarks.quality, that anyone can make: icons of some fonts to know, icons of other fonts to learn, and questions.

    domain A   Font Awesome, Material Design, Elusive, Codicons    what the base model is trained on, and should not forget
    domain B   Phosphor (five styles of each icon), Remix (two)    what it is fine-tuned on
    questions  synonyms of test icons of B: of no icon the caption, and half of them part of none; those words only the base can know

Names come with the fonts; synonyms with the npm packages of three of them, in the versions that the fonts have.
"""

import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

from data_prep.atomic import atomic_file
from data_prep.errors import Fault, UserError
from data_prep.icons import FONTS
from data_prep.shards import Shards
from data_prep.split import split_of

DOMAIN_B = ("phosphor", "remixicon")
SPLITS = {"A": {"val": 0.05, "test": 0.1}, "B": {"val": 0.1, "test": 0.3}}
HELD_OUT = 0.5  # of the synonyms of B: only asked for, never trained on; the others are, with other icons
PACKAGES = {  # npm package -> version, file, and icons in it, about
    "@fortawesome/fontawesome-free": ("6.7.2", "package/metadata/icon-families.json", 1800),
    "@mdi/svg": ("6.9.96", "package/meta.json", 6900),
    "@phosphor-icons/core": ("2.1.1", "package/dist/index.mjs", 1500),
}
Synonyms = dict[tuple[str, str], list[str]]  # domain and name of an icon -> other words for it


def make(out: Path, icons: Path | None, packages: Path | None, limit: int = 0) -> None:
    """Write the shards OUT/A and OUT/B and OUT/questions.jsonl, or leave them as they are.

    Args:
        icons: made by python -m data_prep icons; else it is drawn, to OUT/icons.
        packages: folder of npm packages (.tgz); else npm fetches them, to OUT/packages.
        limit: icons to take; 0 for all.

    Raises:
        UserError: the packages are not there and cannot be fetched.
    """
    if (out / "questions.jsonl").is_file():
        return
    known = synonyms(packages or fetch(out / "packages"))
    if not icons:
        icons = out / "icons"
        if not (icons / "icons.csv").is_file():
            call("data_prep", "icons", "--out", icons, "--limit", limit)
    with open(icons / "icons.csv", newline="") as file:
        rows = list(csv.DictReader(file))[: limit or None]
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
        places = ["--out", out / domain, "--images", icons.absolute(), "--overwrite", "True"]
        call("data_prep", "build", out / f"{domain}.csv", *places, *columns)
    captions = {caption for split in ("train", "val", "test") for caption in captions_of(out / "B", split)}
    asked = questions(rows, known, captions)
    with atomic_file(out / "questions.jsonl") as partial:
        partial.write_text("".join(json.dumps({"text": text, "keys": keys}) + "\n" for text, keys in asked.items()))


def captioned(rows: list[dict], known: Synonyms, domain: str) -> Iterable[tuple[str, str, str, str]]:
    """(file, caption, group, split) of a domain: an icon's own names, and in train one more, its name and its synonyms, by commas.

    Args:
        rows: of icons.csv.
    """
    by_group = synonyms_of_groups(rows, known, domain)
    done = set()
    for row in rows:
        if (row["set"] in DOMAIN_B) == (domain == "B"):
            split = split_of(row["group"], **SPLITS[domain], seed="AB".index(domain))
            yield row["file_path"], row["caption"], row["group"], split
            words = [word for word in by_group.get(row["group"], ()) if domain == "A" or not is_held_out(word)]
            if split == "train" and words and row["file_path"] not in done:
                yield row["file_path"], ", ".join((concept(row), *words)), row["group"], split
            done.add(row["file_path"])


def questions(rows: list[dict], known: Synonyms, captions: set[str]) -> dict[str, list[str]]:
    """Synonym -> images of B's test split that it stands for.

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
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8, key=b"held out").digest(), "big") < HELD_OUT * 2**64


def synonyms_of_groups(rows: list[dict], known: Synonyms, domain: str) -> dict[str, list[str]]:
    """Group -> the synonyms of its members in this domain, each once, without its names."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if (row["set"] in DOMAIN_B) == (domain == "B"):
            found.setdefault(row["group"], {}).update(dict.fromkeys(known.get((row["set"], concept(row)), ())))
    names = {(row["group"], row["caption"]) for row in rows}
    return {group: [word for word in words if (group, word) not in names] for group, words in found.items()}


def concept(row: dict) -> str:
    """An icon's name without its style: "airplane bold" -> "airplane"."""
    words = row["caption"].split()
    while len(words) > 1 and words[-1] in FONTS[row["set"]] and row["set"] in DOMAIN_B:
        words.pop()
    return " ".join(words)


def fetch(folder: Path) -> Path:
    """The npm packages in `folder`, fetched by npm unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (version, *_) in PACKAGES.items():
        if not archive(folder, name).is_file():
            if not shutil.which("npm"):
                raise UserError(
                    f"{folder}: {archive(folder, name).name} is not there, and there is no npm to fetch it; install npm, "
                    f"or run `npm pack {name}@{version}` where there is one, and pass its folder as --packages"
                )
            done = subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, capture_output=True, text=True)
            if done.returncode or not archive(folder, name).is_file():
                raise Fault(f"npm pack {name}@{version} failed: {(done.stdout + done.stderr)[-500:]}; the same command goes on")
    return folder


def archive(folder: Path, name: str) -> Path:
    return folder / f"{name.lstrip('@').replace('/', '-')}-{PACKAGES[name][0]}.tgz"


def synonyms(folder: Path) -> Synonyms:
    """The synonyms in the npm packages of `folder`, in lower case; (font, name with blanks) -> words.

    Raises:
        UserError: a package is missing, or is not as it was when this was written.
    """
    texts = {}
    for name, (_, member, _) in PACKAGES.items():
        try:
            with tarfile.open(archive(folder, name)) as tar:
                texts[name] = tar.extractfile(member).read().decode()
        except (OSError, KeyError, tarfile.TarError) as error:
            raise UserError(f"{archive(folder, name)}: cannot be read ({error}); delete it, and npm fetches it again") from None
    awesome, material, phosphor = texts.values()
    awesome = {icon: about["search"]["terms"] for icon, about in json.loads(awesome).items()}
    found = {
        ("fontawesome6-solid", "fontawesome6-regular"): awesome,
        ("materialdesignicons6",): {about["name"]: about["aliases"] for about in json.loads(material)},
        ("phosphor",): phosphor_tags(phosphor),
    }
    for (name, (*_, least)), icons in zip(PACKAGES.items(), found.values(), strict=True):
        if len(icons) < least:
            raise UserError(f"{archive(folder, name)}: {len(icons)} icons, not {least} or more; delete it, and npm fetches it again")
    return {
        (font, spaced(icon)): [*filter(None, map(spaced, words))]
        for fonts, icons in found.items()
        for font in fonts
        for icon, words in icons.items()
    }


def phosphor_tags(source: str) -> dict[str, list[str]]:
    """Icon, also by its older name -> tags, from the list in Phosphor's JavaScript; "*new*" and its like are no tags."""
    its_name, older = r'\{\s*name: "([^"]+)",\s*pascal_name: "\w+",\s*', r'(?:alias: \{ name: "([^"]+)"[^}]*\},\s*)?'
    found = {}
    for *names, tags in re.findall(its_name + older + r"categories: .*?\btags: \[([^\]]*)\]", source, re.DOTALL):
        words = [tag for tag in re.findall('"([^"]+)"', tags) if not tag.startswith("*")]
        found |= {name: words for name in names if name}
    return found


def spaced(name: str) -> str:
    return " ".join(re.sub(r"[-_,]", " ", name).lower().split())


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
