"""Images with labels, from any of these:

    FOLDER/[SPLIT/]CLASS/image.jpg          a folder per class; imagenette's folders get their class names
    FOLDER/[SPLIT/]metadata.jsonl, ...      an imagefolder, see data_prep.inputs.imagefolder
    labels.csv, .tsv, .jsonl, .parquet,     columns image and label, or images in the file: every format that
      .tar                                  data_prep.inputs.formats reads
    FOLDER/[data/]SPLIT-....parquet         as image data sets on the Hugging Face hub are stored
    hf://datasets/USER/NAME, https://...    the same on the hub; a table behind a URL
    SHARDS                                  made by data_prep; the label is an additional column of the input
    FOLDER/cars_train_annos.mat, ...        Stanford Cars (Krause et al. 2013), as published

Images that cannot be used are listed with their reason: labelled + unlabelled = all.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath

import numpy as np

from data_prep.atomic import PLACE, sweep
from data_prep.errors import UserError
from data_prep.images import DAMAGE, BadImage
from data_prep.inputs.cells import as_text
from data_prep.inputs.folders import images_below
from data_prep.inputs.formats import format_of, images_folder, read
from data_prep.inputs.hub import is_data_set
from data_prep.inputs.imagefolder import metadata_files
from data_prep.inputs.locations import ImageLocation, check_root, read_all
from data_prep.inputs.names import Names
from data_prep.inputs.parquet import ParquetImages, read_label_column, schema_classes
from data_prep.inputs.rows import Columns, Row, is_in_place
from data_prep.inputs.storage import expand, is_url
from data_prep.progress import progress
from data_prep.shards import Shards, read_manifest
from data_prep.terminal import say

SPLITS = ("train", "val", "valid", "validation", "test")
IMAGENETTE = {  # WordNet ids of the ten classes of github.com/fastai/imagenette
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
SHOWN_FOLDERS = 5
CARS_FILES = {"train": "cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}


@dataclass(frozen=True)
class Labelled:
    """Images with labels.

    Attributes:
        place: where they are from, for messages.
        classes: names of the classes, by label.
        labels: int64 [n], from 0.
        names: of the images, for messages.
        read: number of an image -> its bytes, or why they cannot be read.
        unlabelled: (name, reason) of the images without a label.
        groups: int64 [n]: images of one group are correlated. Shards have groups of several images, and so
            have images with the same bytes and different labels.
        duplicates: rows that repeat an image with the same label, and were left out.
    """

    place: str
    classes: list[str]
    labels: np.ndarray
    names: list[str]
    read: Callable[[int], bytes | BadImage]
    unlabelled: list[tuple[str, str]]
    groups: np.ndarray
    duplicates: int = 0
    digests: tuple[bytes, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def sha256(self) -> str:
        """Of classes, labels and the bytes of the images, in order: equal for equal images in any format."""
        sha = hashlib.sha256(json.dumps([self.classes, self.labels.tolist()]).encode())
        for digest in self.digests:
            sha.update(digest)
        return sha.hexdigest()


def distinct(data: Labelled) -> Labelled:
    """`data` with each image once: a table with a row per caption has the same image in several rows.

    An image is known by its bytes. With several labels it is kept once for each, in one group. Reads every
    image.
    """
    digests = []
    for number in progress(range(len(data)), desc="hashing images", unit="image", leave=False, delay=1):
        content = data.read(number)
        unreadable = isinstance(content, BadImage)
        digests.append(hashlib.sha256(f"number {number}".encode() if unreadable else content).digest())
    groups, rows, keep = {}, set(), []
    for number, (digest, label, group) in enumerate(
        zip(digests, data.labels.tolist(), data.groups.tolist(), strict=True)
    ):
        groups.setdefault(digest, group)
        if (digest, label) not in rows:
            rows.add((digest, label))
            keep.append(number)
    one_group = np.array([groups[digest] for digest in digests], np.int64)
    grouped = dataclasses.replace(data, groups=one_group, digests=tuple(digests))
    return dataclasses.replace(selected(grouped, keep), duplicates=len(data) - len(keep))


def selected(data: Labelled, keep: Sequence[int]) -> Labelled:
    """The images of `data` with these numbers, in this order."""
    kept = np.array(keep, np.int64)
    return dataclasses.replace(
        data,
        labels=data.labels[kept],
        names=[data.names[number] for number in keep],
        read=_Selected(data.read, kept),
        groups=data.groups[kept],
        digests=tuple(data.digests[number] for number in keep),
    )


def read_labelled(
    data: str | Path,
    split: str = "",
    image_column: str = "image",
    label_column: str = "label",
    images: str = "",
    encoding: str = "utf-8-sig",
    delimiter: str = "",
) -> Labelled:
    """The images with labels at `data`, each once (see distinct()).

    Args:
        data: a file, folder or URL of one of the kinds above.
        split: which one, if there are several.
        image_column, label_column: of a table; of shards, label_column only.
        images: of a table, the folder or URL that image paths are relative to and may not leave; by default
            the table's folder.
        encoding, delimiter: of a table, see data_prep.inputs.rows.Input.

    Raises:
        UserError: no such data, split or column; or nothing in it has a label.
    """
    columns = Columns(image_column, caption="", label=label_column)
    if images:
        check_root(images)
    table = partial(_table, columns=columns, images=images, encoding=encoding, delimiter=delimiter)
    if is_url(str(data)):
        return distinct(_remote(str(data), split, table))
    return distinct(_read(Path(data), split, columns, images, table))


def _read(data: Path, split: str, columns: Columns, images: str, table: Callable) -> Labelled:
    if data.is_file():
        if split:
            raise UserError(f"{data}: a file is one split, but --split {split!r} was given; omit it")
        if data.suffix == ".parquet":
            return _parquet(str(data), [data], columns, images)
        return table(str(data), [str(data)])
    if not data.is_dir():
        raise UserError(
            f"{data}: no such file or folder; pass a folder with a folder per class, a table (CSV, JSONL,"
            " Parquet), a tar, or shards"
        )
    if files := sorted(data.glob("*.parquet")) or sorted(data.glob("data/*.parquet")):
        split = _choose(data, split, sorted({_split_of(file) for file in files}))
        files = [file for file in files if _split_of(file) == split]
        return _parquet(f"{data}, {split}", files, columns, images)
    if images:
        raise UserError(f"{data}: --images {images} is for tables, and this is a folder; omit it")
    if (data / "manifest.json").is_file():
        splits = [name for name, entry in read_manifest(data)["splits"].items() if entry["samples"]]
        return _shards(data, _choose(data, split, splits), columns.label)
    for folder in (data, data / "devkit"):
        if (folder / "cars_meta.mat").is_file():
            return _cars(data, folder, split)
    if splits := [name for name in SPLITS if (data / name).is_dir()]:
        data = data / _choose(data, split, splits)
    elif split:
        raise UserError(
            f"{data}: has no splits, but --split {split!r} was given; omit it, or add a folder {split}"
        )
    if metadata_files(str(data), columns.image):
        return table(str(data), [str(data)])
    return _class_folders(data)


def _remote(data: str, split: str, table: Callable) -> Labelled:
    """A table behind a URL, or a data set on the hub; images in it are copied to a temporary file."""
    sources = expand([data])
    if not is_data_set(data):
        return table(data, sources)
    split = _choose(data, split, sorted({_split_of(source) for source in sources}))
    return table(f"{data}, {split}", [source for source in sources if _split_of(source) == split])


def _choose(data: str | Path, split: str, splits: list[str]) -> str:
    if split in splits:
        return split
    if not split and len(splits) == 1:
        return splits[0]
    found = f"no split {split!r}" if split else "several splits"
    raise UserError(f"{data}: {found}; pass one of {', '.join(splits)} as its split")


def _split_of(file: str | Path) -> str:
    """data/train-00000-of-00002.parquet -> train; so is CONFIG/train/0000.parquet of the hub's conversion."""
    path = PurePosixPath(file)
    name = path.name.split("-")[0].removesuffix(".parquet")
    return path.parent.name if name.isdecimal() else name


