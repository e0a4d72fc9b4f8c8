"""Rows joined by image, on disk, so that memory does not grow with them: one part of the work, safe at every
moment.

  part-00003-of-00008.sqlite   rows      what was read, of the images that fall into this part, by a hash of their paths
                      pictures  what the checks made of each image, in the order of their keys
                      rejects   rows that cannot be used, each with its line and a named reason
  part-00003-of-00008.bytes    images that cannot be read again from a file: fetched, held by an input, or put right

records + rejects = rows, in every part and so in the whole.
"""

import html
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from data_prep.build.decisions import Decided, Decision
from data_prep.errors import UserError
from data_prep.inputs.names import Names, key_of
from data_prep.inputs.rows import Columns, read
from data_prep.inputs.sources import COMPRESSED, is_url
from data_prep.progress import progress

SCHEMA = """
CREATE TABLE rows (ordinal INTEGER PRIMARY KEY, input INTEGER, line INTEGER, key TEXT, image TEXT, caption TEXT,
                   grp TEXT, split TEXT, columns TEXT, held INTEGER, at INTEGER, size INTEGER);
CREATE TABLE pictures (key TEXT PRIMARY KEY, ordinal INTEGER, image TEXT, captions TEXT, groups TEXT, split TEXT, columns TEXT,
                       extension TEXT, width INTEGER, height INTEGER, content BLOB, pixels BLOB, look BLOB, fixes TEXT,
                       held INTEGER, at INTEGER, size INTEGER) WITHOUT ROWID;
CREATE INDEX pictures_of_inputs ON pictures (held, key) WHERE held >= 0;
CREATE TABLE rejects (ordinal INTEGER PRIMARY KEY, input INTEGER, line INTEGER, image TEXT, reason TEXT, detail TEXT);
CREATE TABLE cut (ordinal INTEGER PRIMARY KEY, input INTEGER, line INTEGER, tokens INTEGER, caption TEXT);
CREATE TABLE state (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
"""
SPOOLED = -1
SPLIT_NAMES = {
    "train": "train",
    "val": "val",
    "test": "test",
    "training": "train",
    "validation": "val",
    "valid": "val",
    "dev": "val",
}


@dataclass
class Picture:
    """One image and the rows that caption it, in the order of the input."""

    key: str  # 16 hexadecimal digits, from the image's name: safe in a tar, the same in every build
    image: str
    held: int | None = (
        # None: a file of its own; SPOOLED: in the part's .bytes; else the number of the input that holds it
        None
    )
    at: int | None = None
    size: int | None = None
    rows: list[tuple] = field(
        default_factory=list
    )  # (ordinal, input, line, caption, group, split, columns, held, at)


class Part:
    """One part's files; only one process at a time writes to them.

    Raises:
        UserError: another process has them open.
    """

    def __init__(self, folder: Path, number: int, parts: int, read_only: bool = False):
        self.number, self.parts = number, parts
        self.path = self.path_of(folder, number, parts)
        self.spool_path = self.path.with_suffix(".bytes")
        self.db = sqlite3.connect(
            f"file:{self.path}?mode={'ro' if read_only else 'rwc'}", uri=True, isolation_level=None, timeout=1
        )
        if read_only:
            return
        try:
            self.db.executescript(
                "PRAGMA locking_mode = EXCLUSIVE; PRAGMA synchronous = NORMAL; BEGIN IMMEDIATE; COMMIT;"
            )
        except sqlite3.OperationalError as error:
            raise UserError(
                f"{self.path}: in use by another process ({error}); let it end, or end it"
            ) from None
        if not self.db.execute("SELECT 1 FROM sqlite_master").fetchone():
            self.db.executescript(f"BEGIN; {SCHEMA} COMMIT;")

    @staticmethod
    def path_of(folder: Path, number: int, parts: int) -> Path:
        return folder / f"part-{number:05d}-of-{parts:05d}.sqlite"

    @cached_property
    def spool(self):
        return open(self.spool_path, "ab")

    def get(self, name: str) -> str:
        found = self.db.execute("SELECT value FROM state WHERE name = ?", (name,)).fetchone()
        return found[0] if found else ""

    def set(self, **values) -> None:
        self.db.executemany(
            "INSERT OR REPLACE INTO state VALUES (?, ?)",
            [(name, str(value)) for name, value in values.items()],
        )

    def store(self, data: bytes) -> tuple[int, int, int]:
        """Where `data` stands from now on: held, at, size."""
        at = self.spool.tell()
        self.spool.write(data)
        return SPOOLED, at, len(data)

    def commit(self) -> None:
        """Make what was done since BEGIN last; bytes first, because the tables point to them."""
        if "spool" in self.__dict__:
            self.spool.flush()
            os.fsync(self.spool.fileno())
        self.db.execute("COMMIT")

    def reject(self, rows: Iterable[tuple], reason: str, detail: str = "") -> None:
        """List rows (ordinal, input, line, image) with a reason."""
        self.db.executemany(
            "INSERT INTO rejects VALUES (?, ?, ?, ?, ?, ?)", [(*row, reason, detail) for row in rows]
        )

    def close(self) -> None:
        if "spool" in self.__dict__:
            self.spool.close()
        self.db.close()


