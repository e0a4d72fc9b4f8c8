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
from data_prep.shards import json_file, parse_meta, read_index, read_piece, shard_file

MIN_ROW_BYTES = 31  # of an index: a key of 16 digits, seven numbers, and what separates them
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
        self._table = lru_cache(64)(lambda shard: read_index(folder, entries[shard]))
        self._keys = np.zeros(len(self), np.uint64)
        self._groups, self._error, self._has_read = Groups(np.zeros(0, np.int64)), None, threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _read(self) -> None:
        try:
            groups, due = np.zeros(len(self), np.int64), 1
            for entry, end in zip(self.entries, self._ends.tolist(), strict=True):
                keys, table = read_index(self.folder, entry)
                groups[end - len(keys) : end] = table[:, 0]
                self._keys[end - len(keys) : end] = np.frombuffer(bytes.fromhex("".join(keys)), ">u8")
                # Groups sorts everything, so wait until it is twice as much
                if end >= due or end == len(self):
                    self._groups, due = Groups(groups[:end]), 2 * end
                    self._has_read.set()
        except UserError as error:
            self._error = error
        except (ValueError, OSError) as error:
            self._error = UserError(
                f"{self.folder / entry['index']}: cannot be read ({error}); build the shards again"
            )
        self._has_read.set()

    def groups(self) -> Groups:
        """The groups that have been read so far.

        Raises:
            UserError: an index cannot be read.
        """
        self._has_read.wait()
        if self._error:
            raise self._error
        return self._groups

    def key(self, number: int) -> str:
        """The key of an image that has been read."""
        return f"{int(self._keys[number]):016x}"

    def find(self, key: str) -> int | None:
        """The number of the image with this key, among those that have been read."""
        matches = np.flatnonzero(self._keys[: self.groups().n_images] == np.uint64(int(key, 16)))
        return int(matches[0]) if len(matches) else None

    def meta(self, number: int) -> dict:
        """KEY.json of an image, and the number of its group as `group_number`."""
        entry, keys, row = self._row(number)
        file = json_file(self.folder, entry)
        meta = parse_meta(_read_piece(file, *row[3:5]), file, str(keys))
        return {"image": "", **meta, "key": str(keys), "group_number": int(row[0])}

    def image(self, number: int) -> bytes:
        """The stored bytes of an image."""
        entry, _, row = self._row(number)
        return _read_piece(shard_file(self.folder, entry), *row[1:3])

    def _row(self, number: int) -> tuple[dict, str, list[int]]:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        keys, table = self._table(shard)
        row = number - (int(self._ends[shard - 1]) if shard else 0)
        return self.entries[shard], keys[row], table[row].tolist()

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
            entry, (keys, table) = self.entries[shard], self._table(shard)
            first = int(self._ends[shard]) - len(table)
            with _OpenFile(json_file(self.folder, entry)) as file:
                for row in table[number - first :].tolist():
                    meta = parse_meta(file.read(*row[3:5]), file.path, str(keys[number - first]))
                    matches = len(meta["captions"]) > several and any(
                        text in candidate.casefold()
                        for candidate in (*meta["captions"], meta.get("image", ""))
                    )
                    number += 1
                    yield number, row[0] if matches else None
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


def _read_piece(path: Path, offset: int, size: int) -> bytes:
    with _OpenFile(path) as file:
        return file.read(offset, size)
