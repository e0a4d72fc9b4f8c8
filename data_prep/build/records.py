"""Rows joined by image, on disk, so that memory does not grow with them. Each task of a build has one part; a
kill at any moment loses nothing that was committed.

  part-00003-of-00008.sqlite   rows           what was read, for images whose key falls into this part
                               images         what the checks made of each image, in the order of keys
                               earlier        the same, of an earlier command (see resume.py)
                               rejects        rows that cannot be used, each with its line and a named reason
                               long_captions  captions of more tokens than the model can read
                               ignored        files that are neither images nor captions; in the first part
  part-00003-of-00008.bytes    images that cannot be read again from a file: fetched, compressed, or changed

records + rejects = rows, in every part and so in the whole.
"""

import html
import json
import os
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import cached_property, partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from data_prep.build.database import Count, insert, select, select_one
from data_prep.build.decisions import AppliedDecisions
from data_prep.build.options import Reading
from data_prep.build.stored import Stored
from data_prep.errors import UserError
from data_prep.inputs.cells import shortened
from data_prep.inputs.formats import inputs_in, read
from data_prep.inputs.names import Names, Problem, key_of
from data_prep.inputs.rows import Row, is_in_place
from data_prep.progress import progress
from data_prep.strict_json import TEXT as NONFINITE

SCHEMA = """
CREATE TABLE rows (ordinal INTEGER PRIMARY KEY, input INTEGER, line INTEGER, key TEXT, image TEXT,
                   caption TEXT, weight REAL, group_name TEXT, split TEXT, columns TEXT,
                   container INTEGER, offset INTEGER, length INTEGER);
CREATE TABLE images (key TEXT PRIMARY KEY, ordinal INTEGER, image TEXT, captions TEXT, weights TEXT,
                     groups TEXT, split TEXT, columns TEXT, extension TEXT, width INTEGER, height INTEGER,
                     content BLOB, pixels BLOB, phash BLOB, fixes TEXT, container INTEGER, offset INTEGER,
                     length INTEGER, source BLOB) WITHOUT ROWID;
CREATE TABLE earlier (key TEXT PRIMARY KEY, source BLOB, extension TEXT, width INTEGER, height INTEGER,
                      content BLOB, pixels BLOB, phash BLOB, fixes TEXT, container INTEGER, offset INTEGER,
                      length INTEGER) WITHOUT ROWID;
CREATE INDEX images_by_container ON images (container, key) WHERE container >= 0;
CREATE TABLE rejects (ordinal INTEGER PRIMARY KEY, input INTEGER, line INTEGER, image TEXT, reason TEXT,
                      detail TEXT, caption TEXT);
CREATE TABLE long_captions (ordinal INTEGER PRIMARY KEY, input INTEGER, line INTEGER, tokens INTEGER,
                            caption TEXT);
CREATE TABLE ignored (input INTEGER, name TEXT, reason TEXT);
CREATE TABLE state (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
"""
SCHEMA_VERSION = 5
INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}  # unicodedata's names of control, format and space characters
SPOOLED = -1  # the container of images in the part's .bytes
INSERT_ROWS, INSERT_CHARACTERS = 10_000, 1 << 26  # that are held in memory
# After a commit in the middle, no later key has an image; after retry_rejected (resume.py), most have one.
UNCHECKED = "key > :last_key AND NOT EXISTS (SELECT 1 FROM images WHERE images.key = rows.key)"
SPLIT_NAMES = {
    "train": "train",
    "val": "val",
    "test": "test",
    "training": "train",
    "validation": "val",
    "valid": "val",
    "dev": "val",
}
SHOWN_PROBLEMS = 20  # of inputs
SHOWN_CHARACTERS = 160  # of the caption of a reject
REPEATED, UNKNOWN_SPLIT = "duplicate row", "unknown split"


class Place(NamedTuple):
    """Where an image is stored.

    Attributes:
        container: None for a separate file, SPOOLED for the part's .bytes, else the number of the input that
            contains it.
        offset, length: bytes in the container.
    """

    container: int | None = None
    offset: int | None = None
    length: int | None = None


