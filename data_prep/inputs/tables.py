"""CSV, TSV and JSONL: one caption or label per line; in JSONL, captions may be lists."""

import codecs
import csv
import io
import os
from collections.abc import Iterator
from itertools import chain

from data_prep.errors import UserError
from data_prep.inputs.opened import lines_of, open_bytes
from data_prep.inputs.rows import Input, Row, check_columns, check_header, malformed, rows_of
from data_prep.inputs.texts import codec_of
from data_prep.strict_json import parse_json

MAX_FIELD_CHARACTERS = 1 << 26  # images in base64 are long; a quote that is never closed must not fill memory
MAX_FIRST_LINE = 1 << 20
DELIMITERS = (",", "\t", ";", "|")
# How files begin that are no text, whatever their name.
BINARY = {
    "PK\x03\x04": "a zip or Excel file; save a spreadsheet as CSV UTF-8, and unpack a zip",
    "PAR1": "a Parquet file; name it .parquet",
    "\x1f": "a compressed file; name it .csv.gz, or .tar.gz for a tar",
}
JSON_DOCUMENT = (
    "one JSON document; only JSON Lines are read, one object per line. To convert a list of objects: python"
    " -c \"import pandas; pandas.read_json('a.json').to_json('a.jsonl', orient='records', lines=True)\""
)


def read_csv(table: Input) -> Iterator[Row]:
    """The rows of a CSV with a header.

    Raises:
        UserError: it cannot be read or parsed, lacks a column, or is in another encoding.
    """
    source, delimiter = table.source, table.delimiter
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    line, header = 1, None
    try:
        with _open_text(table) as text:
            lines = lines_of(source, text)
            first = next(lines, "")
            _check_is_text(source, first)
            delimiter = {"\\t": "\t", "tab": "\t"}.get(delimiter, delimiter) or _delimiter(table, first)
            reader = csv.reader(chain([first], lines) if first else [], delimiter=delimiter, strict=True)
            for cells in reader:
                start, line = line, reader.line_num + 1
                if header is None:
                    header = cells
                    check_header(source, header, table.columns, table.encoding)
                elif len(cells) > len(header):
                    yield malformed(
                        start,
                        f"{len(cells)} cells, but the header has {len(header)}; quote captions that contain"
                        " the delimiter",
                    )
                elif any(cells):
                    yield from rows_of(table, start, dict(zip(header, cells, strict=False)))
    except UnicodeError:
        line, byte = _first_bad_byte(source, table.encoding)
        raise UserError(
            f"{source}:{line}: byte {byte} of the file is not {table.encoding}; pass --encoding, for example"
            " latin-1"
        ) from None
    except TypeError as error:  # raised by csv.reader for an invalid delimiter
        raise UserError(f"--delimiter {delimiter!r}: {error}") from None
    except (csv.Error, OSError, EOFError) as error:
        raise UserError(
            f"{source}:{line}: cannot be read as a CSV from here on ({error}); quote captions that contain"
            " the delimiter, double the quotes in them, and check --delimiter and --encoding"
        ) from None
    if header is None:
        raise UserError(f"{source}: the file is empty; it must have a header and one row per caption")


def _check_is_text(source: str, first_line: str) -> None:
    """Raise a UserError if a file of another format was named as a CSV."""
    for start, what in BINARY.items():
        if first_line.startswith(start):
            raise UserError(f"{source}: is {what}")
    if _object(first_line) is not None:
        raise UserError(f"{source}: is JSON Lines; name it .jsonl")
    if first_line.strip() in ("[", "{") or first_line.startswith(('[{"', '{"')):
        raise UserError(f"{source}: is {JSON_DOCUMENT}")


def _object(line: str) -> dict | None:
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _delimiter(table: Input, header: str) -> str:
    """The delimiter with which the header has all columns that are used; else the one that gives most."""
    default = ["\t"] if ".tsv" in os.path.basename(table.source).lower() else []
    names = {
        delimiter: next(csv.reader([header], delimiter=delimiter), [])
        for delimiter in dict.fromkeys((*default, *DELIMITERS))
    }
    used = table.columns.names - {""}
    fitting = [delimiter for delimiter in names if used <= set(names[delimiter])]
    return fitting[0] if fitting else max(names, key=lambda delimiter: len(names[delimiter]))


def table_columns(table: Input) -> list[str]:
    """The names of the columns of a CSV, or of the first object of a JSONL; [] if it cannot be read."""
    try:
        with _open_text(table) as text:
            first = text.readline(MAX_FIRST_LINE)
        if (cells := _object(first)) is not None:
            return list(cells)
        delimiter = table.delimiter or _delimiter(table, first)
        return next(csv.reader([first], delimiter=delimiter), [])
    except (OSError, EOFError, UnicodeError, csv.Error, TypeError):
        return []


def read_jsonl(table: Input) -> Iterator[Row]:
    """The rows of a file with one JSON object per line.

    Raises:
        UserError: it cannot be read, or no line has one of the columns.
    """
    names: dict[str, None] = {}
    try:
        with _open_text(table) as text:
            for number, line in enumerate(lines_of(table.source, text), 1):
                if not line.strip():
                    continue
                try:
                    cells = parse_json(line)
                except ValueError as error:
                    yield malformed(number, f"not JSON: {error}")
                    continue
                if isinstance(cells, dict):
                    names |= dict.fromkeys(cells)
                    yield from rows_of(table, number, cells)
                else:
                    yield malformed(number, "each line must be a JSON object")
    except (OSError, EOFError, UnicodeError) as error:
        raise UserError(f"{table.source}: cannot be read ({error}); check --encoding") from None
    if names:
        check_columns(table.source, list(names), table.columns, structs=names)


def read_json(table: Input) -> Iterator[Row]:
    """The rows of a .json that has one object per line, as many tools name their JSON Lines.

    Raises:
        UserError: it is one JSON document.
    """
    try:
        with _open_text(table) as text:
            first = text.readline(MAX_FIRST_LINE)
    except (OSError, EOFError, UnicodeError) as error:
        raise UserError(f"{table.source}: cannot be read ({error}); check --encoding") from None
    if _object(first) is None:
        raise UserError(f"{table.source}: is {JSON_DOCUMENT}")
    yield from read_jsonl(table)


def _open_text(table: Input) -> io.TextIOWrapper:
    try:
        file = open_bytes(table.source)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{table.source}: cannot be read ({error})") from None
    encoding, errors = codec_of(table.encoding)
    return io.TextIOWrapper(file, encoding, errors=errors, newline="")


def _first_bad_byte(source: str, encoding: str) -> tuple[int, int]:
    """Line (1-based) and byte (0-based) of the first byte that is not `encoding`."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line, chunk_start = 1, 0
    with open_bytes(source) as file:
        while chunk := file.read(1 << 16):
            before = decoder.getstate()
            try:
                line += decoder.decode(chunk).count("\n")
            except UnicodeError:
                decoder.setstate(before)
                for position in range(len(chunk)):
                    try:
                        line += decoder.decode(chunk[position : position + 1]).count("\n")
                    except UnicodeDecodeError as error:
                        # error.object: the bytes that the decoder held back, and this one
                        return line, chunk_start + position + 1 - len(error.object) + error.start
            chunk_start += len(chunk)
    return line, chunk_start  # the file ends inside of a character