def _number_classes(labels: Sequence) -> tuple[list[str], list[int]]:
    """The classes of labels that are texts, in order (numerically, if all are numbers); and the number of
    each label, -1 for none.
    """
    texts = [as_text(label).strip() for label in labels]
    distinct = set(texts) - {""}
    classes = sorted(distinct, key=int if all(text.isdecimal() for text in distinct) else str)
    numbers = {text: number for number, text in enumerate(classes)}
    return classes, [numbers.get(text, -1) for text in texts]


def _labelled(
    place: str,
    labels: Sequence,
    names: list[str],
    read_image: Callable[[int], bytes | BadImage],
    classes: list[str] | None = None,
    groups: np.ndarray | None = None,
    problems: dict[int, str] | None = None,
) -> Labelled:
    """Leave out the images without a label.

    Args:
        labels: numbers of `classes`, or texts if there are no `classes`.
        read_image: position of an image -> its bytes, or why they cannot be read.
        problems: reasons of images that cannot be used, by position; they have no label.
    """
    problems = problems or {}
    is_numbered = classes is not None
    if not is_numbered:
        classes, labels = _number_classes(labels)
    numbers = np.array([-1 if label is None else label for label in labels], np.int64)
    is_valid = (numbers >= 0) & (numbers < len(classes))
    keep = np.flatnonzero(is_valid)
    unlabelled = []
    for position in np.flatnonzero(~is_valid).tolist():
        reason = f"label {numbers[position]} of {len(classes)} classes" if is_numbered else "no label"
        unlabelled.append((names[position], problems.get(position, reason)))
    if not len(keep):
        raise UserError(
            f"{place}: none of {len(numbers)} images has a label; check --label-column, or the first reason:"
            f" {unlabelled[0][1] if unlabelled else 'no images'}"
        )
    groups = np.arange(len(numbers)) if groups is None else groups
    kept_names = [names[position] for position in keep]
    return Labelled(
        place, classes, numbers[keep], kept_names, _Selected(read_image, keep), unlabelled, groups[keep]
    )


