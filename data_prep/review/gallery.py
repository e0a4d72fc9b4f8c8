"""The groups and images of one split, available while its indexes are still being read.

A thread reads one index after another and keeps 16 bytes per image, its group and its key. Groups are
numbered in the order in which they appear, so reading further only adds groups at the end. Captions and
images are read on request.
"""

import os
import threading
import time
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.shard_index import MIN_ROW_BYTES, Rows, key_text, read_indexes
from data_prep.shards import json_file, parse_meta, read_piece, shard_file
from data_prep.store.cache import CachedFile

CLOCK_EVERY = 256  # images between two readings of the clock


class Groups:
    """The groups of the first n images of a split.

    Args:
        groups: int64 [n], the group of each image.

    Attributes:
        n_images: n.
        listed: (largest_first, min_images) -> int64 [g], the groups of at least so many images, the largest
            first or in the order in which they appear.
    """

    def __init__(self, groups: np.ndarray):
        self.n_images = len(groups)
        self._members = np.argsort(groups, kind="stable").astype(np.int32)  # group by group
        ordered = groups[self._members]
        starts = (
            np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(groups) else np.zeros(0, np.int64)
        )
        self._names = ordered[starts]
        self._starts = np.r_[starts, len(groups)]
        self._by_first = np.argsort(self._members[starts]).astype(np.int32)
        self.listed = lru_cache(4)(self._listed)

    @cached_property
    def _by_size(self) -> np.ndarray:
        return self._by_first[np.argsort(-np.diff(self._starts)[self._by_first], kind="stable")]

    def _listed(self, largest_first: bool, min_images: int) -> np.ndarray:
        order = self._by_size if largest_first else self._by_first
        return self._names[order if min_images < 2 else order[np.diff(self._starts)[order] >= min_images]]

    def members(self, group: int) -> np.ndarray:
        """int32 [n]: the numbers of a group's images; empty if the group was not read yet."""
        position = int(np.searchsorted(self._names, group))
        if position == len(self._names) or self._names[position] != group:
            return self._members[:0]
        return self._members[self._starts[position] : self._starts[position + 1]]


class Gallery:
    """The images of one split; opening it takes no time, whatever its size.

    Args:
        entries: the split's shards, as the manifest has them.
    """

    def __init__(self, folder: Path, split: str, entries: list[dict]):
        self.folder, self.split, self.entries = folder, split, entries
        self._ends = np.cumsum([entry["samples"] for entry in entries], dtype=np.int64)
        indexes = (shard_file(folder, entry, "index") for entry in entries)
        sizes = [file.stat().st_size if file.is_file() else None for file in indexes]
        rows = 0 if None in sizes else sum(size // MIN_ROW_BYTES for size in sizes)
        if len(self) > rows and None not in sizes:  # memory is taken for so many
            raise UserError(
                f"{folder}: the manifest says {len(self):,} images in split {split!r}, but the indexes have"
                f" at most {rows:,}; build the shards again"
            )
        self._table = lru_cache(64)(lambda shard: self._rows_of(entries[shard]))
        self._keys = np.zeros(len(self), np.uint64)
        self._groups, self._error, self._has_read = Groups(np.zeros(0, np.int64)), None, threading.Event()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _read(self) -> None:
        try:
            groups, due = np.zeros(len(self), np.int64), 1
            for entry, end in zip(self.entries, self._ends.tolist(), strict=True):
                rows = self._rows_of(entry)
                groups[end - len(rows.keys) : end] = rows.groups
                self._keys[end - len(rows.keys) : end] = rows.keys
                # Groups sorts everything, so wait until it is twice as much
                if end >= due or end == len(self):
                    self._groups, due = Groups(groups[:end]), 2 * end
                    self._has_read.set()
        except UserError as error:
            self._error = error
        except OSError as error:
            self._error = UserError(
                f"{self.folder / entry['index']}: cannot be read ({error}); build the shards again"
            )
        self._has_read.set()

    def _rows_of(self, entry: dict) -> Rows:
        """The index of one shard."""
        return read_indexes([(shard_file(self.folder, entry, "index"), entry)])

    def groups(self) -> Groups:
        """The groups that have been read so far.

        Raises:
            UserError: an index cannot be read.
        """
        self._has_read.wait()
        if self._error:
            raise self._error
        return self._groups

    def all_keys(self) -> np.ndarray:
        """uint64 [n]: the keys of all images, once all indexes have been read.

        Raises:
            UserError: an index cannot be read.
        """
        self._reading.join()
        self.groups()
        return self._keys

    def key(self, number: int) -> str:
        """The key of an image that has been read."""
        return key_text(int(self._keys[number]))

    def find(self, key: str) -> int | None:
        """The number of the image with this key, among those that have been read."""
        matches = np.flatnonzero(self._keys[: self.groups().n_images] == np.uint64(int(key, 16)))
        return int(matches[0]) if len(matches) else None

    def meta(self, number: int) -> dict:
        """KEY.json of an image, and the number of its group as `group_number`."""
        entry, rows, row = self._row(number)
        file, key = json_file(self.folder, entry), key_text(int(rows.keys[row]))
        meta = parse_meta(_read_piece(file, *rows.offsets[row, 2:].tolist()), file, key)
        return {"image": "", **meta, "key": key, "group_number": int(rows.groups[row])}

    def image(self, number: int) -> bytes:
        """The stored bytes of an image."""
        entry, rows, row = self._row(number)
        return _read_piece(shard_file(self.folder, entry), *rows.offsets[row, :2].tolist())

    def _row(self, number: int) -> tuple[dict, Rows, int]:
        """The shard of an image, its index, and the image's row there."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return self.entries[shard], self._table(shard), number - (int(self._ends[shard - 1]) if shard else 0)

    def search(
        self, text: str, several: bool, start: int, seconds: float
    ) -> Iterator[tuple[int, int | None]]:
        """Search image by image, from number `start` on, for at most `seconds`.

        Args:
            text: to find in a caption or the image's name, in any case.
            several: only images with more captions than one.

        Yields:
            The number of the next image, and the group of this one if it matches, else None.
        """
        until, text, number = time.monotonic() + seconds, text.casefold(), start
        while number < len(self):
            shard = int(np.searchsorted(self._ends, number, side="right"))
            entry, rows = self.entries[shard], self._table(shard)
            start = number - (int(self._ends[shard]) - len(rows.keys))
            columns = rows.keys[start:], rows.groups[start:], rows.offsets[start:, 2:]
            with _OpenFile(json_file(self.folder, entry)) as file:
                for key, group, piece in zip(*(column.tolist() for column in columns), strict=True):
                    meta = parse_meta(file.read(*piece), file.path, key_text(key))
                    matches = len(meta["captions"]) > several and any(
                        text in candidate.casefold()
                        for candidate in (*meta["captions"], meta.get("image", ""))
                    )
                    number += 1
                    yield number, group if matches else None
                    if number % CLOCK_EVERY == 0 and time.monotonic() > until:
                        return


class _OpenFile:
    """Reads pieces of a file.

    Raises:
        UserError: it does not exist any more, or is too short.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> "_OpenFile":
        try:
            self._file = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be read any more ({error.strerror}); restart review"
            ) from None
        return self

    def __exit__(self, *_) -> None:
        os.close(self._file)

    def read(self, offset: int, size: int) -> bytes:
        return read_piece(self._file, self.path, offset, size)


def _read_piece(path: Path | CachedFile, offset: int, size: int) -> bytes:
    if isinstance(path, CachedFile):  # of a tar that was indexed behind a URL
        return path.read(offset, size, tuple)
    with _OpenFile(path) as file:
        return file.read(offset, size)
