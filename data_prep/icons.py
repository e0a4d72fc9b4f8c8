"""The demo's data: real UI icons, drawn from the fonts of the package qtawesome and captioned by their names.

Fonts and charmaps are read as files and drawn with Pillow; Qt is not needed. Aliases of a glyph are captions
of one image. Style variants (fill, outline, thin, bold) and namesakes in other fonts share a group.
"""

import csv
import hashlib
import importlib.util
import json
from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data_prep.atomic import atomic_folder, check_replaceable
from data_prep.cli import Folder
from data_prep.errors import UserError
from data_prep.progress import progress
from data_prep.tables import counted
from data_prep.terminal import say

# The newest release of each family, and the words in its names that describe style, not meaning.
FONTS = {
    "fontawesome6-regular": {"alt"},
    "fontawesome6-solid": {"alt"},
    "elusiveicons": {"alt"},
    "materialdesignicons6": {"outline", "variant"},
    "phosphor": {"bold", "fill", "light", "thin"},
    "remixicon": {"fill", "line"},
    "codicon": {"filled", "outline", "alt"},
}
BRANDS = "fontawesome6-brands"  # not drawn: its names identify the logos in the other fonts
RUDE = {"middle", "poop", "poo"}
SIZES_PX = (24, 32, 48, 64, 96, 128)


def icons(out: Folder, limit: int = 0, seed: int = 0, overwrite: bool = False) -> None:
    """Draw UI icons as black-on-transparent PNGs, with icons.csv (file_path, caption, group, set).

    Args:
        out: Folder to write; it appears under this name when it is complete.
        limit: Number of icons to draw, group by group; 0 draws all, about 15 thousand.
        seed: Another seed selects other icons for the limit, and other sizes.
        overwrite: Replace OUT and everything in it, if this command made it.
    """
    if limit < 0:
        raise UserError(f"--limit {limit}: must be 1 or more; 0 draws all")
    check_replaceable(out, "icons", overwrite)
    glyphs = all_glyphs()
    glyphs.sort(key=lambda glyph: (_hash(seed, glyph.group), glyph.group, glyph.font, glyph.names))
    glyphs = glyphs[:limit] if limit else glyphs
    drawn = 0
    with atomic_folder(out, "icons") as folder, open(folder / "icons.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_path", "caption", "group", "set"])
        for glyph in progress(glyphs, desc="drawing icons", unit="icon"):
            size = SIZES_PX[_hash(seed, glyph.font, glyph.names[0]) % len(SIZES_PX)]
            image = draw(font_files()[glyph.font], glyph.character, size)
            if image is None:
                continue
            path = folder / glyph.font / f"{glyph.names[0]}.png"
            path.parent.mkdir(exist_ok=True)
            image.save(path)
            drawn += 1
            for name in glyph.names:
                writer.writerow(
                    [
                        path.relative_to(folder),
                        name.replace("-", " ").replace("_", " "),
                        glyph.group,
                        glyph.font,
                    ]
                )
    groups = counted(len({glyph.group for glyph in glyphs}), "group")
    say(f"{counted(drawn, 'icon')} in {groups}; the CSV is {out / 'icons.csv'}")


class Glyph:
    """A character of a font, its names (the shortest first), and its group."""

    def __init__(self, font: str, character: str, names: list[str]):
        self.font, self.character = font, character
        self.names = sorted(names, key=lambda name: (len(name), name))
        self.group = ""


def draw(font_file: Path, character: str, size_px: int) -> Image.Image | None:
    """The glyph in black on transparent, centered on a square of `size_px`; None if the glyph is empty."""
    font_px = size_px
    box = ImageFont.truetype(font_file, font_px).getbbox(character)
    extent = max(box[2] - box[0], box[3] - box[1])
    if extent <= 0:
        return None
    if extent > 0.92 * size_px:  # some glyphs are wider than their em
        font_px = max(1, int(font_px * 0.92 * size_px / extent))
    font = ImageFont.truetype(font_file, font_px)
    box = font.getbbox(character)
    corner = ((size_px - box[2] - box[0]) / 2, (size_px - box[3] - box[1]) / 2)
    image = Image.new("RGBA", (size_px, size_px), (0, 0, 0, 0))
    ImageDraw.Draw(image).text(corner, character, font=font, fill=(0, 0, 0, 255))
    return image if image.getextrema()[3][1] else None


def font_files() -> dict[str, Path]:
    """The font file of each family."""
    spec = importlib.util.find_spec("qtawesome")
    if spec is None:
        raise UserError(
            "the demo icons are drawn from the fonts of the package qtawesome, which is not installed: pip"
            " install qtawesome"
        )
    fonts = Path(spec.origin).parent / "fonts"  # not imported: that would require Qt
    files = {name: next(fonts.glob(f"{name}-*.ttf"), None) for name in (*FONTS, BRANDS)}
    missing = [name for name, file in files.items() if file is None]
    if missing:
        raise UserError(
            f"{fonts}: no font {', '.join(missing)}; version 1.4 of qtawesome is required: pip install"
            " 'qtawesome>=1.4,<2'"
        )
    return files


def charmap(font_file: Path) -> dict[str, str]:
    """Icon name -> character of the font."""
    name, version = font_file.stem.rsplit("-", 1)
    codes = json.loads(font_file.with_name(f"{name}-charmap-{version}.json").read_text())
    return {icon: chr(int(code, 16)) for icon, code in codes.items()}


def all_glyphs() -> list[Glyph]:
    """The glyphs of all families that are not logos, with their groups."""
    files = font_files()
    brands = set(charmap(files[BRANDS]))
    glyphs, groups = [], _Groups()
    for font, style_words in FONTS.items():
        by_character = defaultdict(list)
        for name, character in charmap(files[font]).items():
            by_character[character].append(name)
        for character, names in by_character.items():
            if any(_is_excluded(name, brands) for name in names):
                continue
            glyph = Glyph(font, character, names)
            bases = [_base(name, style_words, font) for name in names]
            for base in bases:
                groups.join(bases[0], base)
            glyph.group = bases[0]
            glyphs.append(glyph)
    for glyph in glyphs:
        glyph.group = groups.root(glyph.group)
    return glyphs


def _is_excluded(name: str, brands: set[str]) -> bool:
    words = name.replace("_", "-").split("-")
    return (
        "logo" in words
        or bool(RUDE & set(words))
        or any("-".join(words[:n]) in brands for n in range(1, len(words) + 1))
    )


def _base(name: str, style_words: set[str], font: str) -> str:
    """The name without style words: camera-front-variant -> camera front; in Remix, home-2-line -> home."""
    words = name.replace("_", "-").split("-")
    while len(words) > 1 and (words[-1] in style_words or (font == "remixicon" and words[-1].isdigit())):
        words.pop()
    return " ".join(words)


class _Groups:
    """Names joined by shared glyphs (union-find); a group is named after its alphabetically first name."""

    def __init__(self):
        self.parent: dict[str, str] = {}

    def root(self, name: str) -> str:
        while (parent := self.parent.get(name, name)) != name:
            name = parent
        return name

    def join(self, a: str, b: str) -> None:
        first, second = sorted((self.root(a), self.root(b)))
        self.parent[second] = first


def _hash(seed: int, *texts: str | list[str]) -> int:
    return int.from_bytes(hashlib.blake2b(repr((seed, texts)).encode(), digest_size=8).digest(), "big")