@dataclass(frozen=True)
class Reading:
    """How the inputs are read; with the inputs themselves, this decides what the rows are."""

    image_column: str = "image"
    """Column of image paths, of URLs, or (in Parquet) of the images themselves."""
    caption_column: str = "caption"
    """Column of captions; in Parquet and JSONL it may hold lists."""
    group_column: str = ""
    """Column that joins images that show the same thing; a group is never split over train and val."""
    split_column: str = ""
    """Column that says train, val or test, where that is settled already."""
    images: str = ""
    """Folder or URL that image paths are relative to, and may not leave; by default the input's own folder.
    """
    delimiter: str = ""
    """Between the cells of a CSV's row; by default a comma, in .tsv files a tab."""
    encoding: str = "utf-8-sig"
    """Of CSV and JSONL, as Python names it: utf-8, latin-1, utf-16."""
    context_length: int = 77
    """Tokens that the model to be trained can read; captions that will be cut are counted. 0 does not look.
    """
    decisions: str = ""
    """CSV of what was decided with `python -m data_prep review`: images that are dropped, captions that are
    put right.
    """

    @property
    def columns(self) -> Columns:
        return Columns(self.image_column, self.caption_column, self.group_column, self.split_column)


def load(part: Part, inputs: list[str], reading: Reading, decisions: Iterable[Decision] = ()) -> None:
    """Read all inputs and keep the rows of this part, in one transaction: after a kill it starts again.

    Raises:
        UserError: an input cannot be read; see data_prep.inputs.rows.read.
    """
    if part.get("loaded"):
        return
    part.spool_path.unlink(missing_ok=True)
    part.db.execute("BEGIN")
    bar = progress(desc="reading rows", unit="row", delay=2)
    labels = [os.path.basename(source.rstrip("/")) for source in inputs]
    if len(set(labels)) < len(labels):
        labels = [f"{at}/{label}" for at, label in enumerate(labels)]
    names, cuts, kept, ordinal, stored = Names(reading.images), _Cuts(reading.context_length), [], 0, None
    decided, first = Decided(decisions), {}

    def keep(row: tuple) -> None:
        if tokens := cuts.tokens(row[5]):
            part.db.execute("INSERT INTO cut VALUES (?, ?, ?, ?, ?)", (*row[:3], tokens, row[5]))
        kept.append(row)

    for at, source in enumerate(inputs):
        for row in read(source, reading.columns, reading.delimiter, reading.encoding, labels[at]):
            ordinal += 1
            if ordinal % 10_000 == 0:
                bar.update(10_000)
                _keep(part, kept)
            name, problem = (
                (row.image, row.problem) if row.problem or row.data is not None else names.inside(row.image)
            )
            caption = " ".join(row.caption.split())
            problem = problem or (("empty caption", "") if not caption else None)
            split = SPLIT_NAMES.get(row.split.lower()) if row.split else ""
            if split is None and not problem:
                problem = ("unknown split", f"{row.split!r}; train, val or test is wanted")
            key = key_of(name) if name else f"{ordinal:016x}"
            caption, unwanted = (caption, None) if problem else decided(key, caption)
            if part.parts > 1 and int(key, 16) * part.parts >> 64 != part.number:
                continue
            if problem:
                part.reject([(ordinal, at, row.line, _storable(row.image or name))], *map(_storable, problem))
                continue
            place = (None, None, None)
            if row.data is not None:
                if stored is None or stored[0] != key:  # rows of one image follow each other
                    in_place = row.at is not None and not is_url(source) and not source.endswith(COMPRESSED)
                    stored = (key, (at, row.at, len(row.data)) if in_place else part.store(row.data))
                place = stored[1]
            found = (ordinal, at, row.line, key, name, caption, row.group, split, row.columns, *place)
            if key in decided.adding:
                first.setdefault(key, found)
            if unwanted:
                part.reject([(*found[:3], name)], *unwanted)
            else:
                keep(found)
    bar.close()
    if not ordinal:
        raise UserError(f"{', '.join(inputs)}: no rows; a header and one row per caption are wanted")
    for key, caption in decided.added():  # as rows below all others, which move none of them
        ordinal += 1
        if key in first:
            keep((ordinal, *first[key][1:5], caption, *first[key][6:]))
    _keep(part, kept)
    part.db.execute("CREATE INDEX rows_by_key ON rows (key, ordinal)")
    part.set(loaded=1, total_rows=ordinal, decided=json.dumps(decided.counts()))
    part.commit()


