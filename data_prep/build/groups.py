"""Images of the same thing share a group, and near-identical images in different splits are found.

Two images share a group if they share a link: a cell of the group column, equal pixels, an equal caption or,
on request, a base name; links are transitive. Memory: four bytes per row of input; links are sorted on disk.
"""

import os
import re
import sqlite3
import struct
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from data_prep.build.database import select

MAX_SHARERS = 50  # a caption or base name of more images than this is too general ("icon") to join them
GROUP, PIXELS, CAPTION, NAME = range(4)  # kinds of links, in the lowest two bits
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

LEAK_BITS = 7  # of 256: images whose phashes differ in at most this many bits are compared by their pixels
LEAK_DIFFERENCE = 0.05  # of images.difference: at most this between near-identical images
LEAK_EDGE = 16  # of 255: and at most this between the mean colors of their top rows
BANDS = 8  # 7 differing bits cannot touch all 8 bands, so near-identical images agree in at least one
MAX_BAND_IMAGES = 200  # if more images agree in a band, they are not compared pair by pair
SLICE = 500_000  # images whose phashes are sorted at once


class Link(NamedTuple):
    """A row of the table `links`: images with the same link share a group."""

    link: int
    ordinal: int


def normal_caption(caption: str) -> str:
    """A caption without case, typographic variants, and punctuation at its ends."""
    return " ".join(unicodedata.normalize("NFKC", caption).casefold().split()).strip(" .,;:!?\"'")


