"""Where inputs are: on this machine, behind a URL that fsspec knows, or on the hub; of which kind, and the
same as before?
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec

from data_prep.errors import UserError

IMAGE_EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def kind_of(source: str) -> str:
    """ "csv", "jsonl", "parquet", "tar" or "folder".

    Raises:
        UserError: it is none of them.
    """
    if is_url(source):
        name = source
    else:
        if os.path.isdir(source):
            return "folder"
        if not os.path.exists(source):
            raise UserError(
                f"{source}: no such file; the first arguments are CSV, Parquet, JSONL or tar files, or"
                " folders of images"
            )
        name = os.path.basename(source)
    while name.endswith(COMPRESSED):
        name = name.rsplit(".", 1)[0]
    kinds = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".tar": "tar"}
    return kinds.get(os.path.splitext(name)[1].lower(), "csv")


def images_of(inputs: list[str]) -> str:
    """The folder that image paths are relative to where nobody said.

    Raises:
        UserError: there is no one such folder.
    """
    folders = {
        source if kind_of(source) == "folder" else source.rpartition("/")[0] or "." for source in inputs
    }
    if len(folders) > 1 and any(kind_of(source) in ("csv", "jsonl", "folder") for source in inputs):
        raise UserError(
            f"the inputs lie in several folders, {', '.join(sorted(folders)[:3])}; pass --images, where image"
            " paths begin"
        )
    return sorted(folders)[0]


def is_url(path: str) -> bool:
    return "://" in path


def expand(sources: list[str]) -> list[str]:
    """The inputs with patterns of remote files filled in, and data sets of the hub pinned to a commit."""
    if not sources:
        raise UserError(
            "no input was given; CSV, Parquet, JSONL or tar files, or folders of images are wanted"
        )
    found = []
    for source in sources:
        if source.startswith("hf://datasets/"):
            found += _hub_files(source)
        elif is_url(source) and "*" in source:
            protocol = source.split("://")[0]
            found += [f"{protocol}://{path.split('://')[-1]}" for path in sorted(remote(source).glob(source))]
        else:
            found.append(source)
    if not found:
        raise UserError(f"{', '.join(sources)}: no file fits this pattern")
    return found


def _hub_files(source: str) -> list[str]:
    """Parquet files of a data set on the Hugging Face hub, with `@COMMIT` in their names."""
    from huggingface_hub import HfApi, HfFileSystem  # here, because they take half a second
    from huggingface_hub.errors import HfHubHTTPError

    files = HfFileSystem()
    try:
        place = files.resolve_path(source)
        commit = HfApi().repo_info(place.repo_id, repo_type="dataset", revision=place.revision).sha
        root = f"datasets/{place.repo_id}@{commit}/{place.path_in_repo}".rstrip("/")
        paths = (
            [root]
            if root.endswith(".parquet")
            else sorted(files.glob(root if "*" in root else f"{root}/**/*.parquet"))
        )
    except (FileNotFoundError, HfHubHTTPError) as error:
        raise UserError(
            f"{source}: {str(error).strip()}; check the name, and log in for a private one: hf auth login"
        ) from None
    if not paths:
        raise UserError(
            f"{source}: holds no Parquet file; the hub converts most data sets on the branch"
            " refs/convert/parquet"
        )
    return [f"hf://{path}" for path in paths]


def remote(url: str) -> fsspec.AbstractFileSystem:
    """The file system of a URL.

    Raises:
        UserError: its protocol is unknown, or wants a package that is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {error}") from None


def digest(source: str) -> str:
    """sha256 of an input; of a remote one, of what its server says of it; of a folder, of its listing and
    texts.

    Raises:
        UserError: it cannot be read.
    """
    sha = hashlib.sha256()
    try:
        if is_url(source):
            info = remote(source).info(source)
            sha.update(json.dumps({name: info[name] for name in sorted(info)}, default=str).encode())
        elif os.path.isdir(source):
            for path in walk(source):
                sha.update(repr((os.path.relpath(path, source), os.stat(path).st_size)).encode())
                if path.endswith(".txt"):
                    sha.update(Path(path).read_bytes())
        else:
            with open(source, "rb") as file:
                while chunk := file.read(1 << 20):
                    sha.update(chunk)
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({str(error).strip() or type(error).__name__})") from None
    return sha.hexdigest()


def walk(folder: str) -> Iterator[str]:
    """Every file below a folder, in order."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        yield from (os.path.join(place, name) for name in sorted(names))
