"""The groups and pictures of one split, of any size, while its indexes are still being read.

A thread reads index after index and keeps 16 bytes of each picture, its group and its key. What was read so
far can be looked
at: groups are numbered as they first appear, so that more of them only come below. Captions and pictures are
    read when asked for.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.shards import read_index

PATIENCE = 256  # pictures between two looks at the clock


class Groups:
    """The groups of the first pictures of a split.

    Args:
        groups: int64 [n], the group of each picture.

    Attributes:
        looked_at: n.
        listed: (largest_first, least) -> int64 [g], the groups of at least so many pictures, the largest
            first or as they appear.
    """

    def __init__(self, groups: np.ndarray):
        self.looked_at = len(groups)
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

    def _listed(self, largest_first: bool, least: int) -> np.ndarray:
        order = self._by_size if largest_first else self._by_first
        return self._names[order if least < 2 else order[np.diff(self._starts)[order] >= least]]

    def members(self, group: int) -> np.ndarray:
        """int32 [n]: the numbers of a group's pictures; none where the group was not met yet."""
        at = int(np.searchsorted(self._names, group))
        if at == len(self._names) or self._names[at] != group:
            return self._members[:0]
        return self._members[self._starts[at] : self._starts[at + 1]]


class Gallery:
    """One split, opened at once whatever its size; see the module.

    Args:
        entries: the split's shards, as the manifest has them.
    """

    def __init__(self, folder: Path, split: str, entries: list[dict]):
        self.folder, self.split, self.entries = folder, split, entries
        self._ends = np.cumsum([entry["samples"] for entry in entries], dtype=np.int64)
        self._table = lru_cache(64)(lambda at: read_index(folder, entries[at]))
        self._keys = np.zeros(len(self), np.uint64)
        self._groups, self._error, self._begun = Groups(np.zeros(0, np.int64)), None, threading.Event()
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
                if end >= due or end == len(
                    self
                ):  # all of it is sorted each time, so each time it is twice as much
                    self._groups, due = Groups(groups[:end]), 2 * end
                    self._begun.set()
        except UserError as error:
            self._error = error
        except (ValueError, OSError) as error:
            self._error = UserError(
                f"{self.folder / entry['index']}: cannot be read ({error}); build the shards again"
            )
        self._begun.set()

    def groups(self) -> Groups:
        """What is known by now of the groups.

        Raises:
            UserError: an index cannot be read.
        """
        self._begun.wait()
        if self._error:
            raise self._error
        return self._groups

    def key(self, number: int) -> str:
        """The key of a picture among those that were looked at."""
        return f"{int(self._keys[number]):016x}"

    def find(self, key: str) -> int | None:
        """The number of the picture with this key, among those that were looked at."""
        found = np.flatnonzero(self._keys[: self.groups().looked_at] == np.uint64(int(key, 16)))
        return int(found[0]) if len(found) else None

    def meta(self, number: int) -> dict:
        """KEY.json of a picture, and its group's number as `group_number`."""
        entry, keys, row = self._row(number)
        meta = json.loads(_bytes(self.folder / entry.get("json", entry["file"]), row[3:5]))
        return {**meta, "key": str(keys), "group_number": int(row[0])}

    def image(self, number: int) -> bytes:
        """The stored bytes of a picture."""
        entry, _, row = self._row(number)
        return _bytes(self.folder / entry["file"], row[1:3])

    def _row(self, number: int) -> tuple[dict, str, list[int]]:
        at = int(np.searchsorted(self._ends, number, side="right"))
        keys, table = self._table(at)
        row = number - (int(self._ends[at - 1]) if at else 0)
        return self.entries[at], keys[row], table[row].tolist()

    def search(self, text: str, several: bool, at: int, seconds: float) -> Iterator[tuple[int, int | None]]:
        """(number + 1, group or None) of picture after picture from number `at` on, for so long.

        The group is given where a caption or the image's name holds `text` in any case, and, if `several`,
        there are more captions than one."""
        until, text = time.monotonic() + seconds, text.casefold()
        while at < len(self):
            shard = int(np.searchsorted(self._ends, at, side="right"))
            entry, table = self.entries[shard], self._table(shard)[1]
            first = int(self._ends[shard]) - len(table)
            with _Open(self.folder / entry.get("json", entry["file"])) as file:
                for row in table[at - first :].tolist():
                    meta = json.loads(file.read(row[3:5]))
                    fits = len(meta["captions"]) > several and any(
                        text in each.casefold() for each in (*meta["captions"], meta["image"])
                    )
                    at += 1
                    yield at, row[0] if fits else None
                    if at % PATIENCE == 0 and time.monotonic() > until:
                        return


class _Open:
    """A file to read pieces of.

    Raises:
        UserError: it is gone, or ends too early.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> "_Open":
        try:
            self._file = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be read any more ({error.strerror}); start review again"
            ) from None
        return self

    def __exit__(self, *_) -> None:
        os.close(self._file)

    def read(self, place: list[int]) -> bytes:
        offset, size = place
        data = os.pread(self._file, size, offset)
        if len(data) != size:
            raise UserError(f"{self.path}: ends before byte {offset + size}; build the shards again")
        return data


def _bytes(path: Path, place: list[int]) -> bytes:
    with _Open(path) as file:
        return file.read(place)