def _storable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _keep(part: Part, rows: list[tuple]) -> None:
    part.db.executemany(f"INSERT INTO rows VALUES ({', '.join('?' * 12)})", rows)
    rows.clear()


class _Cuts:
    """Counts tokens where a caption may be too long for the model; most are too short to have to."""

    def __init__(self, context_length: int):
        self.context_length = context_length

    @cached_property
    def _tokenizer(self):
        from open_clip.tokenizer import (
            SimpleTokenizer,
        )  # here, because it brings torch, and few captions want it

        return SimpleTokenizer()

    def tokens(self, caption: str) -> int:
        """The caption's tokens with both ends, where they are more than the context length; else 0."""
        # A token stands for one byte or more. What is cleaned before (ftfy, lower case) can only lengthen
        # other scripts.
        most = len(caption) if caption.isascii() else 3 * len(html.unescape(caption).encode())
        if not self.context_length or most + 2 <= self.context_length:
            return 0
        tokens = len(self._tokenizer.encode(caption)) + 2
        return tokens if tokens > self.context_length else 0


def pictures(part: Part) -> Iterator[Picture]:
    """The images of a part that are not checked yet, in the order of their keys; rows that cannot be joined
    are rejected.
    """
    (last,) = part.db.execute("SELECT value FROM state WHERE name = 'last_key'").fetchone() or ("",)
    cursor = part.db.cursor().execute(
        "SELECT key, image, held, at, size, ordinal, input, line, caption, grp, split, columns, held, at FROM rows "
        "WHERE key > ? ORDER BY key, ordinal",
        (last,),
    )
    for _, found in groupby(cursor, itemgetter(0)):
        rows = list(found)
        assert len({row[1] for row in rows}) == 1, f"one key for {sorted({row[1] for row in rows})}"
        yield Picture(*rows[0][:5], [row[5:] for row in rows])


def join(part: Part, picture: Picture) -> dict:
    """What the rows of one image say together; rows that add nothing or contradict become rejects."""
    captions, groups, split = {}, {}, ""
    for ordinal, at, line, caption, group, row_split, _, *place in picture.rows:
        if place != [picture.held, picture.at]:
            part.reject(
                [(ordinal, at, line, picture.image)],
                "name in two inputs",
                "the image that an earlier input has by this name is taken",
            )
            continue
        if split and row_split and split != row_split:
            part.reject(
                [(ordinal, at, line, picture.image)],
                "conflicting splits",
                f"{row_split} here, {split} before",
            )
        elif caption in captions:
            part.reject(
                [(ordinal, at, line, picture.image)],
                "duplicate row",
                "the same image and caption stand above",
            )
        else:
            captions[caption] = None
            split = split or row_split
        if group:
            groups[group] = None
    return {
        "key": picture.key,
        "ordinal": picture.rows[0][0],
        "image": picture.image,
        "captions": "\n".join(captions),  # a caption holds no line break
        "groups": json.dumps(list(groups), ensure_ascii=False) if groups else "",
        "split": split,
        "columns": picture.rows[0][6],
    }
