"""Inputs of any kind become rows, one at a time: nothing here grows with the input.

captions.csv, .tsv   --+
rows.jsonl             |
table.parquet          +--> Row(line, image or its bytes, one caption, group, split, the other columns)
folder of images, .txt |         or Row(line, ..., problem): a named reason why it cannot be used
shard.tar            --+

Each may be local or a URL that fsspec knows (s3://, gs://, https://, hf://datasets/USER/NAME), and
compressed."""

import codecs
import csv
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import fsspec

from data_prep.errors import UserError
from data_prep.inputs.names import key_of
from data_prep.inputs.sources import IMAGE_EXTENSIONS, kind_of, walk
from data_prep.inputs.tars import tar_samples


class Row(NamedTuple):
    # in the file, 1-based, counting the header and line breaks inside quotes; else the number of the row
    line: int
    image: str  # a path or URL; where `data` holds the image, a name for it
    caption: str
    group: str = ""
    split: str = ""
    columns: str = ""  # the columns that have no other use, as JSON
    data: bytes | None = None  # where the input holds the image itself
    at: int | None = None  # and the byte of the input where it stands as it is
    problem: tuple[str, str] | None = None  # reason and detail, where the row cannot be used


@dataclass(frozen=True)
class Columns:
    """Which column is what; tars and folders have none."""

    image: str = "image"
    caption: str = "caption"
    group: str = ""
    split: str = ""


def read(
    source: str, columns: Columns, delimiter: str = "", encoding: str = "utf-8-sig", label: str = ""
) -> Iterator[Row]:
    """The rows of one input, in its order; an image with several captions gives several rows of the same
    line.

    An image that the input holds itself is named after `label`, by default the input's own name.

    Raises:
        UserError: the input cannot be read or parsed, lacks a column, or is in another encoding.
    """
    kind, label = kind_of(source), label or os.path.basename(source)
    if kind == "folder":
        yield from _folder(source)
        return
    if kind in (
        "csv",
        "jsonl",
    ):  # bytes that are not the encoding are said with their line; the rest needs no opening
        text = _text(source, encoding)
        cells = _csv(source, text, columns, delimiter, encoding) if kind == "csv" else _jsonl(source, text)
        for line, row in cells:
            yield from _rows(line, row, columns, f"{label}#{line}")
        return
    try:
        with fsspec.open(source, "rb", compression="infer") as file:
            if kind == "tar":
                yield from _tar(label, file, columns)
            else:
                for line, row in _parquet(source, file, columns):
                    yield from _rows(line, row, columns, f"{label}#{line}")
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{source}: cannot be read ({str(error).strip()})") from None


def _rows(line: int, row: dict | str, columns: Columns, name: str) -> Iterator[Row]:
    """The Rows of one line; `row` is a string where the line could not be parsed."""
    if isinstance(row, str):
        yield Row(line, "", "", problem=("malformed row", row))
        return
    image, data = row.get(columns.image), None
    if isinstance(image, dict):  # as image data sets on the Hugging Face hub are stored
        image, data = image.get("path"), image.get("bytes")
        image = name if data is not None else image
    elif isinstance(image, bytes):
        image, data = name, image
    captions = row.get(columns.caption)
    others = {
        key: value
        for key, value in row.items()
        if key not in (columns.image, columns.caption, columns.group, columns.split)
    }
    others = {
        key: value
        for key, value in others.items()
        if value not in (None, "") and not isinstance(value, (bytes, dict))
    }
    texts = [
        _word(image),
        _word(row.get(columns.group)) if columns.group else "",
        _word(row.get(columns.split)) if columns.split else "",
        json.dumps(others, ensure_ascii=False, sort_keys=True, default=str) if others else "",
    ]
    for caption in captions if isinstance(captions, list) and captions else [captions]:
        found = Row(line, texts[0], _word(caption), *texts[1:], data)
        yield _checked(found)


def _checked(row: Row) -> Row:
    """Bytes that were not UTF-8 were read as lone surrogates: they are named, and never reach a shard."""
    for cell in (row.image, row.caption, row.group, row.columns):
        if not cell.isascii():
            try:
                cell.encode()
            except UnicodeEncodeError as error:
                lone = ord(cell[error.start])
                what = (
                    f"byte {bytes([lone - 0xDC00])!r}"
                    if 0xDC80 <= lone <= 0xDCFF
                    else f"half a character, U+{lone:04X},"
                )
                before = cell[max(0, error.start - 20) : error.start]
                return row._replace(problem=("bad UTF-8", f"{what} after {before!r}; see --encoding"))
    return row


def _word(value) -> str:
    return value if isinstance(value, str) else "" if value is None or isinstance(value, list) else str(value)


# CSV and JSONL


def _text(source: str, encoding: str) -> io.TextIOWrapper:
    try:
        codecs.lookup(encoding)
        file = fsspec.open(source, "rb", compression="infer").open()
    except (OSError, LookupError, ValueError, ImportError) as error:
        raise UserError(f"{source}: cannot be read ({error})") from None
    # utf-8 is read past single bad bytes, and their rows are rejected; in other encodings one bad byte shifts
    # the rest.
    lenient = codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")
    return io.TextIOWrapper(file, encoding, errors="surrogateescape" if lenient else "strict", newline="")


