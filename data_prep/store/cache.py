"""Files of a store, in blocks, in a folder of this machine that all its processes share.

    FOLDER/blocks/SHA256    one byte per block that says whether it is here, then the file, with holes
    FOLDER/whole/SHA256     indexes, which are read as a whole

A file is named by its content, so a data set that was built again, or is behind another URL, is never taken
for another one. A block is written before the byte that says so; after a kill it is fetched again. fsspec's
own block cache has one process per folder and no bound.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.atomic import NO_LOCKS, atomic_file
from data_prep.cores import ranks_here
from data_prep.errors import Fault, UserError
from data_prep.progress import progress
from data_prep.store.remote import Short, Store, is_url

BLOCK = 1 << 14
MERGED_BLOCKS = 4  # a gap of 64 KiB is fetched too: that takes less time than another request
REQUEST_BYTES, FLUSHED_BYTES = 1 << 24, 1 << 26
MAX_FILE, MAX_WHOLE = 1 << 40, 1 << 30
PAGE = 4096  # the file begins at a multiple of it
DESCRIPTORS = 64  # far below the usual limit on open files
REQUESTS = 16  # at once, of indexes
WAIT_S = 0.02  # for another process that fetches the same file
FREE_PART = 0.5  # of the disk, where no size is given
SHA256 = re.compile("[0-9a-f]{64}")
Pieces = Sequence[tuple[int, int]]  # offsets and sizes


@dataclass(frozen=True)
class Cache:
    """A folder, and how much of shards it may hold; 0 for half of what is free on its disk."""

    folder: Path
    max_bytes: int = 0

    @property
    def blocks(self) -> Path:
        return self.folder / "blocks"

    def limit(self) -> int:
        """Bytes that shards may take, but for one that each worker may be reading."""
        return self.max_bytes or self._part_of_disk(self._held())

    def _part_of_disk(self, held: dict[Path, tuple[int, float]]) -> int:
        folder = next(each for each in (self.folder, *self.folder.parents) if each.is_dir())
        return int(
            FREE_PART * (shutil.disk_usage(folder).free + sum(n_bytes for n_bytes, _ in held.values()))
        )

    def _held(self) -> dict[Path, tuple[int, float]]:
        """Bytes on disk, and time of the last write, of each file of blocks."""
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self.blocks):
                with contextlib.suppress(FileNotFoundError):  # another process made room
                    status = entry.stat()
                    found[Path(entry.path)] = status.st_blocks * 512, status.st_mtime
        return found

    def make_room(self, kept: Collection[Path], kept_bytes: int, used: Sequence[Path] = ()) -> None:
        """Delete files until those that are `kept`, when they are all here, and the others fit.

        First what this process has not used, the oldest first: it is of other data. Then what it has used
        last: all shards come again once an epoch, so a part that stays serves more of the next epoch than the
        newest would.

        Args:
            kept_bytes: of the files in `kept`.
            used: files that this process has used, in this order.
        """
        held = self._held()
        limit = self.max_bytes or self._part_of_disk(held)
        held = {path: found for path, found in held.items() if path not in kept}
        total = kept_bytes + sum(n_bytes for n_bytes, _ in held.values())
        last_use = {path: number for number, path in enumerate(used)}
        foreign = sorted(held.keys() - last_use.keys(), key=lambda path: held[path][1])
        own = sorted(held.keys() & last_use.keys(), key=last_use.__getitem__, reverse=True)
        for path in [*foreign, *own]:
            if total <= limit:
                return
            if _unlink_unlocked(path):
                total -= held[path][0]


CACHES = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cliptune"
_chosen = Cache(CACHES / "shards")


def choose(folder: str, gb: float) -> None:
    """The cache of this process, for what it opens from here on.

    Args:
        folder: "" for the one in the user's cache folder.
        gb: 10^9 bytes; 0 for half of what is free.

    Raises:
        UserError: the folder is a URL.
    """
    global _chosen
    if is_url(folder):
        raise UserError(f"--cache-dir {folder}: must be a folder of this machine")
    _chosen = Cache(Path(folder) if folder else _chosen.folder, int(gb * 1e9))


def chosen() -> Cache:
    return _chosen


@dataclass(frozen=True)
class CachedFile:
    """A file of a store, read through the cache.

    Attributes:
        size: in bytes.
        digest: its sha256.
    """

    store: Store
    name: str
    size: int
    digest: str
    cache: Cache

    @property
    def path(self) -> Path:
        """Of its blocks."""
        return self.cache.blocks / self.digest

    def __str__(self) -> str:
        return f"{self.store.shown}/{self.name}"

    @property
    def n_blocks(self) -> int:
        return -(-self.size // BLOCK)

    @property
    def start(self) -> int:
        """Where the file begins, after the bytes for its blocks."""
        return -(-self.n_blocks // PAGE) * PAGE

    def read(self, offset: int, size: int, around: Callable[[], Pieces]) -> bytes:
        """A piece of the file.

        Args:
            around: what to fetch where it is not here: the piece, and what will be read next.

        Raises:
            UserError, Fault: as Store.read; the cache folder is full, or cannot be written to.
        """
        if offset + size > self.size:
            raise Short(str(self), f"ends before byte {offset + size}")
        for _ in range(3):  # another process may have made room in between
            descriptor = _descriptor(self.path)
            if descriptor is not None and self._has(descriptor, offset, size):
                return os.pread(descriptor, size, self.start + offset)
            _close(self.path)
            pieces = [(offset, size), *around()]
            self.cache.make_room({self.path}, self.bytes_of(pieces))
            self.fetch(pieces)
        raise Fault(f"{self.path}: is deleted as fast as it is fetched; pass a larger --cache-gb")

    def _has(self, descriptor: int, offset: int, size: int) -> bool:
        first, end = offset // BLOCK, -(-(offset + size) // BLOCK)
        return os.pread(descriptor, end - first, first).count(1) == end - first

    def fetch(self, pieces: Pieces) -> int:
        """Fetch what is not here of some pieces; another process that fetches from this file is waited for.

        Returns:
            Bytes that were fetched.
        """
        wanted = self._blocks_of(pieces)
        try:
            with self._opened() as descriptor:
                while (wanted & ~self._here(descriptor)).any():
                    with _locked(descriptor) as is_locked:
                        if is_locked:
                            return self._fetch_blocks(descriptor, wanted & ~self._here(descriptor))
                    time.sleep(WAIT_S)
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            fix = (
                "pass a smaller --cache-gb, or another --cache-dir" if is_full else "pass another --cache-dir"
            )
            kind = Fault if is_full else UserError
            raise kind(f"{self.path}: cannot be written ({error.strerror}); {fix}") from None
        return 0

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """The blocks, open for reading and writing, made where they are not here."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if os.fstat(descriptor).st_size != self.start + self.size:
                os.ftruncate(descriptor, self.start + self.size)
            yield descriptor
        finally:
            os.close(descriptor)

    def sha256(self) -> str:
        """Of all its bytes as the store has them."""
        digest = hashlib.sha256()
        for offset in range(0, self.size, REQUEST_BYTES):
            digest.update(self.store.read(self.name, offset, min(REQUEST_BYTES, self.size - offset)))
        return digest.hexdigest()

    def forget(self, offset: int, size: int) -> None:
        """Fetch the blocks of a piece anew when it is read again, because what is here is damaged."""
        first, end = offset // BLOCK, -(-(offset + size) // BLOCK)
        with contextlib.suppress(FileNotFoundError), open(self.path, "r+b") as file:
            os.pwrite(file.fileno(), bytes(end - first), first)

    def _here(self, descriptor: int) -> np.ndarray:
        return np.frombuffer(os.pread(descriptor, self.n_blocks, 0), bool)

    def _blocks_of(self, pieces: Pieces) -> np.ndarray:
        """bool [n_blocks]; pieces end where the file does, whatever an index says."""
        offsets, sizes = np.asarray(pieces, np.int64).reshape(-1, 2).T
        starts = np.minimum(offsets, self.size)
        change = np.zeros(self.n_blocks + 1, np.int64)
        np.add.at(change, starts // BLOCK, 1)
        np.add.at(change, -(-(starts + np.minimum(sizes, self.size - starts)) // BLOCK), -1)
        return np.cumsum(change[:-1]) > 0

    def bytes_of(self, pieces: Pieces) -> int:
        """That are here when some pieces are."""
        return BLOCK * sum(end - first for first, end in runs(self._blocks_of(pieces)))

    def _fetch_blocks(self, descriptor: int, missing: np.ndarray) -> int:
        fetched, pending, pending_bytes = 0, [], 0

        def flush() -> None:
            if pending:
                os.fsync(descriptor)  # a machine that loses power must not keep the byte without the block
            for first, end in pending:
                os.pwrite(descriptor, b"\1" * (end - first), first)
            pending.clear()

        for first, end in runs(missing):
            offset = first * BLOCK
            data = self.store.read(self.name, offset, min(end * BLOCK, self.size) - offset)
            os.pwrite(descriptor, data, self.start + offset)
            pending.append((first, end))
            fetched, pending_bytes = fetched + len(data), pending_bytes + len(data)
            if pending_bytes >= FLUSHED_BYTES:
                flush()
                pending_bytes = 0
        flush()
        return fetched


def runs(missing: np.ndarray) -> Iterator[tuple[int, int]]:
    """First block and end of each request for the missing blocks; small gaps are fetched too.

    Args:
        missing: bool [n_blocks].
    """
    numbers = np.flatnonzero(missing)
    if not len(numbers):
        return
    cuts = np.flatnonzero(np.diff(numbers) > 1 + MERGED_BLOCKS)
    starts, ends = numbers[np.r_[0, cuts + 1]], numbers[np.r_[cuts, len(numbers) - 1]] + 1
    most = REQUEST_BYTES // BLOCK
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        for first in range(start, end, most):
            yield first, min(first + most, end)


def whole_files(store: Store, files: Sequence[tuple[str, str]], label: str) -> list[Path]:
    """Small files of a store as files of this machine, each with the bytes that it had when it was built.

    Args:
        files: name and sha256 of each.
        label: of the progress bar.

    Raises:
        UserError: one is missing, or altered.
    """
    folder = chosen().folder / "whole"
    paths = [folder / _checked(store, name, digest) for name, digest in files]
    missing = [(*each, path) for each, path in zip(files, paths, strict=True) if not path.is_file()]
    if missing:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / ".lock", "a") as lock:  # one rank of a node fetches, the others find
                fcntl.flock(lock, fcntl.LOCK_EX)
                missing = [each for each in missing if not each[2].is_file()]
                with ThreadPoolExecutor(REQUESTS) as pool:
                    fetched = pool.map(lambda each: _fetch_whole(store, *each), missing)
                    for _ in progress(fetched, total=len(missing), desc=label, unit="file", delay=2):
                        pass
        except OSError as error:
            kind = Fault if error.errno in (errno.ENOSPC, errno.EDQUOT) else UserError
            raise kind(f"{folder}: cannot be written ({error.strerror}); pass another --cache-dir") from None
    return paths


def _fetch_whole(store: Store, name: str, digest: str, path: Path) -> None:
    try:
        data = store.read_whole(name, MAX_WHOLE)
    except FileNotFoundError:
        raise UserError(
            f"{store.shown}/{name}: missing, but listed in the manifest; upload it again, or build again"
        ) from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise UserError(
            f"{store.shown}/{name}: altered since it was built (its sha256 is not the manifest's); upload it"
            " again, or build again"
        )
    with atomic_file(path) as partial:
        partial.write_bytes(data)


def cached_file(store: Store, name: str, size: int, digest: str) -> CachedFile:
    """A shard of a store.

    Args:
        digest: its sha256.

    Raises:
        UserError: the manifest's values are none of a shard.
    """
    if size > MAX_FILE:
        raise UserError(f"{store.shown}/{name}: {size:,} bytes are more than a shard may have; build again")
    store.url_of(name)
    return CachedFile(store, name, size, _checked(store, name, digest), chosen())


def _checked(store: Store, name: str, digest: str) -> str:
    if not SHA256.fullmatch(digest):
        raise UserError(f"{store.shown}: the manifest has no sha256 of {name!r:.80}; restore it")
    return digest


def is_only_node() -> bool:
    """Whether all processes of this job, as torchrun has started them, are on this machine."""
    return int(os.environ.get("WORLD_SIZE", "1")) <= ranks_here()


# Of this process, opened for reading. A child of a fork may use its parent's.
_descriptors: dict[Path, int] = {}


def _descriptor(path: Path) -> int | None:
    """The blocks of a file, open for reading; None if they are not here."""
    if path not in _descriptors:
        for other, descriptor in list(_descriptors.items()):
            # what was deleted takes room as long as it is open
            if len(_descriptors) >= DESCRIPTORS or not os.fstat(descriptor).st_nlink:
                _close(other)
        try:
            _descriptors[path] = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
    return _descriptors[path]


def _close(path: Path) -> None:
    if (descriptor := _descriptors.pop(path, None)) is not None:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(descriptor: int) -> Iterator[bool]:
    """Whether this process alone writes; True where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
        return
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        yield True
        return
    try:
        yield True
    finally:
        # Not by close(): a child that was forked meanwhile has the same open file, and with it the lock.
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _unlink_unlocked(path: Path) -> bool:
    """Delete a file that no process fetches into."""
    try:
        with open(path, "r+b") as file, _locked(file.fileno()) as is_locked:
            if not is_locked:
                return False
            path.unlink()
    except FileNotFoundError:
        pass
    return True
