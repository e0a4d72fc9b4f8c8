"""Icons and words of benchmarks.quality beyond those of qtawesome: fonts and synonyms in npm packages, read
without running any of them.
"""

import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path

from data_prep import npm
from data_prep.errors import UserError
from data_prep.icons import SIZES_PX, draw
from data_prep.progress import progress

# npm package -> its version, and the files in it that are read; the first three belong to fonts in qtawesome.
PACKAGES = {
    "@fortawesome/fontawesome-free": ("6.7.2", ["metadata/icon-families.json"]),
    "@mdi/svg": ("6.9.96", ["meta.json"]),
    "@phosphor-icons/core": ("2.1.1", ["dist/index.mjs"]),
    "@tabler/icons": ("3.49.0", ["icons.json"]),
    "@tabler/icons-webfont": (
        "3.49.0",
        ["dist/fonts/tabler-icons.ttf", "dist/fonts/tabler-icons-filled.ttf"],
    ),
    "lucide-static": ("1.62.0", ["tags.json", "font/codepoints.json", "font/lucide.ttf"]),
    "bootstrap-icons": ("1.13.2", ["font/bootstrap-icons.json", "font/fonts/bootstrap-icons.woff"]),
}
# icons with words
LEAST = {
    "fontawesome6-solid": 1800,
    "materialdesignicons6": 6900,
    "phosphor": 1500,
    "tabler": 5000,
    "lucide": 1500,
}
Synonyms = dict[tuple[str, str], list[str]]  # font and name of an icon -> other words for it


def fetch(folder: Path) -> Path:
    """The npm packages in `folder`, fetched by npm unless they are there."""
    npm.fetch(folder, {name: version for name, (version, _) in PACKAGES.items()})
    return folder


def archive(folder: Path, name: str) -> Path:
    return npm.archive(folder, name, PACKAGES[name][0])


def read(folder: Path, name: str) -> list[bytes]:
    """The files of PACKAGES in the npm package `name`.

    Raises:
        UserError: the package is missing, or has no such file.
    """
    return npm.read(archive(folder, name), PACKAGES[name][1])


def synonyms(folder: Path) -> Synonyms:
    """The synonyms in the npm packages of `folder`, in lower case; (font, name with blanks) -> words.

    Raises:
        UserError: a package is missing, or is not as it was when this was written.
    """
    awesome, material, tabler = (
        json.loads(read(folder, name)[0])
        for name in ("@fortawesome/fontawesome-free", "@mdi/svg", "@tabler/icons")
    )
    awesome = {icon: about["search"]["terms"] for icon, about in awesome.items()}
    found = {
        "fontawesome6-solid": awesome,
        "fontawesome6-regular": awesome,
        "materialdesignicons6": {about["name"]: about["aliases"] for about in material},
        "phosphor": phosphor_tags(read(folder, "@phosphor-icons/core")[0].decode()),
        "tabler": {icon: list(map(str, about["tags"])) for icon, about in tabler.items()},
        "lucide": json.loads(read(folder, "lucide-static")[0]),
    }
    for font, least in LEAST.items():
        if len(found[font]) < least:
            raise UserError(
                f"{folder}: words for {len(found[font])} icons of {font}, not {least} or more; delete its"
                " packages there"
            )
    return {
        (font, spaced(icon)): [*filter(None, map(spaced, words))]
        for font, icons in found.items()
        for icon, words in icons.items()
    }


def phosphor_tags(source: str) -> dict[str, list[str]]:
    """Icon, also by its older name -> tags, from the list in Phosphor's JavaScript; "*new*" and its like are
    no tags.
    """
    its_name, older = (
        r'\{\s*name: "([^"]+)",\s*pascal_name: "\w+",\s*',
        r'(?:alias: \{ name: "([^"]+)"[^}]*\},\s*)?',
    )
    found = {}
    for *names, tags in re.findall(
        its_name + older + r"categories: .*?\btags: \[([^\]]*)\]", source, re.DOTALL
    ):
        words = [tag for tag in re.findall('"([^"]+)"', tags) if not tag.startswith("*")]
        found |= {name: words for name in names if name}
    return found


def drawn(folder: Path, out: Path, limit: int = 0) -> list[dict]:
    """The icons of the fonts in the npm packages of `folder`, drawn to OUT; rows as those of icons.csv.

    Args:
        limit: of each font; 0 for all.
    """
    rows, seen = [], set()
    for font, style, codes, file in fonts(folder, out):
        for name, code in progress(
            list(codes.items())[: limit or None], desc=f"drawing {font} {style}".strip(), unit="icon"
        ):
            caption = f"{spaced(name)} {style}".strip()
            path = Path(font) / f"{caption.replace(' ', '-')}.png"
            image = draw(file, chr(code), SIZES_PX[len(rows) % len(SIZES_PX)])
            if image is None or name.startswith("brand-") or path in seen:
                continue
            seen.add(path)
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            image.save(out / path)
            rows.append(
                {
                    "file_path": str(path),
                    "caption": caption,
                    "group": spaced(name.removesuffix("-fill")),
                    "set": font,
                }
            )
    return rows


def fonts(folder: Path, out: Path) -> list[tuple[str, str, dict[str, int], Path]]:
    """(font, style, name -> code point, font file), of the fonts in the npm packages."""
    tabler = json.loads(read(folder, "@tabler/icons")[0])
    _, lucide, lucide_font = read(folder, "lucide-static")
    bootstrap, bootstrap_font = read(folder, "bootstrap-icons")
    outline, filled = read(folder, "@tabler/icons-webfont")

    def codes(style: str) -> dict[str, int]:
        found = {
            name: int(about["styles"][style]["unicode"], 16)
            for name, about in tabler.items()
            if style in about["styles"]
        }
        # A variation selector cannot be drawn alone.
        return {name: code for name, code in found.items() if not 0xFE00 <= code <= 0xFE0F}

    found = [
        ("tabler", "", codes("outline"), outline),
        ("tabler", "filled", codes("filled"), filled),
        ("lucide", "", json.loads(lucide), lucide_font),
        ("bootstrap", "", json.loads(bootstrap), bootstrap_font),
    ]
    (out / "fonts").mkdir(parents=True, exist_ok=True)
    for at, (*_, content) in enumerate(found):
        (out / "fonts" / str(at)).write_bytes(content)
    return [(font, style, of, out / "fonts" / str(at)) for at, (font, style, of, _) in enumerate(found)]


def table(file: Path) -> list[dict]:
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def write_table(file: Path, columns: list[str], rows: Iterable[dict]) -> None:
    with open(file, "w", newline="") as opened:
        writer = csv.DictWriter(opened, columns)
        writer.writeheader()
        writer.writerows(rows)


def spaced(name: str) -> str:
    return " ".join(re.sub(r"[-_,]", " ", name).lower().split())