def _csv(
    source: str, text: io.TextIOWrapper, columns: Columns, delimiter: str, encoding: str
) -> Iterator[tuple[int, dict | str]]:
    delimiter = {
        "\\t": "\t",
        "tab": "\t",
        "": "\t" if ".tsv" in os.path.basename(source).lower() else ",",
    }.get(delimiter, delimiter)
    line, header = 1, None
    try:
        with text:
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            for cells in reader:
                start, line = line, reader.line_num + 1
                if header is None:
                    header = _header(source, cells, columns, encoding)
                elif len(cells) > len(header):
                    yield (
                        start,
                        (
                            f"{len(cells)} cells where the header has {len(header)}; quote captions that hold"
                            " the delimiter"
                        ),
                    )
                elif any(cells):
                    yield start, dict(zip(header, cells, strict=False))
    except (UnicodeError, csv.Error, TypeError, OSError, EOFError) as error:
        if isinstance(error, UnicodeError):
            line, byte = _locate(source, encoding)
            raise UserError(
                f"{source}:{line}: byte {byte} of the file is not {encoding}; pass --encoding, for example"
                " latin-1"
            ) from None
        if isinstance(error, TypeError):  # csv's own complaint about a delimiter
            raise UserError(f"--delimiter {delimiter!r}: {error}") from None
        raise UserError(
            f"{source}:{line}: cannot be read as a CSV from here on ({error}); quote captions that hold the"
            " delimiter, double the quotes inside of them, and check --delimiter and --encoding"
        ) from None
    if header is None:
        raise UserError(f"{source}: the file is empty; a header and one row per caption are wanted")


def _header(source: str, cells: list[str], columns: Columns, encoding: str) -> list[str]:
    if any(not name.isprintable() or "\udc80" <= max(name, default="") <= "\udcff" for name in cells):
        raise UserError(
            f"{source}:1: the header is not {encoding}; pass --encoding, for example utf-16 or latin-1"
        )
    wanted = [column for column in (columns.image, columns.caption, columns.group, columns.split) if column]
    if missing := [column for column in wanted if column not in cells]:
        raise UserError(
            f"{source}: no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, cells))}: pass"
            " --image-column, --caption-column, --group-column (and --delimiter if that looks like one"
            " column)"
        )
    if repeated := [column for column in wanted if cells.count(column) > 1]:
        raise UserError(
            f"{source}: the header has {', '.join(map(repr, repeated))} more than once; rename all but one"
        )
    return cells


def _locate(source: str, encoding: str) -> tuple[int, int]:
    """Line (1-based) and byte (0-based) of the first byte that is not `encoding`."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line, byte = 1, 0
    with fsspec.open(source, "rb", compression="infer") as file:
        while chunk := file.read(1 << 16):
            before = decoder.getstate()
            try:
                line += decoder.decode(chunk).count("\n")
            except UnicodeError:
                decoder.setstate(before)
                for at in range(len(chunk)):
                    try:
                        line += decoder.decode(chunk[at : at + 1]).count("\n")
                    except (
                        UnicodeDecodeError
                    ) as error:  # of the bytes that the decoder held back, and this one
                        return line, byte + at + 1 - len(error.object) + error.start
            byte += len(chunk)
    return line, byte  # it ends inside of a character


def _jsonl(source: str, text: io.TextIOWrapper) -> Iterator[tuple[int, dict | str]]:
    with text:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                yield number, f"not JSON: {error}"
                continue
            yield number, row if isinstance(row, dict) else "a JSON object is wanted on each line"


# Parquet


def _parquet(source: str, file, columns: Columns) -> Iterator[tuple[int, dict]]:
    import pyarrow  # here, because most inputs do without
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        _header(source, table.schema_arrow.names, columns, "utf-8")
        number = 0
        for batch in table.iter_batches(batch_size=64):  # images may be inside
            # What pandas adds for its index says nothing about the image.
            cells = {
                name: _cells(batch.column(name))
                for name in batch.schema.names
                if not name.startswith("__index_level_")
            }
            for at in range(batch.num_rows):
                number += 1
                yield number, {name: values[at] for name, values in cells.items()}
    except pyarrow.ArrowException as error:
        raise UserError(f"{source}: cannot be read as Parquet ({error})") from None


def _cells(column) -> list:
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # Parquet files may hold text that is none
        if not pyarrow.types.is_string(column.type) and not pyarrow.types.is_large_string(column.type):
            raise
        values = column.cast(pyarrow.binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in values]


# Folders


def _folder(source: str) -> Iterator[Row]:
    """Every image below the folder; each line of the .txt beside it is a caption."""
    line = 0
    for path in walk(source):
        stem, extension = os.path.splitext(path)
        if extension.lower() not in IMAGE_EXTENSIONS:
            continue
        line += 1
        image = os.path.relpath(path, source)
        try:
            captions = Path(stem + ".txt").read_bytes().decode("utf-8-sig", "surrogateescape").splitlines()
        except FileNotFoundError:
            yield Row(
                line, image, "", problem=("no caption file", f"{os.path.basename(stem)}.txt is not beside it")
            )
            continue
        for caption in [text for text in captions if text.strip()] or [""]:
            yield _checked(Row(line, image, caption))


# Tars


def _tar(label: str, file, columns: Columns) -> Iterator[Row]:
    for number, sample in enumerate(tar_samples(file, IMAGE_EXTENSIONS), 1):
        name = f"{label}/{sample.key}"
        if sample.problem:
            yield Row(number, name, "", problem=sample.problem)
            continue
        image, group = sample.name_and_group()
        if (
            image and key_of(image) == sample.key
        ):  # a tar of ours: its images keep their names, and so their keys and groups
            name, group = image, "" if group == f"image:{image}" else group
        else:
            group = ""
        for caption in sample.captions(columns.caption) or [""]:
            yield _checked(
                Row(
                    number,
                    name,
                    caption,
                    group,
                    columns=sample.columns(),
                    data=sample.image,
                    at=sample.image_at,
                )
            )
