"""Files on this machine or behind a URL that fsspec knows: listing, hashing, remote file systems."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_prep.below import leads_out
from data_prep.errors import UserError
from data_prep.inputs import hub
from data_prep.store.remote import Store, file_at, is_url, remote

# Names of images. Files without such a name are images if they begin like one, see data_prep.signatures.
IMAGE_EXTENSIONS = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg", ".svgz"),
    *(".avif", ".heic", ".heif", ".ico", ".jp2", ".j2k"),
}
# Of files beside an image that describe it, and are no image whatever they contain.
SIDE_EXTENSIONS = {
    ".txt",
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".parquet",
    ".md",
    ".xml",
    ".yaml",
    ".yml",
    ".html",
}
SIDE_EXTENSIONS |= {".cls", ".npy", ".npz", ".pt", ".pth", ".safetensors"}
# Of macOS, Windows and network drives; names that begin with a dot (._x, .DS_Store, .ipynb_checkpoints) are
# hidden ones.
SYSTEM_NAMES = {"__macosx", "thumbs.db", "desktop.ini", "@eadir"}
SYSTEM_FILE, FOLDER_LINK = "hidden or system file", "link to a folder, not followed"
SMALL_BYTES = 1 << 20
REQUESTS = 16  # at once, for what servers say of files
# Tables in folders of images, as the library `datasets` reads them; see imagefolder.py.
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def is_http(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def is_system_file(name: str) -> bool:
    """Whether a path has a part that file managers and editors make, not people."""
    parts = name.replace("\\", "/").lower().split("/")
    return any((part[:1] == "." and part not in (".", "..")) or part in SYSTEM_NAMES for part in parts)


def walk(folder: str, ignore: Callable[[str, str], None] = lambda reason, name: None) -> Iterator[str]:
    """Every file below a folder, in sorted order.

    Args:
        ignore: is called with the reason and relative path of what is left out: hidden and system files, see
            is_system_file(), and links to folders, which may lead anywhere.

    Raises:
        UserError: a folder cannot be read.
    """
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders.sort()
        for name in folders:
            if os.path.islink(path := os.path.join(parent, name)):
                ignore(FOLDER_LINK, os.path.relpath(path, folder))
        for name in sorted(names):
            path = os.path.join(parent, name)
            if is_system_file(relative := os.path.relpath(path, folder)):
                ignore(SYSTEM_FILE, relative)
            else:
                yield path


def _raise(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


def expand(sources: list[str]) -> list[str]:
    """The inputs, with remote patterns (*) expanded and data sets on the hub pinned to a commit.

    Raises:
        UserError: no input, or a pattern or data set without files.
    """
    if not sources:
        raise UserError("no input; pass CSV, JSONL, Parquet or tar files, or folders of images")
    expanded = []
    for source in sources:
        if source.startswith(hub.PREFIX):
            expanded += hub.parquet_files(source)
        elif is_url(source) and "*" in source:
            folder = source[: source.index("*")].rpartition("/")[0]
            expanded += Store(folder).matching(source[len(folder) + 1 :])
        else:
            expanded.append(source)
    if not expanded:
        raise UserError(f"{', '.join(sources)}: no file matches this pattern")
    return expanded


def digests(sources: list[str], in_place: bool = False) -> list[str]:
    """digest() of each; several servers are asked at once, but one file is read at a time."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        asked = {url: pool.submit(digest, url, in_place) for url in sources if is_url(url)}
        return [asked[source].result() if source in asked else digest(source) for source in sources]


def sizes_of(tars: list[str]) -> dict[str, int]:
    """Bytes of each local tar, and of each behind a URL."""

    def ask(url: str) -> int:
        store, name = file_at(url)
        return store.size(name)

    with ThreadPoolExecutor(REQUESTS) as pool:
        asked = {url: pool.submit(ask, url) for url in tars if is_url(url)}
        return {tar: asked[tar].result() if tar in asked else os.path.getsize(tar) for tar in tars}


def digest(source: str, in_place: bool = False) -> str:
    """sha256 of a file; of a URL, the metadata that its server reports; of a folder, its listing and the
    small files that may be captions.

    Args:
        in_place: a URL will be read in pieces, see Store.

    Raises:
        UserError: it cannot be read.
    """
    sha = hashlib.sha256()
    try:
        if is_url(source) and in_place:
            store, name = file_at(source)
            return store.version(name)
        if is_url(source):
            info = remote(source).info(source)
            sha.update(json.dumps({name: info[name] for name in sorted(info)}, default=str).encode())
        elif os.path.isdir(source):
            for path in walk(source):
                size = os.stat(path).st_size if os.path.exists(path) else None  # None: a dangling link
                sha.update(repr((os.path.relpath(path, source), size)).encode())
                is_image = os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS
                is_small = size is not None and size < SMALL_BYTES and not is_image
                if (
                    (is_small or path.endswith(METADATA))
                    and os.path.isfile(path)
                    and not leads_out(source, path)
                ):
                    sha.update(Path(path).read_bytes())
        else:
            with open(source, "rb") as file:
                while chunk := file.read(1 << 20):
                    sha.update(chunk)
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({str(error).strip() or type(error).__name__})") from None
    return sha.hexdigest()
