"""Atomic writes: a file or folder is complete under its name, or does not exist.

OUT/.made.json     the kind of the folder, and the files in it that our commands made: what may be replaced
.OUT.partial       the new one while it is written
.FILE.PLACE-PID.partial    a file while a process writes it; a later command deletes what a kill has left
.FILE.lock         beside a file that one served page writes to, locked while it does
UNFINISHED/.lock   of an unfinished folder that a later command resumes: locked while a process writes in it
.OUT.replaced      the old one while it is deleted
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TextIO

from data_prep.errors import UserError
from data_prep.strict_json import load_json, strict_json
from data_prep.terminal import say

# The machine or container that process numbers are of.
_NAMESPACE = os.stat("/proc/self/ns/pid").st_ino if os.path.exists("/proc/self/ns/pid") else 0
PLACE = f"{zlib.crc32(f'{os.uname().nodename} {_NAMESPACE}'.encode()):08x}"
PARTIAL = re.compile(r"\..+\.([0-9a-f]{8})-([0-9]+)\.partial", re.DOTALL)
LEFT_S = 24 * 3600  # no command is silent for so long while it writes a file
MARK = ".made.json"
LOCK = ".lock"
MANGLED_URL = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/")  # s3:/bucket
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems that have none


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; on success it is fsynced and renamed to `path`."""
    partial = own_partial(path)
    try:
        with full_disk_as_oserror(path):
            yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def own_partial(path: Path) -> Path:
    """Where this process writes what becomes `path`. What kills have left there is deleted, once a folder."""
    _sweep_once(path.parent)
    return path.with_name(f".{path.name}.{PLACE}-{os.getpid()}.partial")


@lru_cache(1024)
def _sweep_once(folder: Path) -> None:
    sweep(folder)


def sweep(folder: Path, is_locked: bool = False) -> None:
    """Delete partial files in a folder that killed processes of ours have left.

    Args:
        is_locked: No other process writes in it. Else only those are deleted whose process has ended, or is
            on another machine and has not written for a day.
    """
    try:
        entries = [(entry, found) for entry in os.scandir(folder) if (found := PARTIAL.fullmatch(entry.name))]
    except OSError:  # the caller says so, when it writes there
        return
    for entry, found in entries:
        with contextlib.suppress(OSError):  # another command sweeps as well, or it is of another person
            if is_locked or _is_left(entry, *found.groups()):
                remove = shutil.rmtree if entry.is_dir(follow_symlinks=False) else os.unlink
                remove(entry.path)


def _is_left(entry: os.DirEntry, place: str, pid: str) -> bool:
    if place != PLACE:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > LEFT_S
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


# How libraries say it; the last two are SQLite's, of which the second is all that it says of EFBIG.
FULL = {os.strerror(number): number for number in (errno.ENOSPC, errno.EFBIG)}
FULL |= {"disk is full": errno.ENOSPC, "disk I/O error": errno.EIO}


@contextmanager
def full_disk_as_oserror(path: Path) -> Iterator[None]:
    """SQLite, safetensors and tokenizers have error types of their own for a full disk and for a file that
    may not grow (ulimit -f), and Python's names no file that is open already: they become Python's, of
    `path`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL.values() or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
    except (UserError, RuntimeError):  # torch reports a full /dev/shm as RuntimeError
        raise
    except Exception as error:
        number = next((number for sign, number in FULL.items() if sign in str(error)), None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


def write_json(path: Path, value: dict) -> None:
    """Write `value` as JSON, atomically, in a new folder if need be. Numbers that are not finite are null."""
    replaced = []
    text = strict_json(value, replaced.append, indent=1, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    if replaced:
        say(f"warning: {path}: {len(replaced)} numbers are not finite, and null in it", file=sys.stderr)


@contextmanager
def atomic_folder(path: Path, kind: str = "") -> Iterator[Path]:
    """A temporary folder beside `path`; on success every file is fsynced and the folder is renamed to `path`.

    Args:
        kind: of a folder that a person names; call check_replaceable first. An existing one is replaced by
            replace_folder. Without a kind it is one of ours inside of a run, and is replaced whole.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with full_disk_as_oserror(path):
            yield partial
        if kind:
            mark(partial, kind)
        for entry in [*partial.rglob("*"), partial]:
            sync(entry)
        replace_folder(partial, path, is_whole=not kind)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked(folder: Path, work: str) -> Iterator[None]:
    """Hold the lock of an unfinished folder; it is made.

    Args:
        work: what the command does there, for the message: "building in".

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A POSIX lock: worker processes, which may outlive a killed parent for a second, do not inherit it.
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(
                    f"{folder}: another process is {work} it; wait until it ends, or stop it"
                ) from None
        yield


def lock_beside(path: Path, writer: str, option: str) -> TextIO:
    """The lock file beside `path`, locked until it is closed; the file itself may be replaced meanwhile.

    Args:
        writer: what writes to the file, for the message: "review page".
        option: that was passed, for the message: "--decisions".

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    # through links, so that two names of one file have one lock
    real = Path(os.path.realpath(path))
    try:
        file = open(real.with_name(f".{real.name}.lock"), "a+")  # noqa: SIM115 open as long as it is held
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); pass {option} with a writable file"
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise UserError(
                f"{path}: another {writer} writes to it ({holder}); use or stop that one, or pass another"
                f" {option}"
            ) from None
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, process {os.getpid()}\n")
    file.flush()
    return file


