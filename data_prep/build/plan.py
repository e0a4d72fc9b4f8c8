"""Checked parts become a plan: which images are in, in which group, split and shard. The same parts give the
same plan.
"""

import heapq
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.build.groups import LEAK_DIFFERENCE, Looks, links, unite
from data_prep.build.records import Part, Picture
from data_prep.build.scan import Source, place, read_local
from data_prep.build.split import SPLITS, split_of
from data_prep.errors import UserError
from data_prep.images import BadImage, difference, small
from data_prep.progress import progress
from data_prep.shards import Shards, read_manifest

SCHEMA = """
CREATE TABLE links (link INTEGER, ordinal INTEGER);
CREATE TABLE rejects (ordinal INTEGER PRIMARY KEY, input INTEGER, line INTEGER, image TEXT, reason TEXT, detail TEXT);
CREATE TABLE kept (key TEXT PRIMARY KEY, split INTEGER) WITHOUT ROWID;
CREATE TABLE leaks (a INTEGER, b INTEGER, difference REAL);
"""


@dataclass(frozen=True)
class Splitting:
    """How images are grouped and split."""

    val: float = 0.1
    """Fraction of groups for validation."""
    test: float = 0.1
    """Fraction of groups for the final test."""
    seed: int = 0
    """Another number makes another split."""
    group_by_name: bool = False
    """Names that differ in size, number or style share a group: ArrowRight18.png, ArrowRight_24_N.png."""
    keep_splits: str = ""
    """A folder of shards, built before: its images stay in their splits, and what would join two of them is
    rejected.
    """
    drop_leaks: bool = False
    """Leave out of train (and val) what is near-identical to an image of a later split; else it is only
    listed.
    """


class Image(NamedTuple):
    """A row of a part's table `pictures`, and where it goes."""

    part: int
    key: str
    ordinal: int
    image: str
    captions: list[str]
    columns: str
    extension: str
    width: int
    height: int
    content: bytes
    fixes: str
    held: int | None
    at: int | None
    size: int | None
    group: int
    group_name: str
    split: str


