"""A row: an image, one caption or label, and what else the input says about it. All formats produce rows."""

import os
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

from data_prep.errors import UserError
from data_prep.inputs.cells import as_text, field_of, image_of, is_nan, kind_of, shortened, weight_of
from data_prep.inputs.names import Problem
from data_prep.inputs.storage import COMPRESSED, is_url
from data_prep.strict_json import strict_json

MAX_CHARACTERS = 131_072  # of a caption, group, label or path: the longest cell that csv reads by default
# Usual names of columns, to propose one.
USUAL_NAMES = {
    "image": ("file_name", "filename", "filepath", "file_path", "image_path", "path", "file", "url"),
    "caption": ("text", "title", "captions", "prompt", "description"),
    "label": ("class", "class_name", "category", "target"),
}


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
        length: of the image, if `data` is only its first bytes; else None.
        problem: why the row cannot be used.
        weight: in the training loss; None if the input has none.
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
    weight: float | None = None
    length: int | None = None


@dataclass(frozen=True)
class Columns:
    """The names of the columns in a table; "" for a column that is not used. Of captions there may be several
    columns, by commas.
    """

    image: str = "image"
    caption: str = "caption"
    group: str = ""
    split: str = ""
    label: str = ""
    weight: str = ""

    @cached_property
    def captions(self) -> list[str]:
        """The names of the columns of captions."""
        return list(dict.fromkeys(name for text in self.caption.split(",") if (name := text.strip())))

    @cached_property
    def used(self) -> list[tuple[str, str]]:
        """Uses ("image", "caption", ...) with their columns; used ones only."""
        names = {field.name: [getattr(self, field.name)] for field in fields(self)}
        names["caption"] = self.captions
        return [(use, name) for use, of_use in names.items() for name in of_use if name]

    @cached_property
    def extra(self) -> list[tuple[str, str]]:
        """Uses of columns of text besides image and caption, with their columns; used ones only."""
        return [(use, name) for use, name in self.used if use not in ("image", "caption", "weight")]

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of the columns that are used, and "", the name of an index column that pandas writes."""
        return frozenset({"", *(name for _, name in self.used)})


Ignore = Callable[[str, str], None]  # with the reason, and the path of a file or the name of a member


def ignore_nothing(reason: str, name: str) -> None:
    """For those who do not list what is ignored."""


@dataclass(frozen=True)
class Input:
    """One input, and how it is read.

    Attributes:
        source: a file, folder or URL.
        delimiter: of a CSV; "" for the one that its header shows.
        encoding: of CSV, JSONL and .txt, as Python names it.
        name: prefix of the names of images that the input contains; by default its file name.
        captions_per_txt: lines of a .txt to take as captions; 0 takes all, and refuses many.
        image_ext: of the image of a sample in a tar, without a dot; "" for what is an image.
        caption_ext: of the captions beside images and in tars, without a dot; "" for txt and json.
        ignore: is called with the reason and name of each file that is neither an image nor belongs to one.
        fetched: of a tar behind a URL whose images stay there: counts of "requests" and "bytes" that were
            needed are added; None to read the images.
    """

    source: str
    columns: Columns = Columns()
    delimiter: str = ""
    encoding: str = "utf-8-sig"
    name: str = ""
    captions_per_txt: int = 0
    image_ext: str = ""
    caption_ext: str = ""
    ignore: Ignore = ignore_nothing
    fetched: Counter | None = None

    @property
    def label(self) -> str:
        return self.name or os.path.basename(self.source)


def rows_of(table: Input, line: int, cells: dict) -> Iterator[Row]:
    """The rows of one line of a table: one per caption, as captions may be a list.

    Args:
        cells: by name of the column. For images see image_of().
    """
    columns = table.columns
    others = {
        name: value
        for name, value in cells.items()
        if name not in columns.names
        and value not in (None, "")
        and not isinstance(value, (bytes, dict))
        and value == value  # no NaN
    }
    texts, problem = {}, None
    for use, column in columns.extra:
        value = field_of(cells, column)
        texts[use] = as_text(value)
        if value and isinstance(value, (dict, list)):
            problem = Problem(f"{use} is not text", kind_of(value, use, column))
    image = image_of(field_of(cells, columns.image))
    if (
        image.data is not None and image.path
    ):  # of the file that the image was; its folder may be a private one
        is_private = os.path.isabs(image.path)
        others[f"{columns.image}.path"] = os.path.basename(image.path) if is_private else image.path
    row = Row(
        line,
        image.path if image.data is None else f"{table.label}#{line}",
        columns=strict_json(others, ensure_ascii=False, sort_keys=True, default=str) if others else "",
        data=image.data,
        problem=image.problem or problem,
        **texts,
    )
    if columns.weight:
        row = with_weight(row, field_of(cells, columns.weight))
    for column, caption in captions_of(cells, columns.captions):
        if caption is None or isinstance(caption, (str, bytes)):
            yield check_text(row._replace(caption=as_text(caption)))
        else:
            detail = kind_of(caption, "caption", column)
            yield row._replace(problem=row.problem or Problem("caption is not text", detail))


def captions_of(cells: dict, columns: list[str]) -> list[tuple[str, object]]:
    """The captions of a line, which may be lists, each with its column; an empty one where there is none.

    Of several columns some may be empty, and a text that is in two of them is one caption.
    """
    found = []
    for column in columns:
        value = field_of(cells, column)
        found += [(column, caption) for caption in (value if isinstance(value, list) else [value])]
    return (list(_distinct(found)) if len(columns) > 1 else found) or [("", None)]


def _distinct(captions: list[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    """Without empty ones and texts that are there before; what is no text stays, to be rejected."""
    seen = {""}
    for column, caption in captions:
        is_text = caption is None or is_nan(caption) or isinstance(caption, (str, bytes))
        text = " ".join(as_text(caption).split())
        if not is_text or text not in seen:
            yield column, caption
        if is_text:
            seen.add(text)


def with_weight(row: Row, cell: object) -> Row:
    """The row with the weight in a cell; if it is none, with a problem."""
    weight = weight_of(cell)
    if isinstance(weight, Problem):
        return row._replace(problem=row.problem or weight)
    return row._replace(weight=weight)


def malformed(line: int, detail: str) -> Row:
    """A line that cannot be parsed."""
    return Row(line, "", problem=Problem("malformed row", detail))


def check_text(row: Row) -> Row:
    """Give a row a problem if its text is too long, or has bytes that are not UTF-8, decoded as lone
    surrogates (PEP 383), or a NUL, which databases refuse: none of these may reach a shard.
    """
    text = row.image + row.caption + row.group + row.split + row.label
    if len(text) <= MAX_CHARACTERS and text.isascii() and row.columns.isascii() and "\0" not in text:
        return row  # nearly all rows
    for use in ("image", "caption", "group", "split", "label", "columns"):
        cell = getattr(row, use)
        if len(cell) > MAX_CHARACTERS and use != "columns":
            detail = f"its {use} has {len(cell):,} characters; at most {MAX_CHARACTERS:,}"
            return row._replace(image=shortened(row.image), problem=Problem("text too long", detail))
        if not cell.isascii() and (detail := _bad_utf8(cell)):
            return row._replace(problem=Problem("bad UTF-8", detail))
        if "\0" in cell and use != "image":  # an image path with a NUL is no path, see Names
            before = cell[: cell.index("\0")][-20:]
            return row._replace(
                problem=Problem("NUL character", f"in its {use} after {before!r}; see --encoding")
            )
    return row


def _bad_utf8(cell: str) -> str:
    """The first lone surrogate of a text, in words; "" if there is none."""
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        code = ord(cell[error.start])
        is_byte = 0xDC80 <= code <= 0xDCFF
        what = f"byte {bytes([code - 0xDC00])!r}" if is_byte else f"an unpaired surrogate, U+{code:04X},"
        return f"{what} after {cell[max(0, error.start - 20) : error.start]!r}; see --encoding"
    return ""


def is_in_place(source: str, row: Row) -> bool:
    """Whether the row's image can be read again from the input itself, by its offset."""
    is_local = row.offset is not None and not is_url(source) and not source.endswith(COMPRESSED)
    return is_local or row.length is not None