def base_name(image: str) -> str:
    """An image's name without size, number and style: ArrowRight18.png and ArrowRight_24_N.svg.png both give
    "arrow right". Empty if no word is left, as in 000123.jpg.
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
    """The links of an image: hashes of 63 bits, with the kind of link in the lowest two."""
    texts = [(GROUP, group) for group in groups]
    texts += [(CAPTION, text) for caption in captions if (text := normal_caption(caption))]
    if by_name and (name := base_name(image)):
        texts.append((NAME, name))
    hashes = {xxhash.xxh3_64_intdigest(f"{kind} {text}".encode()) >> 3 << 2 | kind for kind, text in texts}
    if pixels:
        hashes.add(xxhash.xxh3_64_intdigest(pixels) >> 3 << 2 | PIXELS)
    return hashes


class Groups:
    """Rows joined into groups (union-find). A group is identified by its first row, so adding rows at the end
    does not rename groups.
    """

    def __init__(self, rows: int):
        self._parent = array("i", range(rows + 1))

    def first(self, row: int) -> int:
        """The first row of the group of `row`."""
        parent = self._parent
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    def join(self, a: int, b: int) -> None:
        a, b = self.first(a), self.first(b)
        if a != b:
            self._parent[max(a, b)] = min(a, b)


class Shared(NamedTuple):
    """A caption or base name that joins nothing, as too many images share it."""

    images: int
    link: int
    ordinal: int  # of the first of these images


class FoundGroups(NamedTuple):
    """What find_groups() found.

    Attributes:
        too_common: how many captions and names are ignored, as more than MAX_SHARERS images share them.
        most_common: of these, the caption and the name of the most images; only where there is one.
    """

    groups: Groups
    too_common: dict[str, int]
    most_common: dict[str, Shared]


def find_groups(db: sqlite3.Connection, rows: int, excluded: set[int]) -> FoundGroups:
    """Groups from the table `links`.

    Args:
        excluded: ordinals of images that join no groups.
    """
    groups, too_common, most_common = Groups(rows), dict.fromkeys(LIMITED.values(), 0), {}
    all_links = select(db, Link, "FROM links ORDER BY link, ordinal")
    for link, same in groupby(all_links, attrgetter("link")):
        members = (entry.ordinal for entry in same if entry.ordinal not in excluded)
        if link & 3 in LIMITED:
            few, what = list(islice(members, MAX_SHARERS + 1)), LIMITED[link & 3]
            if len(few) > MAX_SHARERS:
                too_common[what] += 1
                shared = Shared(len(few) + sum(1 for _ in members), link, few[0])
                most_common[what] = max(most_common.get(what, shared), shared, key=attrgetter("images"))
                continue
            members = iter(few)
        first = next(members, 0)
        for member in members:
            groups.join(first, member)
    return FoundGroups(groups, too_common, most_common)


class Candidate(NamedTuple):
    """Two images of similar phashes, the first of an earlier split (train, val, test)."""

    a: int  # ordinals
    b: int
    bits: int  # that differ


class PHashIndex:
    """The phashes of all images, in a file; finds candidates for near-identical images in different splits.

    The 256 bits are cut into BANDS bands; images that agree in a band are compared. Memory: five bytes per
    image, and one slice of the images.
    """

    RECORD = np.dtype([("bits", "u1", (4, BANDS)), ("edge", "u1", 3), ("ordinal", "<i4"), ("split", "u1")])

    def __init__(self, path: Path):
        self.path, self._pending = path, []
        path.unlink(missing_ok=True)

    def add(self, phash: bytes, ordinal: int, split: int) -> None:
        self._pending.append(phash + struct.pack("<iB", ordinal, split))
        if len(self._pending) == 10_000:
            self._flush()

    def _flush(self) -> None:
        with open(self.path, "ab") as file:
            file.write(b"".join(self._pending))
        self._pending.clear()

    def candidates(self) -> Iterator[Candidate]:
        """Every pair of images in different splits that differs by at most LEAK_BITS and LEAK_EDGE, once."""
        self._flush()
        splits = self._column(np.dtype("u1"), lambda records: records["split"])
        slices = 1 + len(splits) // SLICE
        for band in range(BANDS):
            values = self._column(
                np.dtype("<u4"),
                lambda records, band=band: (
                    np.ascontiguousarray(records["bits"][:, :, band]).view("<u4").ravel()
                ),
            )
            for part in range(slices):
                chosen = np.flatnonzero(values.view("u1")[::4] % slices == part).astype(np.int32)
                order = chosen[np.argsort(values[chosen], kind="stable")]
                for members in _runs(values[order], order):
                    if (splits[members] != splits[members[0]]).any():
                        yield from self._pairs(members, band)

    def _column(self, dtype: np.dtype, column_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """One column of all records; read in blocks, because a memory-mapped file would count as memory."""
        column, start = np.empty(self.path.stat().st_size // self.RECORD.itemsize, dtype), 0
        with open(self.path, "rb") as file:
            while len(records := np.fromfile(file, self.RECORD, 50_000)):
                column[start : start + len(records)] = column_of(records)
                start += len(records)
        return column

    def _pairs(self, members: np.ndarray, band: int) -> Iterator[Candidate]:
        with open(self.path, "rb") as file:
            data = b"".join(
                os.pread(file.fileno(), self.RECORD.itemsize, int(member) * self.RECORD.itemsize)
                for member in members
            )
        records = np.frombuffer(data, self.RECORD)
        bits = records["bits"]
        a, b = np.nonzero(records["split"][:, None] < records["split"][None, :])
        differing = np.bitwise_count(bits[a] ^ bits[b]).sum((1, 2))
        # A pair that agrees in several bands is yielded for the first of them only.
        first_band = (bits[a] == bits[b]).all(1).argmax(1)
        edges = records["edge"].astype(np.int16)
        near = np.abs(edges[a] - edges[b]).max(1, initial=0) <= LEAK_EDGE
        for pair in np.flatnonzero((differing <= LEAK_BITS) & (first_band == band) & near):
            ordinals = records["ordinal"]
            yield Candidate(int(ordinals[a[pair]]), int(ordinals[b[pair]]), int(differing[pair]))


def _runs(values: np.ndarray, numbers: np.ndarray) -> Iterator[np.ndarray]:
    """The numbers of each run of 2 to MAX_BAND_IMAGES equal values; `values` is sorted."""
    same = np.flatnonzero(values[1:] == values[:-1])  # few, which keeps the arrays below small
    breaks = np.flatnonzero(np.diff(same) != 1)
    for start, end in zip(np.r_[0, breaks + 1], np.r_[breaks, len(same) - 1], strict=True):
        if len(same) and end - start + 2 <= MAX_BAND_IMAGES:
            yield numbers[same[start] : same[end] + 2]
