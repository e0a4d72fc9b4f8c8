"""Atomic writes: a file or folder is complete under its name, or does not exist."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import UserError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; on success it is fsynced and renamed to `path`."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    """Write `value` as JSON, atomically."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`; on success every file is fsynced and the folder is renamed to `path`.

    An existing folder at `path` is replaced: call check_replaceable first.
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


def check_output(option: str, path: Path, is_folder: bool = False) -> None:
    """Refuse a place that cannot be written to, before the work that would be lost.

    Args:
        option: that was passed, for the message: "--json".
        is_folder: the path is of a folder to write files to.

    Raises:
        UserError: what is there is of another kind, or no file can be made there.
    """
    wanted, exists = ("a folder", path.is_dir()) if is_folder else ("a file", path.is_file())
    if path.exists() and not exists:  # a device would be replaced by a file
        found = "a folder" if path.is_dir() else "a file" if path.is_file() else "a device or pipe"
        raise UserError(f"{option} {path}: is {found}; pass the path of {wanted}")
    parent = path if is_folder and exists else next(each for each in path.absolute().parents if each.exists())
    if not parent.is_dir():
        raise UserError(f"{option} {path}: {parent} is a file, not a folder; pass another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: no permission to write in {parent}; pass another path")


def check_replaceable(path: Path, mark: str, overwrite: bool) -> None:
    """Refuse to replace an existing `path`, unless `overwrite` is set and `path` contains the file `mark`.

    Args:
        mark: a file that only our commands write, so that no other folder is deleted.

    Raises:
        UserError: `path` must not be replaced.
    """
    if file := next((parent for parent in path.parents if parent.is_file()), None):
        raise UserError(f"{path}: {file} is a file, not a folder; pass another --out")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already; pass another --out, or --overwrite to replace it")
    if path.exists() and not (path / mark).is_file():
        raise UserError(
            f"{path}: has no {mark}, so it was not made by this command, and is not deleted; pass another"
            " --out"
        )


def sync(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
