"""The formats of inputs, for building shards and for labelled data. To add one, write its reader in a file of
this folder and add a line to READERS.

    captions.csv, .tsv   --+
    rows.jsonl, .json      |
    table.parquet          +--> Row(line, image or its bytes, caption or label, group, split, other columns)
    folder of images with  |         or Row(line, ..., problem): a named reason why it cannot be used
      .txt or metadata.*   |
    shard.tar            --+

A reader yields one row at a time: nothing here grows with the input. Any file may be compressed, and local or
remote (s3://, gs://, https://, hf://datasets/USER/NAME).
"""

import os
from collections.abc import Callable, Iterator

from data_prep.errors import UserError
from data_prep.inputs.folders import read_folder
from data_prep.inputs.imagefolder import metadata_files, read_imagefolder
from data_prep.inputs.parquet import read_parquet
from data_prep.inputs.rows import Columns, Input, Row
from data_prep.inputs.storage import COMPRESSED, IMAGE_EXTENSIONS, is_url, walk
from data_prep.inputs.tables import read_csv, read_json, read_jsonl
from data_prep.inputs.tars import read_tar
from data_prep.inputs.texts import check_encoding


def _read_folder(folder: Input) -> Iterator[Row]:
    tables = metadata_files(folder.source, folder.columns.image)
    yield from read_imagefolder(folder, tables) if tables else read_folder(folder)


FOLDER, CSV = "folder", ".csv"
# By extension; other extensions are read as CSV.
READERS: dict[str, Callable[[Input], Iterator[Row]]] = {
    CSV: read_csv,
    ".tsv": read_csv,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".tar": read_tar,
    FOLDER: _read_folder,
}
SPREADSHEET = "is a spreadsheet; save it as CSV UTF-8 in your spreadsheet program"
ARCHIVE = "is an archive; unpack it, and pass the folder of images or the table in it"
DATABASE = "is not read; write its rows to a .jsonl or .parquet file"
# By extension, why a file is not an input, and what to do.
UNSUPPORTED = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods", ".numbers"), SPREADSHEET),
    **dict.fromkeys((".zip", ".rar", ".7z"), ARCHIVE),
    **dict.fromkeys((".tgz", ".tbz2", ".txz"), "is a compressed tar; name it .tar.gz, .tar.bz2 or .tar.xz"),
    **dict.fromkeys(
        (".pkl", ".pickle", ".npy", ".npz", ".h5", ".hdf5", ".mat", ".arrow", ".feather"), DATABASE
    ),
    **dict.fromkeys((".db", ".sqlite", ".mdb", ".lmdb", ".tfrecord", ".xml", ".html", ".pdf"), DATABASE),
    **dict.fromkeys(IMAGE_EXTENSIONS, "is an image; pass a table of images and captions, or its folder"),
}
CONTAIN_IMAGES = {".parquet", ".tar"}  # formats that usually contain the images, so --images is not needed
IN_FOLDERS = (".tar", ".parquet", CSV, ".tsv", ".jsonl")  # what people have a folder of, see inputs_in


def read(
    source: str,
    columns: Columns,
    delimiter: str = "",
    encoding: str = "utf-8-sig",
    name: str = "",
    captions_per_txt: int = 0,
    **options,
) -> Iterator[Row]:
    """The rows of one input, in its order; an image with several captions gives several rows of one line.

    Args:
        delimiter, encoding, name, captions_per_txt, options: see Input.

    Raises:
        UserError: the input cannot be read or parsed, lacks a column, or is in another encoding.
    """
    check_encoding(source, encoding)
    table = Input(source, columns, delimiter, encoding, name, captions_per_txt, **options)
    yield from READERS[format_of(source)](table)


def format_of(source: str) -> str:
    """The key of READERS for a file, folder or URL.

    Raises:
        UserError: no such file or folder, or a format that is not read.
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
    if extension in UNSUPPORTED:
        raise UserError(f"{source}: {UNSUPPORTED[extension]}")
    return extension if extension in READERS else CSV


def inputs_in(folder: str) -> list[str]:
    """What to pass instead of a folder of tars or tables: "FOLDER/*.tar"; nothing if it has none."""
    patterns = {}
    for path in walk(folder):
        name = os.path.basename(path)
        while name.endswith(COMPRESSED):
            name = name.rsplit(".", 1)[0]
        if (extension := os.path.splitext(name)[1].lower()) in IN_FOLDERS:
            ending = os.path.basename(path)[len(name) - len(extension) :]
            patterns[os.path.join(os.path.dirname(path), f"*{ending}")] = None
    return list(patterns)


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