class _Located:
    """Images that are read by their location."""

    def __init__(self, locations: list[ImageLocation | BadImage]):
        self.locations = locations

    def __call__(self, number: int) -> bytes | BadImage:
        location = self.locations[number]
        return location if isinstance(location, BadImage) else next(read_all([location]))


class _TableImages(_Located):
    """Collects the locations of a table's images. Images in the table that cannot be read again by an offset
    are copied to a temporary file, which is deleted with this object.
    """

    def __init__(self, root: str):
        super().__init__([])
        self._root, self._names = root, Names(root)
        self._copies: str | None = None

    def add(self, source: str, row: Row) -> None:
        if row.data is None:
            name, problem = self._names.resolve(row.image)
            location = BadImage(*problem) if problem else ImageLocation(self._root, name)
        elif is_in_place(source, row):
            location = ImageLocation(source, row.image, row.offset, len(row.data))
        else:
            location = self._copy(row)
        self.locations.append(location)

    def _copy(self, row: Row) -> ImageLocation:
        if self._copies is None:
            sweep(Path(tempfile.gettempdir()))
            left = f".{PLACE}-{os.getpid()}.partial"
            descriptor, self._copies = tempfile.mkstemp(left, ".labelled-images-")
            os.close(descriptor)
            weakref.finalize(self, _delete, self._copies, os.getpid())
        with open(self._copies, "ab") as file:
            offset = file.tell()
            file.write(row.data)
        return ImageLocation(self._copies, row.image, offset, len(row.data))


def _delete(path: str, process: int) -> None:
    if os.getpid() == process:  # not in a worker process, which has a copy of the object
        Path(path).unlink(missing_ok=True)


def _table(
    place: str, sources: list[str], columns: Columns, images: str, encoding: str, delimiter: str
) -> Labelled:
    """Inputs of any format of data_prep.inputs.formats."""
    table_images = _TableImages(images or images_folder(sources))
    labels, names, problems = [], [], {}
    for source in sources:
        for row in read(source, columns, delimiter, encoding):
            if row.problem:
                problems[len(labels)] = str(BadImage(*row.problem))
            names.append(row.image.strip() or (f"line {row.line}" if row.problem else ""))
            labels.append("" if row.problem else row.label)
            table_images.add(source, row)
    classes = schema_classes(sources[0], columns.label) if format_of(sources[0]) == ".parquet" else None
    if classes:
        numbers = {name: number for number, name in enumerate(classes)}
        labels = [numbers.get(label, -1) for label in labels]
    return _labelled(place, labels, names, table_images, classes, problems=problems)