def mark(folder: Path, kind: str) -> None:
    """Write MARK into a folder: its kind and its files, which are all that a later command may delete."""
    write_json(folder / MARK, {"kind": kind, "files": sorted(_files(folder))})


def add_to_mark(folder: Path, *names: str) -> None:
    """Add files, or all files of folders, that another command of ours has written into a marked folder."""
    if found := _read_mark(folder):
        below = tuple(f"{name}/" for name in names)
        added = {file for file in _files(folder) if file in names or file.startswith(below)}
        write_json(folder / MARK, {**found, "files": sorted(added.union(found["files"]))})


def replace_folder(new: Path, path: Path, is_whole: bool = False) -> None:
    """Rename the folder `new` to `path`. An older one there is moved aside first, and what its mark lists is
    deleted when the new one is in place. After a kill in between, check_replaceable restores the older one.

    Args:
        is_whole: Delete the older one with all that it holds, whatever its mark says.
    """
    aside = _aside(path)
    if path.exists():
        _delete_made(aside, is_whole)
        number = 1
        while aside.exists():
            number += 1
            aside = _aside(path, number)
        os.replace(path, aside)
    os.replace(new, path)
    sync(path.parent)
    _delete_made(aside, is_whole)


def _aside(path: Path, number: int = 1) -> Path:
    return path.with_name(f".{path.name}.replaced" + (f"-{number}" if number > 1 else ""))


def _delete_made(folder: Path, is_whole: bool) -> None:
    """Delete a folder that was moved aside; what its mark does not list is kept there, and said."""
    if not folder.exists():
        return
    found = _read_mark(folder)
    for name in set(_files(folder)).intersection(found["files"] if found else ()):
        (folder / name).unlink()
    left = _files(folder)
    if is_whole or not left:  # the mark goes last: what a kill leaves is deleted by the next command
        shutil.rmtree(folder)
    else:
        say(
            f"warning: {folder}: holds {_named(left)}, which was not made by this command; it is kept there",
            file=sys.stderr,
        )


def _files(folder: Path) -> list[str]:
    """The files and links below a folder, without MARK, as paths relative to it; links are not followed."""
    found = []
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in (*files, *links)]
    return [name for name in found if name != MARK]


