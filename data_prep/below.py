"""Files below a root folder: what a stranger's folder, table or manifest names is not followed out of it."""

import errno
import os
import re
import stat
from functools import lru_cache
from pathlib import Path

from data_prep.errors import UserError

MAX_NAME, MAX_PATH = 255, 3000  # bytes: what file systems have
HUB_CACHE = re.compile("(.*/(?:datasets|models|spaces)--[^/]+)/snapshots/")


def open_below(root: str, name: str) -> int | None:
    """A descriptor of root/name; None if a symbolic link leads out of `root`. A named pipe does not block.

    Raises:
        OSError: it cannot be opened.
    """
    root = os.path.abspath(root)  # what is remembered of a root is true in any working folder
    folder, _, base = name.rpartition("/")
    real_folder, is_below = _real_folder(root, folder)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
    try:
        return os.open(real_folder + base, flags | os.O_NOFOLLOW) if is_below else None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK):
            raise
    path = os.path.realpath(real_folder + base)
    return os.open(path, flags) if path.startswith(_roots_of_links(root)) else None


def leads_out(root: str, path: str) -> bool:
    """Whether a path is, or has links that lead, out of the folder `root`."""
    return not os.path.realpath(path).startswith(_roots_of_links(os.path.abspath(root)))


def file_below(root: Path, name: str) -> Path:
    """root/name as a path to open; a missing file is the caller's to report.

    Raises:
        UserError: it leads out of `root`, or is no regular file.
    """
    _check_name(root, name)
    path = root / name
    if leads_out(str(root), str(path)):
        raise UserError(
            f"{root}: {name!r} leads out of this folder, which is not followed; put the file itself there"
        )
    return regular(root, name)


def regular(root: Path, name: str) -> Path:
    """The path root/name, wherever it leads, if it is of a regular file or missing.

    Raises:
        UserError: it is a folder, a pipe or a device, or no file can have such a name.
    """
    _check_name(root, name)
    path = root / name
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return path
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: not a regular file; put the file itself there")
    return path


def _check_name(root: Path, name: str) -> None:
    try:
        parts = [len(part) for part in os.fsencode(name).split(b"/")]
    except UnicodeEncodeError:
        parts = []
    if not name or "\0" in name or not parts or max(parts) > MAX_NAME or sum(parts) > MAX_PATH:
        raise UserError(f"{root}: {name!r:.80} is no name of a file; restore the file that names it")


@lru_cache(64)
def _roots_of_links(root: str) -> tuple[str, ...]:
    """Where links below `root` may lead, with a trailing slash: below it; and in huggingface_hub's cache,
    from datasets--USER--NAME/snapshots/COMMIT to datasets--USER--NAME/blobs, the files of this data set only.
    """
    real = _real_folder(root, "")[0]
    cache = HUB_CACHE.match(real)
    return (real, f"{cache[1]}/blobs/") if cache else (real,)


@lru_cache(4096)
def _real_folder(root: str, folder: str) -> tuple[str, bool]:
    """root/folder without symbolic links, with a trailing slash; and whether it is inside of `root`."""
    path = os.path.join(os.path.realpath(os.path.join(root, folder)), "")
    return path, path.startswith(os.path.join(os.path.realpath(root), ""))
