"""Parquet: paths in a column, or the images themselves, as data sets on the Hugging Face hub are stored.

A value that is stored once can be in any number of rows, so that a file of 2 KB can be gigabytes of text.
What rows become is counted before they are made: see _batches() and _pieces().
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.errors import UserError
from data_prep.images import BadImage
from data_prep.inputs.cells import field_of, image_of, shortened
from data_prep.inputs.locations import ImageLocation, read_all
from data_prep.inputs.names import Names, Problem
from data_prep.inputs.opened import FREE_BYTES, MAX_RATIO, open_bytes
from data_prep.inputs.rows import MAX_CHARACTERS, Columns, Input, Row, check_header, rows_of
from data_prep.strict_json import parse_json

# A batch is held in memory, images included. pyarrow copies all values of coded texts for each batch, so that
# batches of texts alone have many rows.
BATCH_ROWS, IMAGE_ROWS, BATCH_BYTES = 1 << 16, 64, 1 << 26
MAX_CELL = 4 * MAX_CHARACTERS  # bytes; UTF-8 has up to 4 for a character
MAX_TEXT, MAX_IMAGE = 1 << 24, 1 << 28  # bytes of the texts, and of the image, of a row
VALUE_BYTES = 64  # about what a value is in Python, besides its text


def read_parquet(table: Input) -> Iterator[Row]:
    """The rows of a Parquet file.

    Raises:
        UserError: it cannot be read, or lacks a column.
    """
    import pyarrow  # slow to import, and needed for Parquet only
    from pyarrow import parquet

    try:
        with open_bytes(table.source) as file:
            plain = parquet.ParquetFile(file)
            schema, reader = plain.schema_arrow, _coded(file, plain.metadata)
            _check_schema(table.source, schema, table.columns)
            class_names = {
                name: names for name in schema.names if (names := _class_names(schema.metadata, name))
            }
            number = 0
            for batch in _batches(reader, file.seek(0, 2), _needed(schema, table.columns)):
                for piece, problem in _pieces(batch, table.columns):
                    cells = {name: _values(piece.column(name)) for name in piece.schema.names}
                    for name in class_names.keys() & cells.keys():
                        cells[name] = [_named(value, class_names[name]) for value in cells[name]]
                    for position in range(1 if problem else piece.num_rows):
                        number += 1
                        row = {name: values[position] for name, values in cells.items()}
                        yield from _rejected(rows_of(table, number, row), problem)
    except (OSError, UnicodeError, pyarrow.ArrowException) as error:
        raise UserError(f"{table.source}: cannot be read as Parquet ({str(error).strip()})") from None


def _rejected(rows: Iterator[Row], problem: Problem | None) -> Iterator[Row]:
    """The rows, with a problem if there is one."""
    for row in rows:
        image = shortened(row.image)
        yield row._replace(image=image, columns="", data=None, problem=problem) if problem else row


def _coded(source, metadata, binary: bool = False):
    """A reader of a file that keeps texts as they are coded, each value once.

    Args:
        binary: also bytes; images, which are hardly ever equal, are slower to read so.
    """
    from pyarrow import parquet

    leaves = [metadata.schema.column(number) for number in range(len(metadata.schema))]
    texts = [
        leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and (binary or _is_text(leaf))
    ]
    return parquet.ParquetFile(source, metadata=metadata, read_dictionary=texts)


def _is_text(leaf) -> bool:
    return leaf.logical_type.type == "STRING"


def _needed(schema, columns: Columns) -> list[str]:
    """The columns that are used, and others that a row keeps, see rows_of()."""
    from pyarrow import types

    used = {part for name in columns.names for part in (name, name.partition(".")[0])}
    # pandas stores its index as columns of this name
    names = [name for name in schema.names if not name.startswith("__index_level_")]
    kinds = {name: schema.field(name).type for name in names}
    return [
        name
        for name, kind in kinds.items()
        if name in used or not (types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind))
    ]


def _batches(reader, file_bytes: int, names: list[str]) -> Iterator:
    """The rows of a file in batches that are small, coded as in the file.

    Args:
        reader: see _coded().
        file_bytes: of the file; one that becomes many times that is read by single rows.
    """
    groups = range(reader.num_row_groups)
    total = sum(reader.metadata.row_group(group).total_byte_size for group in groups)
    is_suspect = total > max(FREE_BYTES, MAX_RATIO * file_bytes)
    for group in groups:
        rows = (
            1 if is_suspect else _batch_rows(reader.metadata.row_group(group), reader.metadata.schema, names)
        )
        for batch in reader.iter_batches(batch_size=rows, row_groups=[group], columns=names):
            yield batch.select(names)


def _batch_rows(group, schema, names: list[str]) -> int:
    """How many rows of a row group are a batch of at most about BATCH_BYTES."""
    top = tuple(f"{name}." for name in names)
    rows = BATCH_ROWS
    for number in range(len(schema)):
        leaf, stored = schema.column(number), group.column(number)
        if not f"{leaf.path}.".startswith(top):
            continue
        held = max(stored.total_uncompressed_size, 1)
        if leaf.physical_type == "BYTE_ARRAY" and not _is_text(leaf):
            rows = min(rows, IMAGE_ROWS, BATCH_BYTES // held)  # each row can have the same large value
        else:
            values = max(held, 16 * (stored.num_values - group.num_rows), 1)
            rows = min(rows, BATCH_BYTES * group.num_rows // values)
    return max(rows, 1)


def _pieces(batch, columns: Columns) -> Iterator[tuple]:
    """Slices of a batch that become at most BATCH_BYTES, each with None; and single rows that have too much,
    without the cells that have it, with the problem.
    """
    names = batch.schema.names
    image = columns.image if columns.image in names else columns.image.partition(".")[0]
    sizes = {name: _sizes(batch.column(name)) for name in names}
    nothing = np.zeros(batch.num_rows, np.int64)
    texts = sum((sizes[name] for name in names if name != image), nothing)
    total = (texts + sizes.get(image, nothing)).tolist()
    problems = {}
    for row in np.flatnonzero(texts > MAX_TEXT).tolist():
        detail = f"its columns have {texts[row]:,} bytes; at most {MAX_TEXT:,}"
        problems[row] = Problem("text too long", detail)
    for use, name in columns.used:
        if use in ("image", "weight") or name not in names or not _is_of_text(batch.column(name).type):
            continue
        for row in np.flatnonzero(sizes[name] > MAX_CELL).tolist():
            detail = f"its {use} has {sizes[name][row]:,} bytes; at most {MAX_CHARACTERS:,} characters"
            problems[row] = Problem("text too long", detail)
    for row in np.flatnonzero(sizes.get(image, nothing) > MAX_IMAGE).tolist():
        problems[row] = Problem("file too large", f"{sizes[image][row]} bytes")
    start, held = 0, 0
    for row in range(batch.num_rows):
        if start < row and (row in problems or held + total[row] > BATCH_BYTES):
            yield batch.slice(start, row - start), None
            start, held = row, 0
        held += total[row]
        if row in problems:
            # the name of its image, if that is not what is too large
            kept = [image] if image in names and sizes[image][row] <= MAX_CELL else []
            yield batch.slice(row, 1).select(kept), problems[row]
            start, held = row + 1, 0
    if start < batch.num_rows:
        yield batch.slice(start), None


def _is_of_text(kind) -> bool:
    """Whether the values of a column are single texts or bytes."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return any(
        test(kind)
        for test in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    )