def _named(files: Sequence[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def _read_mark(folder: Path) -> dict | None:
    """{"kind", "files"}; None without a mark, or with one that is not ours."""
    try:
        return load_json(folder / MARK, {"kind": str, "files": [str]})
    except (OSError, ValueError):
        return None


# What files of these options begin with: another one is not replaced.
BEGINS = {"--page": b"<!doctype html", "--json": b"{"}


def check_output(option: str, path: Path, is_folder: bool = False) -> None:
    """Refuse a place that cannot be written to, before the work that would be lost, or that holds a file of
    another kind.

    Args:
        option: that was passed, for the message: "--json".
        is_folder: the path is of a folder to write files to.

    Raises:
        UserError: what is there is of another kind, or no file can be made there.
    """
    if MANGLED_URL.match(str(path)):  # a path lost one of its slashes
        raise UserError(f"{option} {path}: must be on this machine, not behind a URL; pass another path")
    wanted, exists = ("a folder", path.is_dir()) if is_folder else ("a file", path.is_file())
    if path.exists() and not exists:  # a device would be replaced by a file
        found = "a folder" if path.is_dir() else "a file" if path.is_file() else "a device or pipe"
        raise UserError(f"{option} {path}: is {found}; pass the path of {wanted}")
    if not is_folder and exists:
        check_begins(option, path, BEGINS.get(option, b""))
    parent = path if is_folder and exists else next(each for each in path.absolute().parents if each.exists())
    if not parent.is_dir():
        raise UserError(f"{option} {path}: {parent} is a file, not a folder; pass another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: no permission to write in {parent}; pass another path")


def check_begins(option: str, path: Path, begins: bytes) -> None:
    """Refuse to replace a file that does not begin as what would be written, an empty one excepted.

    Args:
        option: that was passed, for the message.

    Raises:
        UserError: it begins with something else.
    """
    try:
        with open(path, "rb") as file:
            found = file.read(80 + 4 * len(begins))
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read ({error.strerror}); pass another path") from None
    text = found.decode("utf-8-sig", "replace").strip()  # a spreadsheet adds a mark, and quotes
    if text and not text.replace('"', "").lower().startswith(begins.decode().lower().replace('"', "")):
        start = text[:40].splitlines()[0]
        raise UserError(
            f"{option} {path}: is a file that this command did not write (it begins with {start!r}), and is"
            " not replaced; pass another path, or delete it"
        )


def check_named(path: Path) -> None:
    """Refuse /, . and ..: a folder is written beside its place first, under a name that is made of its own.

    Raises:
        UserError: the path does not end in a name.
    """
    if path.name in ("", ".."):
        raise UserError(f"{path}: must end in the name of a folder to make, such as {path / 'new'}")


def check_parents(path: Path, option: str) -> None:
    """Refuse a path below something that is no folder.

    Args:
        option: that was passed, for the message: "--run".

    Raises:
        UserError: a file, a device or a link to nothing is in the way.
    """
    if found := next((each for each in path.parents if os.path.lexists(each) and not each.is_dir()), None):
        kind = (
            "a file" if found.is_file() else "a link to nothing" if found.is_symlink() else "a device or pipe"
        )
        raise UserError(f"{path}: {found} is {kind}, not a folder; pass another {option}")


def check_replaceable(path: Path, kind: str, overwrite: bool, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse to write the folder `path` where that would delete what a command of the same kind did not make.

    Args:
        kind: of the folder, as mark() has it: "shards", "icons", "export", "index", "model".
        overwrite: Whether an existing folder may be replaced.
        inputs: Files and folders that the command reads; what is no local path is ignored.

    Raises:
        UserError: `path` must not be replaced.
    """
    check_named(path)
    check_parents(path, "--out")
    aside = _aside(path)
    if not os.path.lexists(path) and _read_mark(aside):
        os.replace(aside, path)  # a kill came between the two renames of replace_folder
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise UserError(f"{path}: exists already; pass another --out, or --overwrite to replace it")
    if path.is_symlink():
        raise UserError(f"{path}: is a link to {path.resolve()}; pass that folder, or another --out")
    for source in inputs:
        if _is_within(source, path):
            raise UserError(
                f"{path}: --overwrite would delete {source}, which this command reads; pass another --out"
            )
    found = _read_mark(path)
    if found is None or found["kind"] != kind:
        what = f"is of the kind {found['kind']!r}" if found else f"has no {MARK}"
        raise UserError(
            f"{path}: {what}, so it was not made by this command, and is not deleted; pass another --out, or"
            " delete it yourself"
        )
    if foreign := sorted(set(_files(path)).difference(found["files"])):
        raise UserError(
            f"{path}: holds {_named(foreign)}, which was not made by this command, and is not deleted; move"
            " it away, or pass another --out"
        )


def local_paths(*names: str | Path | None) -> list[Path]:
    """The files and folders that a command's MODEL (also local-dir:PATH, NAME:FILE) and DATA name."""
    texts = [str(name) for name in names if name]
    places = [Path(place) for text in texts for place in (text, text.partition(":")[2]) if place]
    return [place for place in places if os.path.lexists(place)]


def _is_within(source: str | Path, folder: Path) -> bool:
    """Whether `source` is the folder, or below it, by its own path or where its links lead."""
    places = (os.path.realpath(source), os.path.abspath(source))
    return any(
        os.path.commonpath([place, root]) == root
        for place, root in zip(places, (os.path.realpath(folder), os.path.abspath(folder)), strict=True)
    )


def sync(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
