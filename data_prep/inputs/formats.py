"""The formats of inputs, for building shards and for labelled data. To add one, write its reader in a file of
this folder and add a line to READERS.

    captions.csv, .tsv   --+
    rows.jsonl             |
    table.parquet          +--> Row(line, image or its bytes, caption or label, group, split, other columns)
    folder of images, .txt |         or Row(line, ..., problem): a named reason why it cannot be used
    shard.tar            --+

A reader yields one row at a time: nothing here grows with the input. Any file may be compressed, and local or
remote (s3://, gs://, https://, hf://datasets/USER/NAME).
"""

import os
from collections.abc import Callable, Iterator

from data_prep.errors import UserError
from data_prep.inputs.folders import read_folder
from data_prep.inputs.parquet import read_parquet
from data_prep.inputs.rows import Columns, Input, Row
from data_prep.inputs.storage import COMPRESSED, is_url
from data_prep.inputs.tables import read_csv, read_jsonl
from data_prep.inputs.tars import read_tar

FOLDER, CSV = "folder", ".csv"
# By extension; other extensions are read as CSV.
READERS: dict[str, Callable[[Input], Iterator[Row]]] = {
    CSV: read_csv,
    ".tsv": read_csv,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
    ".tar": read_tar,
    FOLDER: read_folder,
}
CONTAIN_IMAGES = {".parquet", ".tar"}  # formats that usually contain the images, so --images is not needed


def read(
    source: str, columns: Columns, delimiter: str = "", encoding: str = "utf-8-sig", name: str = ""
) -> Iterator[Row]:
    """The rows of one input, in its order; an image with several captions gives several rows of one line.

    Args:
        delimiter, encoding, name: see Input.

    Raises:
        UserError: the input cannot be read or parsed, lacks a column, or is in another encoding.
    """
    yield from READERS[format_of(source)](Input(source, columns, delimiter, encoding, name))


def format_of(source: str) -> str:
    """The key of READERS for a file, folder or URL.

    Raises:
        UserError: no such file or folder.
    """
    if not is_url(source):
        if os.path.isdir(source):
            return FOLDER
        if not os.path.exists(source):
            raise UserError(
                f"{source}: no such file; inputs are CSV, JSONL, Parquet or tar files, or folders of images"
            )
    name = os.path.basename(source)
    while name.endswith(COMPRESSED):
        name = name.rsplit(".", 1)[0]
    extension = os.path.splitext(name)[1].lower()
    return extension if extension in READERS else CSV


def images_folder(inputs: list[str]) -> str:
    """The default of --images: the folder of the inputs.

    Raises:
        UserError: the inputs are in several folders.
    """
    formats = {source: format_of(source) for source in inputs}
    folders = {source if formats[source] == FOLDER else source.rpartition("/")[0] or "." for source in inputs}
    if len(folders) > 1 and not set(formats.values()) <= CONTAIN_IMAGES:
        raise UserError(
            f"the inputs are in several folders, {', '.join(sorted(folders)[:3])}; pass --images, the folder"
            " that image paths are relative to"
        )
    return sorted(folders)[0]
