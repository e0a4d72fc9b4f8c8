"""Pictures with labels, from wherever they are kept.

    FOLDER/[SPLIT/]CLASS/picture.jpg        a folder per class; imagenette's ten folders get their names
    labels.csv, .tsv                        columns image (relative to the file's folder, and not out of it) and label
    [SPLIT-...].parquet, or a folder of it  as image data sets on the hub are stored, class names in the
    schema
    SHARDS                                  ours, where the label is a column that the build had no other use for
    FOLDER/cars_train_annos.mat and others  Stanford Cars (Krause et al. 2013), as it is published

What cannot be used is listed with its reason: labelled + unlabelled = all.
"""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_prep.build.scan import Source, read_local
from data_prep.errors import UserError
from data_prep.images import DAMAGE, BadImage
from data_prep.inputs.sources import IMAGE_EXTENSIONS
from data_prep.progress import progress
from data_prep.shards import Shards, read_manifest

SPLITS = ("train", "val", "valid", "validation", "test")
IMAGENETTE = {  # WordNet's numbers of the ten classes of github.com/fastai/imagenette
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


@dataclass(frozen=True)
class Labelled:
    """Pictures with labels.

    Attributes:
        place: where they are from, for people.
        classes: names of the classes, by label.
        labels: int64 [n], from 0.
        names: of each picture, to find it again.
        read: the bytes of a picture by its number, or why they cannot be had.
        unlabelled: (name, reason) of the pictures without a label.
        groups: int64 [n], pictures that stand or fall together; each its own, but for shards.
    """

    place: str
    classes: list[str]
    labels: np.ndarray
    names: list[str]
    read: Callable[[int], bytes | BadImage]
    unlabelled: list[tuple[str, str]]
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def sha256(self) -> str:
        """Of classes, labels and the pictures' bytes, in order: the same for the same pictures in any format."""
        sha = hashlib.sha256(json.dumps([self.classes, self.labels.tolist()]).encode())
        for number in progress(
            range(len(self)), desc="hashing pictures", unit="picture", leave=False, delay=1
        ):
            data = self.read(number)
            sha.update(hashlib.sha256(b"" if isinstance(data, BadImage) else data).digest())
        return sha.hexdigest()


def read_labelled(
    data: Path,
    split: str = "",
    image_column: str = "image",
    label_column: str = "label",
    images: str = "",
) -> Labelled:
    """The pictures with labels at `data`; its kind is told by what lies there.

    Args:
        data: a folder or file of one of the kinds above.
        split: which one, where there are several.
        image_column, label_column: of a CSV or Parquet; of shards, label_column.
        images: of a CSV, the folder that its paths are relative to; by default the folder of the CSV.

    Raises:
        UserError: no such data, split or column; nothing in it has a label.
    """
    if data.is_file():
        if split:
            raise UserError(f"{data}: a file is one split, but --split {split!r} was given; leave that out")
        if data.suffix == ".parquet":
            return _parquet(str(data), [data], image_column, label_column)
        return _csv(data, image_column, label_column, Path(images) if images else data.parent)
    if not data.is_dir():
        raise UserError(
            f"{data}: no such file or folder; a folder per class, a CSV, a Parquet file or shards are wanted"
        )
    if (data / "manifest.json").is_file():
        having = [name for name, entry in read_manifest(data)["splits"].items() if entry["samples"]]
        return _shards(data, _choose(data, split, having), label_column)
    for folder in (data, data / "devkit"):
        if (folder / "cars_meta.mat").is_file():
            return _cars(data, folder, split)
    if files := sorted(data.glob("*.parquet")) or sorted(data.glob("data/*.parquet")):
        chosen = _choose(
            data, split, sorted({file.name.split("-")[0].removesuffix(".parquet") for file in files})
        )
        files = [file for file in files if file.name.split("-")[0].removesuffix(".parquet") == chosen]
        return _parquet(f"{data}, {chosen}", files, image_column, label_column)
    if having := [name for name in SPLITS if (data / name).is_dir()]:
        data = data / _choose(data, split, having)
    elif split:
        raise UserError(
            f"{data}: has no splits, but --split {split!r} was given; leave that out, or add a folder {split}"
        )
    return _folders(data)


def _choose(data: Path, split: str, having: list[str]) -> str:
    if split in having:
        return split
    if not split and len(having) == 1:
        return having[0]
    raise UserError(
        f"{data}: {f'no split {split!r}' if split else 'several splits'}; pass --split with one of"
        f" {', '.join(having)}"
    )


def _labelled(
    place: str,
    labels: Iterable,
    names: list[str],
    reader: Callable,
    classes: list[str] | None = None,
    groups: np.ndarray | None = None,
) -> Labelled:
    """`labels` are numbers where `classes` is given, else texts; `reader` is made of the positions of what
    has a label.
    """
    labels, numbered = list(labels), classes is not None
    if classes is None:
        texts = ["" if label is None else str(label) for label in labels]
        found = set(texts) - {""}
        classes = sorted(found, key=int if all(text.isdecimal() for text in found) else str)
        numbers = {text: number for number, text in enumerate(classes)}
        labels = [numbers.get(text, -1) for text in texts]
    labels = np.array([-1 if label is None else label for label in labels], np.int64)
    good = (labels >= 0) & (labels < len(classes))
    keep = np.flatnonzero(good)
    unlabelled = [
        (names[at], f"label {labels[at]} of {len(classes)}" if numbered else "no label")
        for at in np.flatnonzero(~good)
    ]
    if not len(keep):
        raise UserError(
            f"{place}: no picture with a label among {len(labels)}; pictures with labels are wanted"
        )
    groups = np.arange(len(labels)) if groups is None else groups
    return Labelled(
        place, classes, labels[keep], [names[at] for at in keep], reader(keep), unlabelled, groups[keep]
    )


class _Files:
    """Pictures in files below a root, which no name and no symbolic link leads out of."""

    def __init__(self, root: Path, names: list[str]):
        self.root, self.names = str(root), names

    def __call__(self, number: int) -> bytes | BadImage:
        name = self.names[number]
        if not name or "\0" in name:
            return BadImage("no image path")
        return read_local(Source(self.root, name))


def _folders(folder: Path) -> Labelled:
    classes = sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")
    )
    if not classes:
        raise UserError(f"{folder}: no folders in it; one folder of pictures per class is wanted")
    names, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS)
        names += [str(path.relative_to(folder)) for path in found]
        labels += [label] * len(found)
    titles = [IMAGENETTE.get(name, name) for name in classes]
    return _labelled(
        str(folder), labels, names, lambda keep: _Files(folder, [names[at] for at in keep]), titles
    )


