"""Images that show the same thing share a group, and look-alikes across splits are found.

Two images share a group if they share a link: the group column, equal pixels, an equal caption or, on
request, a base name; and so do all that are joined over others. Memory: four bytes per row of input; links
are sorted on disk."""

import os
import re
import sqlite3
import struct
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import xxhash

MAX_SHARERS = 50  # a caption or base name of more images than this says "icon", not "the same icon"
GROUP, PIXELS, CAPTION, NAME = range(4)
LIMITED = {CAPTION: "captions", NAME: "names"}
STYLES = {
    "filled",
    "fill",
    "outline",
    "outlined",
    "solid",
    "regular",
    "line",
    "thin",
    "light",
    "bold",
    "duotone",
    "sharp",
    "rounded",
}

# of 256: up to this many may differ between the looks of two images that are then compared by their pixels
LEAK_BITS = 7
LEAK_DIFFERENCE = 0.05  # of images.difference: up to this, two images are called near-identical
LEAK_EDGE = 16  # of 255; and the mean colors of their upper edges
BANDS = 8  # 7 differing bits cannot touch all of 8 bands, so near-identical images agree in one
RARE = 200  # images that agree in a band, at most, to be compared one by one
SLICE = 500_000  # images whose looks are sorted at once


def normal_caption(caption: str) -> str:
    """A caption without case, typographic variants, and punctuation at its ends."""
    return " ".join(unicodedata.normalize("NFKC", caption).casefold().split()).strip(" .,;:!?\"'")


def base_name(image: str) -> str:
    """An image's name without size, number and style: ArrowRight18.png and ArrowRight_24_N.svg.png -> "arrow
    right".

    Empty where nothing that names a thing is left, as in 000123.jpg.
    """
    stem = os.path.basename(image).split(".")[0]
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_]+|\d+(?:px|x)?", stem)
    words = [word.lower() for word in words]
    while len(words) > 1 and (
        words[-1] in STYLES or len(words[-1]) == 1 or words[-1][0].isdigit() or words[-1] == "px"
    ):
        words.pop()
    return " ".join(words) if words and not words[0][0].isdigit() else ""


def links(
    image: str, groups: Iterable[str], captions: Iterable[str], pixels: bytes, by_name: bool
) -> set[int]:
    """Numbers (63 bits; the kind in the lowest two) that this image has in common with those it belongs to."""
    found = [(GROUP, group) for group in groups] + [
        (CAPTION, text) for caption in captions if (text := normal_caption(caption))
    ]
    if by_name and (name := base_name(image)):
        found.append((NAME, name))
    hashes = {xxhash.xxh3_64_intdigest(f"{kind} {text}".encode()) >> 3 << 2 | kind for kind, text in found}
    if pixels:
        hashes.add(xxhash.xxh3_64_intdigest(pixels) >> 3 << 2 | PIXELS)
    return hashes


class Groups:
    """Rows joined into groups (union-find); a group is known by its first row, so rows that are added later
    rename nothing.
    """

    def __init__(self, rows: int):
        self._parent = array("i", range(rows + 1))

    def first(self, row: int) -> int:
        parent = self._parent
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    def join(self, a: int, b: int) -> None:
        a, b = self.first(a), self.first(b)
        if a != b:
            self._parent[max(a, b)] = min(a, b)


def unite(db: sqlite3.Connection, rows: int, without: set[int]) -> tuple[Groups, dict[str, int]]:
    """Groups from the table `links` (link, ordinal); and how many captions and names were shared by too many
    to mean the same.
    """
    groups, common = Groups(rows), dict.fromkeys(LIMITED.values(), 0)
    cursor = db.cursor().execute("SELECT link, ordinal FROM links ORDER BY link, ordinal")
    for link, found in groupby(cursor, itemgetter(0)):
        members = (ordinal for _, ordinal in found if ordinal not in without)
        if link & 3 in LIMITED:
            members = list(islice(members, MAX_SHARERS + 1))
            if len(members) > MAX_SHARERS:
                common[LIMITED[link & 3]] += 1
                continue
            members = iter(members)
        first = next(members, 0)
        for member in members:
            groups.join(first, member)
    return groups, common


