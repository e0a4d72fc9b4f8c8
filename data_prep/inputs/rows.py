"""A row: an image, one caption or label, and what else the input says about it. All formats produce rows."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

from data_prep.errors import UserError
from data_prep.inputs.names import Problem
from data_prep.inputs.storage import COMPRESSED, is_url


class Row(NamedTuple):
    """One caption or label of one image.

    Attributes:
        line: 1-based line of the file, counting the header and line breaks inside of quotes; in formats
            without lines, the number of the row.
        image: a path or URL; if `data` is given, a name for the image.
        caption, group, split, label: the cells of these columns, "" if there are none.
        columns: all other columns, as JSON.
        data: the image, if the input contains it.
        offset: the byte of the input at which `data` begins, if it is stored there unchanged.
        problem: why the row cannot be used.
    """

    line: int
    image: str
    caption: str = ""
    group: str = ""
    split: str = ""
    label: str = ""
    columns: str = ""
    data: bytes | None = None
    offset: int | None = None
    problem: Problem | None = None


@dataclass(frozen=True)
class Columns:
    """The names of the columns in a table; "" for a column that is not used."""

    image: str = "image"
    caption: str = "caption"
    group: str = ""
    split: str = ""
    label: str = ""

    @cached_property
    def by_use(self) -> dict[str, str]:
        """Use ("image", "caption", ...) -> name of the column; used ones only."""
        return {field.name: name for field in fields(self) if (name := getattr(self, field.name))}

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of the columns that are used, and "", the name of an index column that pandas writes."""
        return frozenset({"", *self.by_use.values()})


@dataclass(frozen=True)
class Input:
    """One input, and how it is read.

    Attributes:
        source: a file, folder or URL.
        delimiter: of a CSV; "" is a comma, or a tab in .tsv files.
        encoding: of CSV and JSONL, as Python names it.
        name: prefix of the names of images that the input contains; by default its file name.
    """

    source: str
    columns: Columns = Columns()
    delimiter: str = ""
    encoding: str = "utf-8-sig"
    name: str = ""

    @property
    def label(self) -> str:
        return self.name or os.path.basename(self.source)


def rows_of(table: Input, line: int, cells: dict) -> Iterator[Row]:
    """The rows of one line of a table: one per caption, as captions may be a list.

    Args:
        cells: by name of the column. An image is a path, bytes, or {"bytes": ..., "path": ...} as in data
            sets on the Hugging Face hub.
    """
    columns = table.columns
    image, data = cells.get(columns.image), None
    if isinstance(image, dict):
        image, data = image.get("path"), image.get("bytes")
    elif isinstance(image, bytes):
        image, data = None, image
    if data is not None:
        image = f"{table.label}#{line}"
    others = {
        name: value
        for name, value in cells.items()
        if name not in columns.names and value not in (None, "") and not isinstance(value, (bytes, dict))
    }
    row = Row(
        line,
        as_text(image),
        group=as_text(cells.get(columns.group)) if columns.group else "",
        split=as_text(cells.get(columns.split)) if columns.split else "",
        label=as_text(cells.get(columns.label)) if columns.label else "",
        columns=json.dumps(others, ensure_ascii=False, sort_keys=True, default=str) if others else "",
        data=data,
    )
    captions = cells.get(columns.caption) if columns.caption else None
    for caption in captions if isinstance(captions, list) and captions else [captions]:
        yield check_text(row._replace(caption=as_text(caption)))


def malformed(line: int, detail: str) -> Row:
    """A line that cannot be parsed."""
    return Row(line, "", problem=Problem("malformed row", detail))


def as_text(value) -> str:
    """A cell as text; "" if it is empty or a list."""
    return value if isinstance(value, str) else "" if value is None or isinstance(value, list) else str(value)


def check_text(row: Row) -> Row:
    """Bytes that are not UTF-8 were decoded as lone surrogates (PEP 383): give such rows a problem, so that
    they never reach a shard.
    """
    for cell in (row.image, row.caption, row.group, row.label, row.columns):
        if cell.isascii():
            continue
        try:
            cell.encode()
        except UnicodeEncodeError as error:
            code = ord(cell[error.start])
            what = (
                f"byte {bytes([code - 0xDC00])!r}"
                if 0xDC80 <= code <= 0xDCFF
                else f"an unpaired surrogate, U+{code:04X},"
            )
            before = cell[max(0, error.start - 20) : error.start]
            return row._replace(problem=Problem("bad UTF-8", f"{what} after {before!r}; see --encoding"))
    return row


def is_in_place(source: str, row: Row) -> bool:
    """Whether the row's image can be read again from the input itself, by its offset."""
    return row.offset is not None and not is_url(source) and not source.endswith(COMPRESSED)


def check_header(source: str, names: list[str], columns: Columns, encoding: str = "utf-8") -> None:
    """Check a table's column names.

    Raises:
        UserError: a column is missing, or there twice; or the names are in another encoding.
    """
    if any(not name.isprintable() or "\udc80" <= max(name, default="") <= "\udcff" for name in names):
        raise UserError(
            f"{source}:1: the header is not {encoding}; pass --encoding, for example utf-16 or latin-1"
        )
    if missing := {use: name for use, name in columns.by_use.items() if name not in names}:
        options = ", ".join(f"--{use}-column" for use in missing)
        hint = " (and --delimiter if that looks like one column)" if len(names) == 1 else ""
        raise UserError(
            f"{source}: no column {', '.join(map(repr, missing.values()))}; it has"
            f" {', '.join(map(repr, names)) or 'none'}; pass {options}{hint}"
        )
    if repeated := [name for name in columns.by_use.values() if names.count(name) > 1]:
        raise UserError(
            f"{source}: the header has {', '.join(map(repr, repeated))} more than once; rename all but one"
        )