def _parquet(place: str, files: list[Path], columns: Columns, images: str) -> Labelled:
    """Parquet files, without reading their images; those are read by row, one row group at a time."""
    labels, group_rows, classes, problems = [], [], None, {}
    for number, path in enumerate(files):
        column = read_label_column(path, columns)
        if number and column.class_names != classes:
            raise UserError(
                f"{path}: its schema has other class names than {files[0]}; all files must be of one data set"
            )
        classes = column.class_names
        problems |= {len(labels) + row: str(BadImage(*why)) for row, why in column.problems.items()}
        labels += column.values
        group_rows.append(column.group_rows)
    read_row = ParquetImages(files, columns.image, group_rows, images)
    names = [f"row {row}" for row in range(1, len(labels) + 1)]
    return _labelled(place, labels, names, read_row, classes, problems=problems)


class _Selected:
    """The images at some positions: Labelled.read."""

    def __init__(self, read_image: Callable[[int], bytes | BadImage], positions: np.ndarray):
        self.read_image, self.positions = read_image, positions

    def __call__(self, number: int) -> bytes | BadImage:
        return self.read_image(int(self.positions[number]))


class _ShardImages:
    """The image of a sample of shards, by its number."""

    def __init__(self, shards: Shards):
        self.shards = shards

    def __call__(self, number: int) -> bytes:
        return self.shards.read(number).image


def _shards(folder: Path, split: str, label_column: str) -> Labelled:
    shards = Shards(folder, split)
    shards.verify()
    columns = [shards.meta(number).get("columns", {}) for number in range(len(shards))]
    if not any(label_column in of_sample for of_sample in columns):
        existing = ", ".join(sorted({name for of_sample in columns for name in of_sample})) or "none"
        raise UserError(
            f"{folder}: its samples have no column {label_column!r}; they have {existing}; pass"
            " --label-column"
        )
    return _labelled(
        f"{folder}, {split}",
        [of_sample.get(label_column) for of_sample in columns],
        [shards.key(number) for number in range(len(shards))],
        _ShardImages(shards),
        groups=shards.groups,
    )


def _files(place: str, root: Path, names: list[str], labels: Sequence[int], classes: list[str]) -> Labelled:
    """Files below `root`."""
    locations = [ImageLocation(str(root), name) for name in names]
    return _labelled(place, labels, names, _Located(locations), classes)


def _class_folders(folder: Path) -> Labelled:
    classes = sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")
    )
    if not classes:
        raise UserError(f"{folder}: has no folders; it must have one folder of images per class")
    images = {
        name: sorted(f"{name}/{image}" for image in images_below(str(folder / name))) for name in classes
    }
    if empty := [name for name in classes if not images[name]]:
        listed = ", ".join(empty[:SHOWN_FOLDERS]) + ", ..." * (len(empty) > SHOWN_FOLDERS)
        if len(empty) == len(classes):
            raise UserError(f"{folder}: none of its {len(empty)} folders has an image ({listed})")
        if os.environ.get("RANK", "0") == "0":
            say(f"{folder}: folders without an image are not counted as classes: {len(empty)} ({listed})")
        classes = [name for name in classes if images[name]]
    names = [image for name in classes for image in images[name]]
    labels = [label for label, name in enumerate(classes) for _ in images[name]]
    return _files(str(folder), folder, names, labels, [IMAGENETTE.get(name, name) for name in classes])


def _cars(data: Path, devkit: Path, split: str) -> Labelled:
    """Stanford Cars: classes are numbered from 1; file names are relative to the folder cars_SPLIT, or to
    `data`.

    Args:
        devkit: the folder of cars_meta.mat.
    """
    files = {
        name: folder / file
        for name, file in CARS_FILES.items()
        for folder in (devkit, data)
        if (folder / file).is_file()
    }
    split = _choose(data, split, sorted(files))
    from scipy.io import loadmat  # slow to import, and needed for this data set only
    from scipy.io.matlab import MatReadError

    try:
        class_names = loadmat(devkit / "cars_meta.mat", squeeze_me=True)["class_names"]
        classes = [str(name) for name in np.atleast_1d(class_names)]
        rows = np.atleast_1d(loadmat(files[split], squeeze_me=True)["annotations"])
        names, labels = [str(row["fname"]) for row in rows], [int(row["class"]) - 1 for row in rows]
    except (*DAMAGE, NotImplementedError, MatReadError) as error:
        raise UserError(
            f"{files[split]}: not as Stanford Cars is published ({error}); download it and"
            f" {devkit / 'cars_meta.mat'} again"
        ) from None
    root = data / f"cars_{split}"
    return _files(f"{data}, {split}", root if root.is_dir() else data, names, labels, classes)