class Plan:
    """Groups and splits of all parts' images.

    Attributes:
        rows: rows of all inputs.
        common: how many captions and base names so many images share that they join none.
        n_images: images of each split.
    """

    def __init__(self, folder: Path, parts: list[Part], splitting: Splitting, inputs: list[str], root: str):
        self.parts, self.splitting, self.inputs, self.root = parts, splitting, inputs, root
        self._small = lru_cache(4096)(self._shrunk)  # 12 MB
        self.rows = int(parts[0].get("total_rows"))
        (folder / "plan.sqlite").unlink(
            missing_ok=True
        )  # without a journal, one that was killed may be damaged
        self.db = sqlite3.connect(folder / "plan.sqlite", isolation_level=None)
        self.db.executescript(f"PRAGMA synchronous = OFF; PRAGMA journal_mode = OFF; {SCHEMA}")
        self._without: set[int] = set()
        self._link()
        self._keep_splits()
        self.groups, self.common = unite(self.db, self.rows, self._without)
        self._split()
        self._find_leaks(folder)
        self.n_images = Counter(
            self.split_of(ordinal) for (ordinal,) in self._each("ordinal") if ordinal not in self._without
        )

    def _each(self, columns: str, where: str = "") -> Iterator[tuple]:
        """Rows of the table `pictures` of every part, in the order of keys."""
        for part in self.parts:
            yield from part.db.cursor().execute(f"SELECT {columns} FROM pictures {where} ORDER BY key")

    def _link(self) -> None:
        self.db.execute("BEGIN")
        rows = (
            (link, ordinal)
            for ordinal, image, groups, captions, pixels in self._each(
                "ordinal, image, groups, captions, pixels"
            )
            for link in links(
                image,
                json.loads(groups) if groups else (),
                captions.split("\n"),
                pixels,
                self.splitting.group_by_name,
            )
        )
        self.db.executemany("INSERT INTO links VALUES (?, ?)", rows)
        self.db.execute("COMMIT")

    def _keep_splits(self) -> None:
        if not self.splitting.keep_splits:
            return
        old = Path(self.splitting.keep_splits)
        for code, split in enumerate(SPLITS, 1):
            if read_manifest(old)["splits"][split]["samples"]:
                shards = Shards(old, split)
                self.db.executemany(
                    "INSERT OR IGNORE INTO kept VALUES (?, ?)",
                    ((shards.key(at), code) for at in range(len(shards))),
                )

    def _fixed(self) -> Iterator[tuple[int, int]]:
        """(ordinal, split code) of images whose split is given, by the split column or by an earlier build."""
        has_kept = bool(self.splitting.keep_splits)
        for key, ordinal, split in self._each("key, ordinal, split", "" if has_kept else "WHERE split != ''"):
            found = (
                self.db.execute("SELECT split FROM kept WHERE key = ?", (key,)).fetchone()
                if has_kept
                else None
            )
            if found or split:
                yield ordinal, found[0] if found else 1 + SPLITS.index(split)

    def _split(self) -> None:
        """Give each group a split: the given one, else by hash; images that would join two given splits are
        rejected.
        """
        for attempt in range(3):
            codes, mixed = bytearray(self.rows + 1), set()
            for ordinal, code in self._fixed():
                first = self.groups.first(ordinal)
                if codes[first] and codes[first] != code:
                    mixed.add(first)
                codes[first] = codes[first] or code
            if not mixed:
                break
            assert attempt < 2, len(mixed)
            self._reject_mixed(mixed, only_given=attempt == 1)
            self.groups, self.common = unite(self.db, self.rows, self._without)
        for ordinal, image, groups in self._each("ordinal, image, groups"):
            if self.groups.first(ordinal) == ordinal and not codes[ordinal]:
                split = split_of(
                    _group_name(image, groups), self.splitting.val, self.splitting.test, self.splitting.seed
                )
                codes[ordinal] = 1 + SPLITS.index(split)
        self._codes = codes

    def _reject_mixed(self, mixed: set[int], only_given: bool) -> None:
        """First the images without a given split, which may be all that joins the others; then those that
        differ from the first row.
        """
        given = {ordinal: code for ordinal, code in self._fixed() if self.groups.first(ordinal) in mixed}
        wins = {self.groups.first(ordinal): given[ordinal] for ordinal in sorted(given, reverse=True)}
        for (ordinal,) in self._each("ordinal"):
            first = self.groups.first(ordinal)
            if first in mixed and ordinal not in self._without:
                if not only_given and ordinal not in given:
                    self._reject(
                        ordinal,
                        "joins two splits",
                        "it shares a group, pixels or a caption with images of both",
                    )
                elif only_given and given[ordinal] != wins[first]:
                    self._reject(ordinal, "conflicting splits", f"its group is in {SPLITS[wins[first] - 1]}")

    def _reject(self, ordinal: int, reason: str, detail: str) -> None:
        """Reject all rows of the image whose first row is `ordinal`."""
        self._without.add(ordinal)
        for part in self.parts:
            found = part.db.execute("SELECT key FROM rows WHERE ordinal = ?", (ordinal,)).fetchone()
            if found:
                rows = part.db.execute(
                    "SELECT ordinal, input, line, image FROM rows WHERE key = ? "
                    "AND NOT EXISTS (SELECT 1 FROM rejects WHERE rejects.ordinal = rows.ordinal)",
                    found,
                )
                self.db.executemany(
                    "INSERT INTO rejects VALUES (?, ?, ?, ?, ?, ?)", [(*row, reason, detail) for row in rows]
                )

    def _find_leaks(self, folder: Path) -> None:
        looks = Looks(folder / "looks.bin")
        for ordinal, look in self._each("ordinal, look"):
            if look and ordinal not in self._without:
                looks.add(look, ordinal, self._codes[self.groups.first(ordinal)])
        self.db.execute("BEGIN")
        for a, b, _ in progress(looks.candidates(), desc="comparing look-alikes", unit="pair", delay=2):
            one, other = self._small(a), self._small(b)
            if one is not None and other is not None and (found := difference(one, other)) <= LEAK_DIFFERENCE:
                self.db.execute("INSERT INTO leaks VALUES (?, ?, ?)", (a, b, found))
        self.db.execute("COMMIT")
        self._small.cache_clear()
        if self.splitting.drop_leaks:
            for (ordinal,) in self.db.execute("SELECT DISTINCT a FROM leaks").fetchall():
                self._reject(
                    ordinal, "near-identical to held-out", "its twin is in a later split; see leaks.csv"
                )

    def _shrunk(self, ordinal: int) -> np.ndarray | None:
        part, key, _ = self.image_of(ordinal)
        image = Picture(
            key,
            *part.db.execute("SELECT image, held, at, size FROM pictures WHERE key = ?", (key,)).fetchone(),
        )
        data = read_local(self.place(part, image))
        return None if isinstance(data, BadImage) else small(data)  # gone by now: the writer will name it

    def close(self) -> None:
        self.db.close()

    def images(self, held: int | None = None) -> Iterator[Image]:
        """Every image that is in, in the order of keys; on request only those that one input holds."""
        columns = "key, ordinal, image, captions, columns, extension, width, height, content, fixes, held, at, size, groups"
        query = f"SELECT {columns} FROM pictures {'' if held is None else f'WHERE held >= 0 AND held = {held:d}'} ORDER BY key"
        for part in self.parts:
            for key, ordinal, image, captions, *rest, groups in part.db.cursor().execute(query):
                if ordinal in self._without:
                    continue
                first = self.groups.first(ordinal)
                split = SPLITS[self._codes[first] - 1]
                yield Image(
                    part.number,
                    key,
                    ordinal,
                    image,
                    captions.split("\n"),
                    *rest,
                    first,
                    _group_name(image, groups),
                    split,
                )

    def image_of(self, ordinal: int) -> tuple[Part, str, str]:
        """Part, key and image of the image whose first row is `ordinal`."""
        for part in self.parts:
            if found := part.db.execute(
                "SELECT key, image FROM rows WHERE ordinal = ?", (ordinal,)
            ).fetchone():
                return part, *found
        raise AssertionError(ordinal)

    def place(self, part: Part, image) -> Source:
        """Where the bytes of an image are."""
        return place(part, self.inputs, self.root, image)

    def split_of(self, ordinal: int) -> str:
        """The split of the image whose first row is `ordinal`."""
        return SPLITS[self._codes[self.groups.first(ordinal)] - 1]

    @property
    def codes(self) -> np.ndarray:
        """uint8 [rows + 1], by the first row of a group: 1 + the number of its split in SPLITS."""
        return np.frombuffer(self._codes, np.uint8)

    def leaks(self, most: int = -1) -> list[tuple[int, int, float]]:
        """(ordinal, ordinal, difference) of near-identical images in different splits, the most alike first."""
        return self.db.execute(
            "SELECT a, b, difference FROM leaks ORDER BY difference, a, b LIMIT ?", (most,)
        ).fetchall()

    def rejects(self) -> Iterator[tuple]:
        """(input, line, image, reason, detail) of every row that is not in, in the order of the input."""
        cursors = [part.db.cursor().execute("SELECT * FROM rejects ORDER BY ordinal") for part in self.parts]
        cursors.append(self.db.cursor().execute("SELECT * FROM rejects ORDER BY ordinal"))
        for _, *rest in heapq.merge(*cursors):
            yield tuple(rest)


def _group_name(image: str, groups: str) -> str:
    return json.loads(groups)[0] if groups else f"image:{image}"


def check_parts(folder: Path, parts: int) -> None:
    """Refuse to go on before every part is checked.

    Raises:
        UserError: parts are missing or unfinished; they are named.
    """
    missing = []
    for number in range(parts):
        part = (
            Part(folder, number, parts, read_only=True)
            if Part.path_of(folder, number, parts).exists()
            else None
        )
        if part is None or not part.get("scanned"):
            missing.append(number)
        if part:
            part.close()
    if missing:
        names = ", ".join(map(str, missing[:20])) + (" and more" if len(missing) > 20 else "")
        raise UserError(
            f"{folder}: {len(missing)} of {parts} tasks have not finished: {names}; run them again with --task, then merge"
        )