def check_header(
    source: str, names: list[str], columns: Columns, encoding: str = "utf-8", structs: Container[str] = ()
) -> None:
    """Check a table's column names.

    Args:
        structs: see check_columns.

    Raises:
        UserError: a column is missing, or there twice; or the names are in another encoding.
    """
    printed = [name.replace("\t", " ") for name in names]  # a tab is printable: --delimiter may be wrong
    if any(not name.isprintable() or "\udc80" <= max(name, default="") <= "\udcff" for name in printed):
        raise UserError(
            f"{source}:1: the header is not {encoding}; pass --encoding, for example utf-16 or latin-1"
        )
    check_columns(source, names, columns, structs)
    if repeated := [name for _, name in columns.used if names.count(name) > 1]:
        raise UserError(
            f"{source}: the header has {', '.join(map(repr, repeated))} more than once; rename all but one"
        )


def check_columns(source: str, names: list[str], columns: Columns, structs: Container[str] = ()) -> None:
    """Check that a table has the columns that are used.

    Args:
        structs: names of columns that may hold structs, whose fields are columns `name.field`.

    Raises:
        UserError: a column is missing.
    """
    missing = [
        (use, name)
        for use, name in columns.used
        if name not in names and not ("." in name and name.partition(".")[0] in structs)
    ]
    if not missing:
        return
    usual = {use: [name for name in USUAL_NAMES.get(use, ()) if name in names] for use, _ in missing}
    if any(usual.values()):
        options = " ".join(f"--{use}-column {(found or ['NAME'])[0]}" for use, found in usual.items())
    else:
        options = ", ".join(f"--{use}-column" for use in usual)
    hint = " (and --delimiter if that looks like one column)" if len(names) == 1 else ""
    if any(len(name) > 64 for name in names):
        hint += "; if its first line is data, put a line with the names of the columns before it"
    shown = [repr(shortened(name)) for name in names[:20]] + ["..."] * (len(names) > 20)
    lacking = ", ".join(repr(name) for _, name in missing)
    raise UserError(
        f"{source}: no column {lacking}; it has {', '.join(shown) or 'none'}; pass {options}{hint}"
    )
