"""Parquet: paths in a column, or the images themselves, as data sets on the Hugging Face hub are stored."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.errors import UserError
from data_prep.images import BadImage
from data_prep.inputs.cells import field_of, image_of
from data_prep.inputs.locations import ImageLocation, read_all
from data_prep.inputs.names import Names
from data_prep.inputs.opened import open_bytes
from data_prep.inputs.rows import Columns, Input, Row, check_header, rows_of

BATCH_ROWS = 64  # a batch is held in memory, images included


def read_parquet(table: Input) -> Iterator[Row]:
    """The rows of a Parquet file.

    Raises:
        UserError: it cannot be read, or lacks a column.
    """
    import pyarrow  # slow to import, and needed for Parquet only
    from pyarrow import parquet

    try:
        with open_bytes(table.source) as file:
            reader = parquet.ParquetFile(file)
            schema = reader.schema_arrow
            _check_schema(table.source, schema, table.columns)
            class_names = {
                name: names for name in schema.names if (names := _class_names(schema.metadata, name))
            }
            number = 0
            for batch in reader.iter_batches(batch_size=BATCH_ROWS):
                # pandas stores its index as columns of this name
                names = [name for name in batch.schema.names if not name.startswith("__index_level_")]
                cells = {name: _values(batch.column(name)) for name in names}
                for name in class_names.keys() & cells.keys():
                    cells[name] = [_named(value, class_names[name]) for value in cells[name]]
                for position in range(batch.num_rows):
                    number += 1
                    row = {name: values[position] for name, values in cells.items()}
                    yield from rows_of(table, number, row)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{table.source}: cannot be read as Parquet ({str(error).strip()})") from None


def column_names(path: str) -> list[str]:
    """The names of the columns of a local Parquet file; [] if it cannot be read."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_schema(path).names
    except (OSError, pyarrow.ArrowException):
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
    for use, column in columns.by_use.items():
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
    """

    values: list
    class_names: list[str] | None
    group_rows: list[int]


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
        table = file.read(columns=[columns.label])
        values = [
            field_of({table.column_names[0]: value}, columns.label)
            for chunk in table.column(0).chunks
            for value in _values(chunk)
        ]
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        return LabelColumn(values, _class_names(file.schema_arrow.metadata, columns.label), sizes)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({str(error).strip()})") from None


def _class_names(metadata: dict | None, column: str) -> list[str] | None:
    """The names of a ClassLabel, which the library `datasets` writes into the schema as JSON."""
    try:
        schema = json.loads((metadata or {}).get(b"huggingface", b"{}"))
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
        from pyarrow import ArrowException, parquet

        number = int(np.searchsorted(self._ends, row, side="right"))
        file, group = self._groups[number]
        if self._loaded[0] != number:
            try:
                table = parquet.ParquetFile(self.files[file]).read_row_group(group, columns=[self.column])
            except (OSError, ArrowException) as error:
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