class StoredRow(NamedTuple):
    """A row of the table `rows`.

    Attributes:
        ordinal: the number of the row over all inputs, from 1.
        input: the number of the input.
        key: of the image, see data_prep.inputs.names.key_of.
        weight: of the caption, see data_prep.inputs.rows.Row.
        container, offset, length: see Place.
    """

    ordinal: int
    input: int
    line: int
    key: str
    image: str
    caption: str
    weight: float | None
    group_name: str
    split: str
    columns: str
    container: int | None
    offset: int | None
    length: int | None

    def reject(self, problem: Problem) -> "Reject":
        return Reject(
            self.ordinal,
            self.input,
            self.line,
            self.image,
            *problem,
            shortened(self.caption, SHOWN_CHARACTERS),
        )


class StoredImage(NamedTuple):
    """A row of the table `images`.

    Attributes:
        ordinal: of the first row of the image.
        captions: one per line.
        weights: JSON, of each caption; "" for none.
        groups: JSON, the cells of the group column; "" for none.
        split: the cell of the split column.
        extension, width, height, content, pixels, phash: see data_prep.images.CheckedImage.
        fixes: one per line.
        container, offset, length: see Place.
        source: xxh3 of the file that was checked; None if it is `content`.
    """

    key: str
    ordinal: int
    image: str
    captions: str
    weights: str
    groups: str
    split: str
    columns: str
    extension: str
    width: int
    height: int
    content: bytes
    pixels: bytes
    phash: bytes
    fixes: str
    container: int | None
    offset: int | None
    length: int | None
    source: bytes | None


class EarlierImage(NamedTuple):
    """A row of the table `earlier`: what a check found, by an earlier command.

    Attributes:
        source: xxh3 of the file that was checked.
        container, offset, length: of an image that the check has spooled, else None; see Place.
    """

    key: str
    source: bytes
    extension: str
    width: int
    height: int
    content: bytes
    pixels: bytes
    phash: bytes
    fixes: str
    container: int | None
    offset: int | None
    length: int | None


class Reject(NamedTuple):
    """A row of the table `rejects`."""

    ordinal: int
    input: int
    line: int
    image: str
    reason: str
    detail: str = ""
    caption: str = ""  # its beginning; what tells the rejects of one row apart


class LongCaption(NamedTuple):
    """A row of the table `long_captions`."""

    ordinal: int
    input: int
    line: int
    tokens: int
    caption: str


class Ignored(NamedTuple):
    """A row of the table `ignored`: a file of a folder, or a member of a tar, that is no row."""

    input: int
    name: str
    reason: str


class _State(NamedTuple):
    name: str
    value: str


class ImageRows(NamedTuple):
    """An image and the rows that caption it, in the order of the input."""

    key: str
    image: str
    container: int | None
    offset: int | None
    length: int | None
    rows: list[StoredRow]


