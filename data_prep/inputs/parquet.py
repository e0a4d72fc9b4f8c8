"""Parquet: paths in a column, or the images themselves, as data sets on the Hugging Face hub are stored."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np

from data_prep.errors import UserError
from data_prep.images import BadImage
from data_prep.inputs.locations import ImageLocation, read_all
from data_prep.inputs.names import Names
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
        with fsspec.open(table.source, "rb", compression="infer") as file:
            reader = parquet.ParquetFile(file)
            check_header(table.source, reader.schema_arrow.names, table.columns)
            number = 0
            for batch in reader.iter_batches(batch_size=BATCH_ROWS):
                # pandas stores its index as columns of this name
                names = [name for name in batch.schema.names if not name.startswith("__index_level_")]
                cells = {name: _values(batch.column(name)) for name in names}
                for position in range(batch.num_rows):
                    number += 1
                    row = {name: values[position] for name, values in cells.items()}
                    yield from rows_of(table, number, row)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{table.source}: cannot be read as Parquet ({str(error).strip()})") from None


def _values(column) -> list:
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # Parquet does not guarantee that strings are UTF-8
        if not pyarrow.types.is_string(column.type) and not pyarrow.types.is_large_string(column.type):
            raise
        values = column.cast(pyarrow.binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in values]


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
        check_header(str(path), file.schema_arrow.names, columns)
        chunks = file.read(columns=[columns.label]).column(0).chunks
        values = [value for chunk in chunks for value in _values(chunk)]
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
        self._loaded: tuple = (None, None)  # number of a row group, and its column

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
            self._loaded = (number, table.column(0))
        column = self._loaded[1]
        cell = column[row - int(self._ends[number]) + len(column)].as_py()
        if isinstance(cell, dict):
            cell = cell.get("bytes") if cell.get("bytes") is not None else cell.get("path")
        if isinstance(cell, bytes):
            return cell
        if not isinstance(cell, str):
            return BadImage("no image", "neither bytes nor a path")
        name, problem = Names(self.roots[file]).resolve(cell)
        return BadImage(*problem) if problem else next(read_all([ImageLocation(self.roots[file], name)]))