def _sizes(column) -> np.ndarray:
    """The bytes that each value of a column becomes, int64 [rows]."""
    import pyarrow.compute as pc
    from pyarrow import types

    kind, fixed = column.type, np.full(len(column), VALUE_BYTES, np.int64)
    if types.is_dictionary(kind):
        sizes = _sizes(column.dictionary)
        return np.append(sizes, VALUE_BYTES)[pc.fill_null(column.indices, len(sizes)).to_numpy(False)]
    if types.is_struct(kind):
        return sum((_sizes(field) for field in column.flatten()), fixed)
    if types.is_fixed_size_list(kind):
        each = _sizes(column.flatten())  # without those of nulls
        ends = np.cumsum(np.where(column.is_valid().to_numpy(False), kind.list_size, 0))
        sums = np.concatenate([[0], np.cumsum(each)])
        return fixed + sums[ends] - sums[np.concatenate([[0], ends[:-1]])[: len(ends)]]
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        parts = [column.keys, column.items] if types.is_map(kind) else [column.values]
        sums = np.concatenate([[0], np.cumsum(sum(map(_sizes, parts)))])
        return fixed + np.diff(sums[column.offsets.to_numpy(False)])
    if _is_of_text(kind):
        return pc.fill_null(pc.binary_length(column), VALUE_BYTES).to_numpy(False)
    return fixed