class Part:
    """The files of one part; one process at a time may write to them.

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
                f"{self.path}: in use by another process ({error}); wait until it ends, or stop it"
            ) from None
        if self.db.execute("PRAGMA user_version").fetchone() != (SCHEMA_VERSION,):
            tables = self.db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            dropped = "".join(
                f"DROP TABLE {name};" for (name,) in tables
            )  # of another version of this program
            version = f"PRAGMA user_version = {SCHEMA_VERSION};"
            self.db.executescript(f"BEGIN; {dropped} {SCHEMA} {version} COMMIT;")

    @staticmethod
    def path_of(folder: Path, number: int, parts: int) -> Path:
        return folder / f"part-{number:05d}-of-{parts:05d}.sqlite"

    @cached_property
    def _spool_file(self):
        return open(self.spool_path, "ab")

    def get(self, name: str) -> str:
        """A value of the table `state`; "" if it is not set."""
        state = select_one(self.db, _State, "FROM state WHERE name = :name", name=name)
        return state.value if state else ""

    def set(self, **values) -> None:
        for name, value in values.items():
            self.db.execute(
                "INSERT OR REPLACE INTO state (name, value) VALUES (:name, :value)",
                {"name": name, "value": str(value)},
            )

    def spool(self, data: bytes) -> Place:
        """Append `data` to the part's .bytes."""
        offset = self._spool_file.tell()
        self._spool_file.write(data)
        return Place(SPOOLED, offset, len(data))

    def truncate_spool(self) -> None:
        """Remove from .bytes what no table refers to: what was written after the last commit."""
        query = " UNION ALL ".join(
            f"SELECT max(offset + length) AS size FROM {table} WHERE container = :spooled"
            for table in ("images", "rows", "earlier")
        )
        query = f"FROM (SELECT coalesce(max(size), 0) AS n FROM ({query}))"
        if self.spool_path.exists():
            os.truncate(self.spool_path, select_one(self.db, Count, query, spooled=SPOOLED).n)

    def commit(self) -> None:
        """Make everything since BEGIN durable; .bytes first, because the tables refer to it."""
        if "_spool_file" in self.__dict__:
            self._spool_file.flush()
            os.fsync(self._spool_file.fileno())
        self.db.execute("COMMIT")

    def reject(self, *rejects: Reject) -> None:
        insert(self.db, "rejects", rejects)

    def is_empty(self) -> bool:
        """Whether nothing was read, and nothing is kept of an earlier command."""
        return not (self.get("loaded") or self.db.execute("SELECT 1 FROM earlier LIMIT 1").fetchone())

    def close(self) -> None:
        if "_spool_file" in self.__dict__:
            self._spool_file.close()
        self.db.close()


def load(
    part: Part,
    inputs: list[str],
    reading: Reading,
    decisions: AppliedDecisions | None = None,
    stored: Stored | None = None,
) -> None:
    """Read all inputs and store the rows of this part, in one transaction: after a kill it starts again.

    Args:
        stored: for tars behind URLs whose images stay there; None to read all that an input contains.

    Raises:
        UserError: an input cannot be read; see data_prep.inputs.formats.read.
    """
    if part.get("loaded"):
        return
    part.db.execute("BEGIN")
    part.truncate_spool()
    part.db.execute("DELETE FROM ignored")
    bar = progress(desc="reading rows", unit="row", delay=2)
    names = [os.path.basename(source.rstrip("/")) for source in inputs]
    if len(set(names)) < len(names):
        names = [f"{number}/{name}" for number, name in enumerate(names)]
    loader, problems = _Loader(part, reading, decisions or AppliedDecisions([]), stored), []

    def rows_of(number: int, **more) -> Iterator[Row]:
        options = (reading.columns, reading.delimiter, reading.encoding, names[number])
        more |= {"image_ext": reading.image_ext, "caption_ext": reading.caption_ext}
        return read(inputs[number], *options, reading.captions_per_txt, **more)

    ahead = stored.read_ahead(inputs, rows_of) if stored else {}
    for number, source in enumerate(inputs):
        ignore = partial(loader.ignore, number)
        try:
            for row in ahead[number](ignore) if number in ahead else rows_of(number, ignore=ignore):
                loader.add(number, source, row)
                if loader.ordinal % INSERT_ROWS == 0:
                    bar.update(INSERT_ROWS)
                if loader.ordinal % INSERT_ROWS == 0 or loader.pending_characters > INSERT_CHARACTERS:
                    loader.insert_pending()
        except (
            UserError
        ) as error:  # the other inputs are read all the same: all damaged ones are named at once
            problems.append(str(error))
    bar.close()
    if stored:
        stored.close()
    _check_loaded(inputs, loader, problems)
    loader.add_captions()
    loader.insert_pending()
    part.db.execute("CREATE INDEX rows_by_key ON rows (key, ordinal)")
    part.set(
        loaded=1,
        total_rows=loader.ordinal,
        total_lines=loader.lines,
        decisions=json.dumps(loader.decisions.counts()),
        nonfinite=loader.nonfinite,
    )
    part.commit()