def _csv(path: Path, image_column: str, label_column: str, root: Path) -> Labelled:
    images, labels = [], []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            _check_columns(path, list(reader.fieldnames or []), image_column, label_column)
            for row in reader:
                images.append((row[image_column] or "").strip())
                labels.append((row[label_column] or "").strip())
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(
            f"{path}: cannot be read as a CSV in UTF-8 ({error}); write it as one, or pass another --data"
        ) from None
    return _labelled(str(path), labels, images, lambda keep: _Files(root, [images[at] for at in keep]))


def _check_columns(path: Path, having: list[str], *wanted: str) -> None:
    if missing := [name for name in wanted if name not in having]:
        raise UserError(
            f"{path}: no column {', '.join(map(repr, missing))}; it has"
            f" {', '.join(map(repr, having)) or 'none'}: pass --image-column and --label-column"
        )


class _Rows:
    """Pictures in Parquet files, by row; one row group is held at a time."""

    def __init__(
        self,
        files: list[Path],
        column: str,
        rows: np.ndarray,
        groups: list[tuple[int, int]],
        ends: np.ndarray,
    ):
        self.files, self.column, self.rows, self.groups, self.ends = files, column, rows, groups, ends
        self._held: tuple = (None, None)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_held": (None, None)}

    def __call__(self, number: int) -> bytes | BadImage:
        from pyarrow import ArrowException, parquet

        at = int(np.searchsorted(self.ends, self.rows[number], side="right"))
        if self._held[0] != at:
            file, group = self.groups[at]
            try:
                self._held = (
                    at,
                    parquet.ParquetFile(self.files[file])
                    .read_row_group(group, columns=[self.column])
                    .column(0),
                )
            except (OSError, ArrowException) as error:
                return BadImage("unreadable file", f"{self.files[file]}: {error}")
        column = self._held[1]
        cell = column[int(self.rows[number] - self.ends[at] + len(column))].as_py()
        if isinstance(cell, dict):  # {bytes, path}: one of the two
            data, name = cell.get("bytes"), cell.get("path")
            if data is None and name:
                return _Files(self.files[self.groups[at][0]].parent, [name])(0)
            cell = data
        return cell if isinstance(cell, bytes) else BadImage("no image", "neither bytes nor a path")