def read_table(path: Path):
    """A local Parquet file of texts, as a table of pyarrow.

    Raises:
        OSError, pyarrow.ArrowException: it cannot be read.
        ValueError: it becomes many times its size, see opened.MAX_RATIO.
    """
    import pyarrow
    from pyarrow import parquet

    plain, file_bytes = parquet.ParquetFile(path), path.stat().st_size
    schema, held, batches = plain.schema_arrow, 0, []
    for batch in _batches(_coded(path, plain.metadata), file_bytes, schema.names):
        held += sum(int(_sizes(column).sum()) for column in batch.columns)
        if held > max(FREE_BYTES, MAX_RATIO * file_bytes):
            raise ValueError(f"{path.name} becomes more than {MAX_RATIO} times its size")
        batches.append(pyarrow.Table.from_batches([batch]).cast(schema))
    return pyarrow.concat_tables(batches) if batches else schema.empty_table()


def column_names(path: str) -> list[str]:
    """The names of the columns of a local Parquet file; [] if it cannot be read."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_schema(path).names
    except (OSError, UnicodeError, pyarrow.ArrowException):
        return []


def schema_classes(source: str, column: str) -> list[str] | None:
    """The names of a column's classes, in the order of their numbers, if the schema of a file has them."""
    from pyarrow import parquet

    with open_bytes(source) as file:
        return _class_names(parquet.ParquetFile(file).schema_arrow.metadata, column)


def _check_schema(source: str, schema, columns: Columns) -> None:
    """Check the columns, and that captions are text.

    Raises:
        UserError: a column or a field is missing, or the captions are structs.
    """
    from pyarrow import types

    structs = {name for name in schema.names if types.is_struct(_item(schema.field(name).type))}
    check_header(source, schema.names, columns, structs=structs)
    for use, column in columns.used:
        kind = _type_of(schema, column)
        if kind is None:
            name, _, field = column.partition(".")
            raise UserError(
                f"{source}: the column {name!r} has no field {field!r}; pass --{use}-column with one of"
                f" {', '.join(_fields(name, _type_of(schema, name)))}"
            )
        if use != "image" and types.is_struct(_item(kind)):
            raise UserError(
                f"{source}: the column {column!r} has structs, not text; pass --{use}-column with one of"
                f" {', '.join(_fields(column, kind))}"
            )


def _fields(column: str, kind) -> list[str]:
    return [f"{column}.{field.name}" for field in _item(kind)]


def _item(kind):
    """The type of the items of a list; of what is no list, its own type."""
    from pyarrow import types

    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return kind.value_type if is_list else kind


def _type_of(schema, column: str):
    """The type of a column, or of the field of a struct; None if there is none (see cells.field_of)."""
    from pyarrow import types

    names = schema.names if hasattr(schema, "names") else [field.name for field in schema]
    if column in names:
        return schema.field(column).type
    name, dot, rest = column.partition(".")
    if not dot or name not in names or not types.is_struct(inner := _item(schema.field(name).type)):
        return None
    return _type_of(inner, rest)


def _named(value, names: list[str]):
    """The name of a class; None for -1, which the library `datasets` writes where there is no label."""
    if not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None if value == -1 else value


def _values(column) -> list:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # bad UTF-8, or a date beyond the year 9999
        if not pyarrow.types.is_string(column.type) and not pyarrow.types.is_large_string(column.type):
            return [_value(cell) for cell in column]
        values = column.cast(pyarrow.binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in values]


def _value(cell):
    """A cell; if text in it is not UTF-8, a lone surrogate, so that check_text() rejects its row."""
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return bytes([error.object[error.start]]).decode("utf-8", "surrogateescape")
    except (ValueError, OverflowError):  # a date that Python's cannot hold, as Parquet's number
        return str(getattr(cell, "value", ""))


