"""CSV, TSV and JSONL: one caption or label per line; in JSONL, captions may be lists."""

import codecs
import csv
import io
import json
import os
from collections.abc import Iterator

import fsspec

from data_prep.errors import UserError
from data_prep.inputs.rows import Input, Row, check_header, malformed, rows_of


def read_csv(table: Input) -> Iterator[Row]:
    """The rows of a CSV with a header.

    Raises:
        UserError: it cannot be read or parsed, lacks a column, or is in another encoding.
    """
    source, delimiter = table.source, _delimiter(table)
    line, header = 1, None
    try:
        with _open_text(table) as text:
            reader = csv.reader(text, delimiter=delimiter, strict=True)
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


def read_jsonl(table: Input) -> Iterator[Row]:
    """The rows of a file with one JSON object per line.

    Raises:
        UserError: it cannot be read.
    """
    with _open_text(table) as text:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                cells = json.loads(line)
            except ValueError as error:
                yield malformed(number, f"not JSON: {error}")
                continue
            if isinstance(cells, dict):
                yield from rows_of(table, number, cells)
            else:
                yield malformed(number, "each line must be a JSON object")


def _delimiter(table: Input) -> str:
    default = "\t" if ".tsv" in os.path.basename(table.source).lower() else ","
    return {"\\t": "\t", "tab": "\t", "": default}.get(table.delimiter, table.delimiter)


def _open_text(table: Input) -> io.TextIOWrapper:
    try:
        codec = codecs.lookup(table.encoding)
        file = fsspec.open(table.source, "rb", compression="infer").open()
    except (OSError, LookupError, ValueError, ImportError) as error:
        raise UserError(f"{table.source}: cannot be read ({error})") from None
    # UTF-8 resynchronizes after a bad byte, so only that row is rejected. In other encodings one bad byte can
    # shift all that follows.
    lenient = codec.name in ("utf-8", "utf-8-sig")
    return io.TextIOWrapper(
        file, table.encoding, errors="surrogateescape" if lenient else "strict", newline=""
    )


def _first_bad_byte(source: str, encoding: str) -> tuple[int, int]:
    """Line (1-based) and byte (0-based) of the first byte that is not `encoding`."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line, chunk_start = 1, 0
    with fsspec.open(source, "rb", compression="infer") as file:
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