def _check_loaded(inputs: list[str], loader: "_Loader", problems: list[str]) -> None:
    """Raise a UserError that names the inputs that could not be read, or if there is no row at all."""
    if problems:
        more_problems = [f"and {len(problems) - SHOWN_PROBLEMS} more"] * (len(problems) > SHOWN_PROBLEMS)
        raise UserError("\n".join(problems[:SHOWN_PROBLEMS] + more_problems))
    if not loader.ordinal:
        ignored = "".join(f"; ignored: {count} x {why}" for why, count in loader.ignored.items())
        fix = "an input must have a header and one row per caption, or images with captions"
        if found := [pattern for source in inputs if os.path.isdir(source) for pattern in inputs_in(source)]:
            fix = f"these are tars or tables: pass {' '.join(found[:SHOWN_PROBLEMS])}"
        raise UserError(f"{', '.join(inputs)}: no rows{ignored}; {fix}")


class _Loader:
    """Validates rows one by one, applies decisions, and stores those of one part."""

    def __init__(
        self, part: Part, reading: Reading, decisions: AppliedDecisions, stored: Stored | None = None
    ):
        self.part, self.decisions, self.stored = part, decisions, stored
        self.ordinal, self.nonfinite, self.ignored = 0, 0, Counter()
        self.lines, self._last_line = 0, None
        self._names, self._token_limit = Names(reading.images), _TokenLimit(reading.context_length)
        self._pending: list[StoredRow] = []
        self.pending_characters = 0
        self._last_key, self._last_place = "", Place()
        self._first_rows: dict[str, StoredRow] = {}  # of images that get more captions

    def add(self, number: int, source: str, row: Row) -> None:
        """Store a row of input `number`, or reject it."""
        self.ordinal += 1
        self.lines += self._last_line != (number, row.line)
        self._last_line = number, row.line
        name, problem = row.image, row.problem
        if not problem and row.data is None:
            name, problem = self._names.resolve(row.image)
        if not problem and row.length is not None:
            problem = self.stored.problem_of(row)
        caption = " ".join(row.caption.split())
        if not problem and not is_visible(caption):
            detail = f"only {', '.join(f'U+{ord(sign):04X}' for sign in caption[:5])}" if caption else ""
            problem = Problem("empty caption", detail)
        split = SPLIT_NAMES.get(row.split.lower()) if row.split else ""
        if split is None and not problem:
            problem = Problem(UNKNOWN_SPLIT, f"{row.split!r}; must be train, val or test")
        key = key_of(name) if name else f"{self.ordinal:016x}"
        decided = None
        if not problem:
            caption, decided = self.decisions.apply(key, caption)
        self.nonfinite += len(NONFINITE.findall(row.columns)) if row.columns else 0
        if self.part.parts > 1 and int(key, 16) * self.part.parts >> 64 != self.part.number:
            return
        if problem:
            texts = map(_encodable, (row.image or name, *problem, shortened(caption, SHOWN_CHARACTERS)))
            self.part.reject(Reject(self.ordinal, number, row.line, *texts))
            return
        stored = StoredRow(
            self.ordinal,
            number,
            row.line,
            key,
            name,
            caption,
            row.weight,
            row.group,
            split,
            row.columns,
            *self._place(number, source, row, key),
        )
        if key in self.decisions.keys_with_additions:
            self._first_rows.setdefault(key, stored)
        if decided:
            self.part.reject(stored.reject(decided))
        else:
            self._store(stored)

    def ignore(self, number: int, reason: str, name: str) -> None:
        """Note a file or member that is no row; all parts read all inputs, and the first one keeps it."""
        self.ignored[reason] += 1
        if self.part.number == 0:
            insert(self.part.db, "ignored", [Ignored(number, _encodable(name), reason)])

    def _place(self, number: int, source: str, row: Row, key: str) -> Place:
        if row.data is None:
            return Place()
        if self._last_key != key:  # the rows of one image follow each other: spool it once
            in_place = is_in_place(source, row)
            length = row.length or len(row.data)
            place = Place(number, row.offset, length) if in_place else self.part.spool(row.data)
            self._last_key, self._last_place = key, place
        return self._last_place

    def add_captions(self) -> None:
        """Store captions that decisions add, as rows after all others, so that no row is renumbered."""
        for decision in self.decisions.added():
            self.ordinal += 1
            if first := self._first_rows.get(decision.key):
                weight = None if first.weight is None else 1.0
                added = first._replace(ordinal=self.ordinal, caption=decision.new_caption, weight=weight)
                self._store(added)

    def _store(self, row: StoredRow) -> None:
        if tokens := self._token_limit.exceeded_by(row.caption):
            long = LongCaption(row.ordinal, row.input, row.line, tokens, row.caption)
            insert(self.part.db, "long_captions", [long])
        self._pending.append(row)
        self.pending_characters += len(row.caption) + len(row.columns)

    def insert_pending(self) -> None:
        insert(self.part.db, "rows", self._pending)
        self._pending.clear()
        self.pending_characters = 0


