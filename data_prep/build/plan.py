"""Checked parts become a deterministic plan: which images are included, their groups and their splits."""

import heapq
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.build.database import Record, insert, select, select_one
from data_prep.build.groups import LEAK_DIFFERENCE, Link, PHashIndex, base_name, find_groups, links
from data_prep.build.options import Splitting
from data_prep.build.records import Ignored, Part, Reject, StoredImage, StoredRow
from data_prep.build.scan import locate
from data_prep.build.split import SPLITS, split_of
from data_prep.errors import UserError
from data_prep.images import BadImage, difference, thumbnail
from data_prep.inputs.locations import ImageLocation, read_local
from data_prep.inputs.names import Problem
from data_prep.progress import progress
from data_prep.shards import Shards, read_manifest
from data_prep.store.remote import place_of

SCHEMA = """
CREATE TABLE links (link INTEGER, ordinal INTEGER);
CREATE TABLE rejects (ordinal INTEGER PRIMARY KEY, input INTEGER, line INTEGER, image TEXT, reason TEXT,
                      detail TEXT, caption TEXT);
CREATE TABLE kept_splits (key TEXT PRIMARY KEY, split INTEGER) WITHOUT ROWID;
CREATE TABLE leaks (a INTEGER, b INTEGER, difference REAL);
"""


NEAR_HELD_OUT = "near-identical to held-out"
SEEDS, MANY_GROUPS = 1000, 10_000  # seeds that are tried to fill all splits; of more groups, none is empty


class PlannedImage(NamedTuple):
    """An image that is included.

    Attributes:
        part: number of the part that it is in.
        ordinal ... length: see records.StoredImage.
        group: the first row of its group.
        group_name: of that row, the cell of the group column, or "image:" and the image's name.
    """

    part: int
    key: str
    ordinal: int
    image: str
    captions: list[str]
    weights: list[float]
    columns: str
    extension: str
    width: int
    height: int
    content: bytes
    fixes: list[str]
    container: int | None
    offset: int | None
    length: int | None
    group: int
    group_name: str
    split: str


class Leak(NamedTuple):
    """A row of the table `leaks`: near-identical images, the first of an earlier split."""

    a: int  # ordinals of the images' first rows
    b: int
    difference: float  # see data_prep.images.difference


class _KeptSplit(NamedTuple):
    key: str
    split: int  # 1 + the number of the split in SPLITS


# Columns of the table `images`, for passes over all images.


class _Ordinal(NamedTuple):
    ordinal: int


class _Linked(NamedTuple):
    ordinal: int
    image: str
    groups: str
    captions: str
    pixels: bytes


class _Assigned(NamedTuple):
    key: str
    ordinal: int
    split: str


class _Named(NamedTuple):
    ordinal: int
    image: str
    groups: str


class _Hashed(NamedTuple):
    ordinal: int
    phash: bytes


class _Leaking(NamedTuple):
    a: int