class LabelColumn(NamedTuple):
    """The labels of a Parquet file, read without its images.

    Attributes:
        values: by row.
        class_names: if the schema declares a ClassLabel, whose values are numbers of classes.
        group_rows: rows of each row group.
        problems: by row, why it has no label.
    """

    values: list
    class_names: list[str] | None
    group_rows: list[int]
    problems: dict[int, Problem]


def read_label_column(path: Path, columns: Columns) -> LabelColumn:
    """The column `columns.label` of a local Parquet file.

    Raises:
        UserError: the file cannot be read, or lacks a column.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        _check_schema(str(path), file.schema_arrow, columns)
        name = columns.label if columns.label in file.schema_arrow.names else columns.label.partition(".")[0]
        values, problems, shared = [], {}, {}
        for batch in _batches(_coded(path, file.metadata), path.stat().st_size, [name]):
            for piece, problem in _pieces(batch, Columns("", "", label=columns.label)):
                if problem:
                    problems[len(values)] = problem
                    values.append(None)
                    continue
                for value in _values(piece.column(0)):
                    label = field_of({name: value}, columns.label)
                    # equal labels are one text in memory
                    values.append(shared.setdefault(label, label) if isinstance(label, str) else label)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        return LabelColumn(values, _class_names(file.schema_arrow.metadata, columns.label), sizes, problems)
    except (OSError, UnicodeError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({str(error).strip()})") from None


def _class_names(metadata: dict | None, column: str) -> list[str] | None:
    """The names of a ClassLabel, which the library `datasets` writes into the schema as JSON."""
    try:
        schema = parse_json((metadata or {}).get(b"huggingface", b"{}"))
        feature = schema.get("info", schema)["features"][column]
        return list(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else None
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


class ParquetImages:
    """The images of local Parquet files by row, over all files; one row group is held in memory at a time.

    Args:
        column: of the images.
        group_rows: of each file, the rows of each row group.
        images: the folder that paths are relative to; by default that of each file.
    """

    def __init__(self, files: list[Path], column: str, group_rows: list[list[int]], images: str = ""):
        self.files, self.column = files, column
        self.roots = [images or str(file.parent) for file in files]
        self._groups = [(file, group) for file, sizes in enumerate(group_rows) for group in range(len(sizes))]
        self._ends = np.cumsum([rows for sizes in group_rows for rows in sizes])
        self._loaded: tuple = (None, None)  # number of a row group, and its table

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_loaded": (None, None)}

    def __call__(self, row: int) -> bytes | BadImage:
        from pyarrow import ArrowException

        number = int(np.searchsorted(self._ends, row, side="right"))
        file, group = self._groups[number]
        if self._loaded[0] != number:
            try:
                table = _read_group(self.files[file], group, self.column)
            except (OSError, UnicodeError, ArrowException) as error:
                return BadImage("unreadable file", f"{self.files[file]}: {error}")
            self._loaded = (number, table)
        column = self._loaded[1].column(0)
        cell = column[row - int(self._ends[number]) + len(column)].as_py()
        image = image_of(field_of({self._loaded[1].column_names[0]: cell}, self.column))
        if image.data is not None:
            return image.data
        name, problem = Names(self.roots[file]).resolve(image.path)
        problem = image.problem or problem
        return BadImage(*problem) if problem else next(read_all([ImageLocation(self.roots[file], name)]))


def _read_group(path: Path, group: int, column: str):
    """A column of a row group, as a table of at most about twice the bytes that the file says."""
    import pyarrow
    from pyarrow import parquet

    metadata = parquet.read_metadata(path)
    limit, held, batches = BATCH_BYTES + 2 * metadata.row_group(group).total_byte_size, 0, []
    reader = _coded(path, metadata)
    rows = _batch_rows(metadata.row_group(group), metadata.schema, [column])
    for batch in reader.iter_batches(batch_size=rows, row_groups=[group], columns=[column]):
        batches.append(batch)
        held += batch.nbytes
        if held > limit:  # the same bytes in many rows
            return _coded(path, metadata, binary=True).read_row_group(group, columns=[column])
    return pyarrow.Table.from_batches(batches)
