"""Files and folders that are either whole, under their name, or not there at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import UserError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; on success fsynced and renamed to `path`."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`; on success every file is fsynced and the folder takes the name.

    A folder that already has the name is replaced, so ask before you call this.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for entry in [*partial.rglob("*"), partial]:
            sync(entry)
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(path: Path, mark: str, overwrite: bool) -> None:
    """Refuse to write to a `path` that exists, unless it is to be overwritten and holds `mark`, so was made
    by us.

    Raises:
        UserError: it must stay as it is.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already; pass another --out, or --overwrite True to make it again")
    if path.exists() and not (path / mark).is_file():
        raise UserError(
            f"{path}: has no {mark}, so it was not made by this command, and is not deleted; pass another"
            " --out"
        )


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