class Plan:
    """Groups and splits of the images of all parts.

    Args:
        root: the folder or URL that image paths are relative to.

    Attributes:
        rows: rows of all inputs, each a pair of image and caption.
        lines: of the inputs, or images of folders and tars, that these pairs are of.
        too_common: how many captions and base names are shared by too many images to join them.
        n_images: images of each split.
    """

    def __init__(self, folder: Path, parts: list[Part], splitting: Splitting, inputs: list[str], root: str):
        self.parts, self.splitting, self.inputs, self.root = parts, splitting, inputs, root
        self._thumbnail_cached = lru_cache(4096)(self._thumbnail)  # 12 MB
        self.rows, self.lines = (int(parts[0].get(f"total_{what}")) for what in ("rows", "lines"))
        # The plan is made without a journal, so a file that is left from a kill may be damaged.
        (folder / "plan.sqlite").unlink(missing_ok=True)
        self.db = sqlite3.connect(folder / "plan.sqlite", isolation_level=None)
        self.db.executescript(f"PRAGMA synchronous = OFF; PRAGMA journal_mode = OFF; {SCHEMA}")
        self._excluded: set[int] = set()
        self._link()
        self._read_kept_splits()
        self._find_groups()
        self._assign_splits()
        self._find_leaks(folder)
        self.n_images = Counter(
            self.split_of(image.ordinal)
            for image in self._each(_Ordinal)
            if image.ordinal not in self._excluded
        )

    def _each(self, record: type[Record], where: str = "") -> Iterator[Record]:
        """The table `images` of every part, in the order of keys."""
        for part in self.parts:
            yield from select(part.db, record, f"FROM images {where} ORDER BY key")

    def _link(self) -> None:
        self.db.execute("BEGIN")
        all_links = (
            Link(link, image.ordinal)
            for image in self._each(_Linked)
            for link in links(
                image.image,
                json.loads(image.groups) if image.groups else (),
                image.captions.split("\n"),
                image.pixels,
                self.splitting.group_by_name,
            )
        )
        insert(self.db, "links", all_links)
        self.db.execute("COMMIT")

    def _read_kept_splits(self) -> None:
        if not self.splitting.keep_splits:
            return
        folder = place_of(self.splitting.keep_splits)
        for code, split in enumerate(SPLITS, 1):
            if read_manifest(folder)["splits"][split]["samples"]:
                shards = Shards(folder, split)
                insert(
                    self.db,
                    "kept_splits",
                    (_KeptSplit(shards.key(number), code) for number in range(len(shards))),
                )

    def _find_groups(self) -> None:
        self.groups, self.too_common, self._most_common = find_groups(self.db, self.rows, self._excluded)

    def most_common(self) -> dict[str, tuple[str, int]]:
        """Of the "captions" and "names" that are too common, the one of the most images, and their number."""
        found = {}
        for what, shared in self._most_common.items():
            part, row = self.row(shared.ordinal)
            image = select_one(part.db, _Linked, "FROM images WHERE key = :key", key=row.key)
            captions = image.captions.split("\n")
            same = (text for text in captions if shared.link in links("", (), [text], b"", False))
            found[what] = next(same, base_name(image.image)), shared.images
        return found

    def _assigned(self) -> Iterator[tuple[int, int]]:
        """(ordinal, split code) of images whose split is given by an earlier build or by the split column."""
        has_kept = bool(self.splitting.keep_splits)
        for image in self._each(_Assigned, "" if has_kept else "WHERE split != ''"):
            kept = None
            if has_kept:
                kept = select_one(self.db, _KeptSplit, "FROM kept_splits WHERE key = :key", key=image.key)
            if kept or image.split:
                yield image.ordinal, kept.split if kept else 1 + SPLITS.index(image.split)

    def _assign_splits(self) -> None:
        """Give each group its given split, else one by hash; reject images that join two given splits."""
        for attempt in range(3):
            codes, mixed = bytearray(self.rows + 1), set()
            for ordinal, code in self._assigned():
                first = self.groups.first(ordinal)
                if codes[first] and codes[first] != code:
                    mixed.add(first)
                codes[first] = codes[first] or code
            if not mixed:
                break
            assert attempt < 2, len(mixed)
            self._reject_mixed(mixed, only_assigned=attempt == 1)
            self._find_groups()
        for image in self._each(_Named):
            if self.groups.first(image.ordinal) == image.ordinal and not codes[image.ordinal]:
                name = _group_name(image.image, image.groups)
                split = split_of(name, self.splitting.val, self.splitting.test, self.splitting.seed)
                codes[image.ordinal] = 1 + SPLITS.index(split)
        self._codes = codes

    def _reject_mixed(self, mixed: set[int], only_assigned: bool) -> None:
        """Reject images of groups that have two splits.

        Args:
            mixed: first rows of these groups.
            only_assigned: False in the first pass, which rejects images without a given split, because they
                may be all that joins the others; True in the second, which rejects those that differ from the
                first row.
        """
        assigned = {
            ordinal: code for ordinal, code in self._assigned() if self.groups.first(ordinal) in mixed
        }
        wins = {self.groups.first(ordinal): assigned[ordinal] for ordinal in sorted(assigned, reverse=True)}
        for image in self._each(_Ordinal):
            ordinal, first = image.ordinal, self.groups.first(image.ordinal)
            if first not in mixed or ordinal in self._excluded:
                continue
            if not only_assigned and ordinal not in assigned:
                detail = "it shares a group, pixels or a caption with images of both"
                self._reject(ordinal, Problem("joins two splits", detail))
            elif only_assigned and assigned[ordinal] != wins[first]:
                detail = f"its group is in {SPLITS[wins[first] - 1]}"
                self._reject(ordinal, Problem("conflicting splits", detail))

    def _reject(self, ordinal: int, problem: Problem) -> None:
        """Exclude the image whose first row is `ordinal`, and reject all of its rows."""
        self._excluded.add(ordinal)
        part, first = self.row(ordinal)
        query = (
            "FROM rows WHERE key = :key AND NOT EXISTS"
            " (SELECT 1 FROM rejects WHERE rejects.ordinal = rows.ordinal)"
        )
        rows = select(part.db, StoredRow, query, key=first.key)
        insert(self.db, "rejects", (row.reject(problem) for row in rows))

    def _find_leaks(self, folder: Path) -> None:
        index = PHashIndex(folder / "phash.bin")
        for image in self._each(_Hashed):
            if image.phash and image.ordinal not in self._excluded:
                index.add(image.phash, image.ordinal, self._codes[self.groups.first(image.ordinal)])
        self.db.execute("BEGIN")
        for pair in progress(index.candidates(), desc="comparing near-duplicates", unit="pair", delay=2):
            a, b = self._thumbnail_cached(pair.a), self._thumbnail_cached(pair.b)
            if a is not None and b is not None and (distance := difference(a, b)) <= LEAK_DIFFERENCE:
                insert(self.db, "leaks", [Leak(pair.a, pair.b, distance)])
        self.db.execute("COMMIT")
        self._thumbnail_cached.cache_clear()
        if self.splitting.drop_leaks:
            problem = Problem(NEAR_HELD_OUT, "to an image of a later split; see leaks.csv")
            for leak in list(select(self.db, _Leaking, "FROM (SELECT DISTINCT a FROM leaks)")):
                self._reject(leak.a, problem)

    def _thumbnail(self, ordinal: int) -> np.ndarray | None:
        part, row = self.row(ordinal)
        image = select_one(part.db, StoredImage, "FROM images WHERE key = :key", key=row.key)
        data = read_local(self.locate(part, image))
        return None if isinstance(data, BadImage) else thumbnail(data)  # the writer reports a missing file

    def close(self) -> None:
        self.db.close()

    def images(self, container: int | None = None) -> Iterator[PlannedImage]:
        """Every image that is included, in the order of keys.

        Args:
            container: only images that this input contains.
        """
        where = "" if container is None else "WHERE container >= 0 AND container = :container"
        for part in self.parts:
            query = f"FROM images {where} ORDER BY key"
            for image in select(part.db, StoredImage, query, **({"container": container} if where else {})):
                if image.ordinal not in self._excluded:
                    yield self._planned(part, image)

    def _planned(self, part: Part, image: StoredImage) -> PlannedImage:
        first = self.groups.first(image.ordinal)
        return PlannedImage(
            part.number,
            image.key,
            image.ordinal,
            image.image,
            image.captions.split("\n"),
            json.loads(image.weights) if image.weights else [],
            image.columns,
            image.extension,
            image.width,
            image.height,
            image.content,
            image.fixes.split("\n") if image.fixes else [],
            image.container,
            image.offset,
            image.length,
            first,
            _group_name(image.image, image.groups),
            SPLITS[self._codes[first] - 1],
        )

    def row(self, ordinal: int) -> tuple[Part, StoredRow]:
        """A row of the inputs that is in a part, and the part."""
        for part in self.parts:
            if row := select_one(part.db, StoredRow, "FROM rows WHERE ordinal = :ordinal", ordinal=ordinal):
                return part, row
        raise AssertionError(ordinal)

    def locate(self, part: Part, image) -> ImageLocation:
        """Where the bytes of an image are; see scan.locate."""
        return locate(part, self.inputs, self.root, image)

    def split_of(self, ordinal: int) -> str:
        """The split of the image whose first row is `ordinal`."""
        return SPLITS[self._codes[self.groups.first(ordinal)] - 1]

    @property
    def codes(self) -> np.ndarray:
        """uint8 [rows + 1], by the first row of a group: 1 + the number of its split in SPLITS."""
        return np.frombuffer(self._codes, np.uint8)

    def group_name(self, first: int) -> str:
        """The name of a group.

        Args:
            first: its first row.
        """
        part, row = self.row(first)
        image = select_one(part.db, _Named, "FROM images WHERE key = :key", key=row.key)
        return _group_name(image.image, image.groups)

    def seed_that_fills_splits(self, firsts: list[int]) -> int:
        """A --seed that gives every split of some fraction a group; 0 if none is found.

        Args:
            firsts: first rows of all groups.
        """
        splitting = self.splitting
        wanted = {split for split in SPLITS if getattr(splitting, split, 1)}
        if not len(wanted) <= len(firsts) <= MANY_GROUPS:
            return 0
        names = [self.group_name(first) for first in firsts]
        for seed in range(1, SEEDS):
            if {split_of(name, splitting.val, splitting.test, seed) for name in names} >= wanted:
                return seed
        return 0

    def leaks(self, limit: int = -1) -> list[Leak]:
        """Near-identical images in different splits, the most similar first."""
        query = "FROM leaks ORDER BY difference, a, b LIMIT :limit"
        return list(select(self.db, Leak, query, limit=limit))

    def ignored(self) -> Iterator[Ignored]:
        """Files and members that are no rows, in the order of the inputs."""
        return select(self.parts[0].db, Ignored, "FROM ignored ORDER BY rowid")

    def rejects(self) -> Iterator[Reject]:
        """Every row that is not included, in the order of the input."""
        databases = [*(part.db for part in self.parts), self.db]
        return heapq.merge(*(select(db, Reject, "FROM rejects ORDER BY ordinal") for db in databases))


def _group_name(image: str, groups: str) -> str:
    return json.loads(groups)[0] if groups else f"image:{image}"


def check_parts(folder: Path, parts: int, settings: dict) -> None:
    """Refuse to continue before every part is checked, with these settings.

    Raises:
        UserError: names the tasks whose parts are missing or unfinished.
    """
    missing = []
    for number in range(parts):
        exists = Part.path_of(folder, number, parts).exists()
        part = Part(folder, number, parts, read_only=True) if exists else None
        if part is None or not part.get("scanned") or json.loads(part.get("settings") or "{}") != settings:
            missing.append(number)
        if part:
            part.close()
    if missing:
        names = ", ".join(map(str, missing[:20])) + (" and more" if len(missing) > 20 else "")
        raise UserError(
            f"{folder}: {len(missing)} of {parts} tasks have not finished, or had other options: {names}; run"
            " them again with --task, then merge"
        )
