"""Images in colour for benchmarks.quality: three Debian packages of clip art, stamps and icons, with their
titles and keywords.
"""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

from benchmarks.quality_icons import Synonyms, spaced
from data_prep.build.split import split_of
from data_prep.errors import Fault, UserError

PACKAGES = ("openclipart-png", "openclipart-svg", "tuxpaint-stamps-default", "oxygen-icon-theme")
SHARE = Path("usr/share")
NO_NAMES = ("special", "shapes/stars")  # folders of patterns, and of 1,375 stars with one title
SIZES = ("128x128", "48x48", "22x22")  # of Oxygen: the small ones are drawn anew
MOST_WITH_ONE_TITLE = 3  # a title of more images than this names a collection
NO_KEYWORDS = {"hash", "unsorted", "r16", "theme", "openclipart"}
BASE_SHARE = 0.4  # of the groups of clip art and stamps: domain A


def unpack(packages: Path, out: Path) -> Path:
    """Unpack the Debian packages in `packages`, fetched by apt-get unless they are there, to OUT/debian.

    Raises:
        UserError: a package is missing and cannot be fetched, or cannot be unpacked.
    """
    folder = out / "debian"
    if folder.is_dir():
        return folder
    packages.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        if not list(packages.glob(f"{name}_*.deb")):
            if not shutil.which("apt-get"):
                raise UserError(
                    f"{packages}: {name}_*.deb is not there, and there is no apt-get to fetch it; put the"
                    f" packages {', '.join(PACKAGES)} of Debian there"
                )
            done = subprocess.run(["apt-get", "download", name], cwd=packages, capture_output=True, text=True)
            if done.returncode:
                raise Fault(f"apt-get download {name} failed: {done.stderr[-500:]}")
    partial = folder.with_name("debian.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in PACKAGES:
        archive = next(iter(packages.glob(f"{name}_*.deb")))
        done = subprocess.run(["dpkg-deb", "-x", archive, partial], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{archive}: cannot be unpacked ({done.stderr.strip()}); delete it")
    partial.rename(folder)
    return folder


def colour_images(folder: Path) -> tuple[list[dict], Synonyms]:
    """Rows as those of icons.csv, with their domain, paths from `folder`'s parent, and the other words for
    each name.
    """
    rows, known = [], {}
    for found in (clipart, stamps, oxygen):
        for path, name, words in found(folder / SHARE):
            in_base = found is not oxygen and split_of(name, val=0, test=BASE_SHARE, seed=2) == "test"
            rows.append(
                {
                    "file_path": str(path.relative_to(folder.parent)),
                    "caption": name,
                    "group": name,
                    "set": found.__name__,
                    "domain": "A" if in_base else "B",
                }
            )
            mine = known.setdefault((found.__name__, name), [])
            mine += [word for word in words if word not in (name, *mine)]
    return rows, known


def clipart(share: Path) -> list[tuple[Path, str, list[str]]]:
    """(image, name, keywords) of Openclipart: the title of the SVG file, or where that names a collection,
    the words of the file's name; keywords of the SVG file.
    """
    images = []
    for path in sorted((share / "openclipart/png").rglob("*.png")):
        part = path.relative_to(share / "openclipart/png")
        if not str(part).startswith(NO_NAMES):
            text = (share / "openclipart/svg" / part.with_suffix(".svg")).read_text(errors="replace")
            images.append((path, inside(text, "dc:title")[:1], inside(text, "rdf:li")))
    titles = Counter(title[0] for _, title, _ in images if title)
    found = []
    for path, title, keywords in images:
        collection = not title or titles[title[0]] > MOST_WITH_ONE_TITLE or "Clipart by" in title[0]
        name = words(path.stem if collection else title[0])
        if name:
            found.append((path, name, [w for w in map(words, keywords) if w and w not in NO_KEYWORDS]))
    return found


def stamps(share: Path) -> list[tuple[Path, str, list[str]]]:
    """(image, name, folders) of Tux Paint: the first line of the stamp's text, which is English."""
    found = []
    for path in sorted((share / "tuxpaint/stamps").rglob("*.png")):
        text = path.with_suffix(".txt")
        if text.is_file():
            name = words(text.read_text(errors="replace").partition("\n")[0])
            folders = path.relative_to(share / "tuxpaint/stamps").parts[:-1]
            if name:
                found.append((path, name, [*map(words, folders)]))
    return found


def oxygen(share: Path) -> list[tuple[Path, str, list[str]]]:
    """(image, name, other names) of Oxygen, of each of SIZES: links to an image are its other names."""
    theme, others = share / "icons/oxygen/base", {}
    links = [path for size in SIZES for path in (theme / size).rglob("*.png") if path.is_symlink()]
    for path in sorted(links):
        others.setdefault(path.resolve(), []).append(words(path.stem))
    return [
        (path, words(path.stem), sorted({*others.get(path.resolve(), ())}))
        for size in SIZES
        for path in sorted((theme / size).rglob("*.png"))
        if not path.is_symlink()
    ]


def inside(text: str, tag: str) -> list[str]:
    """What stands between the tags of an SVG file's description."""
    return [
        found.strip()
        for found in re.findall(rf"<{tag}[^>]*>([^<]*)</{tag}>", text)
        if found.strip() and "HASH(" not in found
    ]


def words(name: str) -> str:
    """A name in lower case, without numbers and punctuation, words apart: "Bored_dog_01" -> "bored dog"."""
    return spaced(re.sub(r"[\W\d_]+", " ", name))