def _parquet(place: str, files: list[Path], image_column: str, label_column: str) -> Labelled:
    import pyarrow  # here, because the other kinds do without
    from pyarrow import parquet

    labels, groups, sizes, classes, first = [], [], [], None, True
    try:
        for number, path in enumerate(files):
            file = parquet.ParquetFile(path)
            _check_columns(path, file.schema_arrow.names, image_column, label_column)
            named = _class_names(file.schema_arrow.metadata, label_column)
            if not first and named != classes:
                raise UserError(
                    f"{path}: names other classes than {files[0]} does; parts of one data set are wanted"
                )
            classes, first = named, False
            labels += file.read(columns=[label_column]).column(0).to_pylist()
            groups += [(number, group) for group in range(file.num_row_groups)]
            sizes += [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{place}: cannot be read as Parquet ({error}); pass another --data, or fetch it again"
        ) from None
    names, ends = [f"row {row}" for row in range(1, len(labels) + 1)], np.cumsum(sizes)
    return _labelled(
        place, labels, names, lambda keep: _Rows(files, image_column, keep, groups, ends), classes
    )


def _class_names(metadata: dict | None, column: str) -> list[str] | None:
    """Names of a ClassLabel, which the hub's library `datasets` writes as JSON into the schema; None where
    there are none.
    """
    try:
        said = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        feature = said.get("info", said)["features"][column]
        return list(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else None
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


class _Samples:
    def __init__(self, shards: Shards, numbers: np.ndarray):
        self.shards, self.numbers = shards, numbers

    def __call__(self, number: int) -> bytes:
        return self.shards.read(int(self.numbers[number])).image


def _shards(folder: Path, split: str, label_column: str) -> Labelled:
    shards = Shards(folder, split)
    shards.verify()
    columns = [shards.meta(number).get("columns", {}) for number in range(len(shards))]
    if not any(label_column in row for row in columns):
        having = ", ".join(sorted({name for row in columns for name in row})) or "none"
        raise UserError(
            f"{folder}: no column {label_column!r} was kept in its samples; it has {having}: pass"
            " --label-column"
        )
    names = [shards.key(number) for number in range(len(shards))]
    labels = [row.get(label_column) for row in columns]
    return _labelled(
        f"{folder}, {split}", labels, names, lambda keep: _Samples(shards, keep), groups=shards.groups
    )


def _cars(data: Path, kit: Path, split: str) -> Labelled:
    """Stanford Cars: 1-based classes, and file names relative to the folder cars_SPLIT, or to `data`."""
    known = {"train": "cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    places = {
        name: folder / file
        for name, file in known.items()
        for folder in (kit, data)
        if (folder / file).is_file()
    }
    split = _choose(data, split, sorted(places))
    from scipy.io import loadmat  # here, because the other kinds do without
    from scipy.io.matlab import MatReadError

    try:
        classes = [
            str(name)
            for name in np.atleast_1d(loadmat(kit / "cars_meta.mat", squeeze_me=True)["class_names"])
        ]
        rows = np.atleast_1d(loadmat(places[split], squeeze_me=True)["annotations"])
        names, labels = [str(row["fname"]) for row in rows], [int(row["class"]) - 1 for row in rows]
    except (*DAMAGE, NotImplementedError, MatReadError) as error:
        raise UserError(
            f"{places[split]}: not as Stanford Cars is published ({error}); fetch it and"
            f" {kit / 'cars_meta.mat'} again"
        ) from None
    root = data / f"cars_{split}"
    root = root if root.is_dir() else data
    return _labelled(
        f"{data}, {split}", labels, names, lambda keep: _Files(root, [names[at] for at in keep]), classes
    )