def is_visible(caption: str) -> bool:
    """Whether a caption has more than spaces, control characters and zero-width signs."""
    return any(sign.isalnum() or unicodedata.category(sign) not in INVISIBLE for sign in caption)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


class _TokenLimit:
    """Finds captions that are longer than the model's context length; most are too short to need counting."""

    def __init__(self, context_length: int):
        self.context_length = context_length

    @cached_property
    def _tokenizer(self):
        from open_clip.tokenizer import SimpleTokenizer  # imports torch, and few captions need it

        return SimpleTokenizer()

    def exceeded_by(self, caption: str) -> int:
        """The number of tokens of the caption, start and end included, if it exceeds the limit; else 0."""
        # A token is one byte or more. Cleaning (ftfy, lower case) comes first; only non-ASCII text can grow.
        max_tokens = len(caption) if caption.isascii() else 3 * len(html.unescape(caption).encode())
        if not self.context_length or max_tokens + 2 <= self.context_length:
            return 0
        tokens = len(self._tokenizer.encode(caption)) + 2
        return tokens if tokens > self.context_length else 0


def unchecked_images(part: Part) -> Iterator[ImageRows]:
    """The images of a part that are not checked yet, in the order of their keys."""
    query = f"FROM rows WHERE {UNCHECKED} ORDER BY key, ordinal"
    rows = select(part.db, StoredRow, query, last_key=part.get("last_key"))
    for _, group in groupby(rows, attrgetter("key")):
        of_image, shared = [], {}
        for row in group:  # thousands can be of one image, with equal texts, which are in memory once
            caption, columns = (shared.setdefault(text, text) for text in (row.caption, row.columns))
            of_image.append(row._replace(caption=caption, columns=columns))
        assert len({row.image for row in of_image}) == 1, (
            f"one key for {sorted({row.image for row in of_image})}"
        )
        first = of_image[0]
        yield ImageRows(first.key, first.image, first.container, first.offset, first.length, of_image)


class JoinedRows(NamedTuple):
    """What the rows of one image say together.

    Attributes:
        weights: of each caption; [] if no row says any.
    """

    captions: list[str]
    weights: list[float]
    groups: list[str]
    split: str


def _repeated(weight: float | None, before: float | None) -> Problem:
    """Why a row is left out whose image and caption an earlier row has."""
    if weight is not None and before is not None and weight != before:
        return Problem("conflicting weights", f"{weight:g} here, {before:g} before")
    return Problem(REPEATED, "an earlier row has the same image and caption")


def join_rows(part: Part, image: ImageRows) -> JoinedRows:
    """Join the rows of one image; reject rows that repeat or contradict an earlier one."""
    captions, groups, split = {}, {}, ""
    for row in image.rows:
        if (row.container, row.offset) != (image.container, image.offset):
            detail = "an earlier input has another image of this name"
            part.reject(row.reject(Problem("name in two inputs", detail)))
            continue
        if split and row.split and split != row.split:
            part.reject(row.reject(Problem("conflicting splits", f"{row.split} here, {split} before")))
        elif before := captions.get(row.caption):
            part.reject(row.reject(_repeated(row.weight, before.weight)))
        else:
            captions[row.caption] = row
            split = split or row.split
        if row.group_name:
            groups[row.group_name] = None
    weights = [row.weight for row in captions.values()]
    if all(weight is None for weight in weights):
        weights = []
    return JoinedRows(
        list(captions), [1.0 if weight is None else weight for weight in weights], list(groups), split
    )