class Looks:
    """The looks of all images, in a file; finds the candidates for near-identical ones in different splits.

    Memory: five bytes per image, and what one slice of the images takes.
    """

    RECORD = np.dtype([("look", "u1", (4, BANDS)), ("edge", "u1", 3), ("ordinal", "<i4"), ("split", "u1")])

    def __init__(self, path: Path):
        self.path, self._pending = path, []
        path.unlink(missing_ok=True)

    def add(self, look: bytes, ordinal: int, split: int) -> None:
        self._pending.append(look + struct.pack("<iB", ordinal, split))
        if len(self._pending) == 10_000:
            self._flush()

    def _flush(self) -> None:
        with open(self.path, "ab") as file:
            file.write(b"".join(self._pending))
        self._pending.clear()

    def candidates(self) -> Iterator[tuple[int, int, int]]:
        """(ordinal, ordinal, differing bits): images of like looks, the first of an earlier split (train,
        val, test).
        """
        self._flush()
        splits = self._column(np.dtype("u1"), lambda records: records["split"])
        slices = 1 + len(splits) // SLICE
        for band in range(BANDS):
            values = self._column(
                np.dtype("<u4"),
                lambda records: np.ascontiguousarray(records["look"][:, :, band]).view("<u4").ravel(),
            )
            for part in range(slices):
                chosen = np.flatnonzero(values.view("u1")[::4] % slices == part).astype(np.int32)
                order = chosen[np.argsort(values[chosen], kind="stable")]
                for members in _runs(values[order], order):
                    if (splits[members] != splits[members[0]]).any():
                        yield from self._pairs(members, band)

    def _column(self, dtype: np.dtype, of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """One column of all records; read in blocks, because a mapped file would count as memory."""
        column, at = np.empty(self.path.stat().st_size // self.RECORD.itemsize, dtype), 0
        with open(self.path, "rb") as file:
            while len(records := np.fromfile(file, self.RECORD, 50_000)):
                column[at : at + len(records)] = of(records)
                at += len(records)
        return column

    def _pairs(self, members: np.ndarray, band: int) -> Iterator[tuple[int, int, int]]:
        with open(self.path, "rb") as file:
            data = b"".join(
                os.pread(file.fileno(), self.RECORD.itemsize, int(member) * self.RECORD.itemsize)
                for member in members
            )
        records = np.frombuffer(data, self.RECORD)
        bits = records["look"]
        a, b = np.nonzero(records["split"][:, None] < records["split"][None, :])
        differing = np.bitwise_count(bits[a] ^ bits[b]).sum((1, 2))
        first = (
            (bits[a] == bits[b]).all(1).argmax(1)
        )  # a pair that agrees in several bands is told in the first of them
        edges = records["edge"].astype(np.int16)
        near = np.abs(edges[a] - edges[b]).max(1, initial=0) <= LEAK_EDGE
        for at in np.flatnonzero((differing <= LEAK_BITS) & (first == band) & near):
            yield int(records["ordinal"][a[at]]), int(records["ordinal"][b[at]]), int(differing[at])


def _runs(values: np.ndarray, numbers: np.ndarray) -> Iterator[np.ndarray]:
    """The numbers of each run of equal (sorted) values, where it is not of one or of too many."""
    same = np.flatnonzero(values[1:] == values[:-1])  # few: this is what keeps the arrays below small
    breaks = np.flatnonzero(np.diff(same) != 1)
    for start, end in zip(np.r_[0, breaks + 1], np.r_[breaks, len(same) - 1], strict=True):
        if len(same) and end - start + 2 <= RARE:
            yield numbers[same[start] : same[end] + 2]
