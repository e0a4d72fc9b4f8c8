"""An imagefolder of the library `datasets`: a folder of images with metadata.csv, .jsonl or .parquet.

FOLDER/train/metadata.jsonl    {"file_name": "0001.png", "text": "a bell"}; paths are relative to this file
FOLDER/train/0001.png          an image without a row is rejected
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

from data_prep.below import leads_out
from data_prep.errors import UserError
from data_prep.inputs.folders import images_below
from data_prep.inputs.names import Problem
from data_prep.inputs.parquet import column_names, read_parquet
from data_prep.inputs.rows import USUAL_NAMES, Columns, Input, Row
from data_prep.inputs.storage import METADATA, is_url, walk
from data_prep.inputs.tables import read_csv, read_jsonl, table_columns

FILE_NAME = "file_name"
READERS: dict[str, Callable[[Input], Iterator[Row]]] = {
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}


def metadata_files(folder: str, image_column: str = FILE_NAME) -> list[str]:
    """The tables below a folder that make it an imagefolder: a metadata file with a column of file names."""
    return [
        path
        for path in walk(folder)
        if os.path.basename(path) in METADATA
        and os.path.isfile(path)
        and not leads_out(folder, path)
        and {image_column, FILE_NAME} & set(_names(Input(path)))
    ]


def _names(table: Input) -> list[str]:
    return column_names(table.source) if table.source.endswith(".parquet") else table_columns(table)


def read_imagefolder(folder: Input, tables: list[str]) -> Iterator[Row]:
    """The rows of all tables; then, as rejects, the images that no table names. `line` is that of the table.

    Args:
        tables: see metadata_files().

    Raises:
        UserError: a table cannot be read, or has no captions.
    """
    named: set[str] = set()
    for path in tables:
        table = replace(folder, source=path, name=os.path.relpath(path, folder.source))
        below = os.path.dirname(table.name)
        for row in READERS[os.path.splitext(path)[1]](replace(table, columns=_columns(table))):
            if row.data is None and row.image and not is_url(row.image) and not row.image.startswith("/"):
                row = row._replace(image=os.path.normpath(os.path.join(below, row.image)))
            named.add(row.image)
            yield row
    detail = f"no row of {os.path.basename(tables[0])} has this {FILE_NAME}"
    names = {os.path.relpath(path, folder.source) for path in tables}
    images = images_below(
        folder.source, ignore=lambda reason, name: name in names or folder.ignore(reason, name)
    )
    unnamed = (image for image in images if image not in named)
    for number, image in enumerate(unnamed, 1):
        yield Row(number, image, problem=Problem("not in the metadata", detail))


def _columns(table: Input) -> Columns:
    """The columns that were asked for where the table has them, else those of the convention."""
    names, columns = _names(table), table.columns
    image = columns.image if columns.image in names else FILE_NAME
    if all(name.partition(".")[0] in names for name in columns.captions):
        return replace(columns, image=image)
    usual = [name for name in USUAL_NAMES["caption"] if name in names]
    if columns.caption != Columns.caption or not usual:
        raise UserError(
            f"{table.source}: no column {columns.caption!r}; it has {', '.join(map(repr, names))}; pass"
            " --caption-column"
        )
    return replace(columns, image=image, caption=usual[0])
