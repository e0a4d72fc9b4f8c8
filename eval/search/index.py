"""An index on disk: the features of a corpus by one model, metadata and a thumbnail of each image.

    INDEX/manifest.json       the model, by name and by the sha256 of its weights; the data; n
    INDEX/features.npy        fp16 [n, d], L2-normed; memory-mapped by readers
                              of a compressed index int8 [n, dims], see Projection
    INDEX/projection.npy      of a compressed index: fp32 [d, dims]
    INDEX/scales.npy          of a compressed index: fp32 [dims]
    INDEX/metadata.parquet    a row per image: key, path in the source, split, group, captions, and the
                              columns of the data
    INDEX/thumbnails.bin      a WebP of each image, concatenated
    INDEX/thumbnails.npy      int64 [n + 1], the start of each, and the end
    INDEX/unreadable.csv      images that could not be read, with the reasons

Images are numbered from 0 in the order of the data, on any number of ranks.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.below import file_below
from data_prep.errors import UserError
from data_prep.inputs.parquet import read_table
from data_prep.strict_json import load_json
from eval.arrays import map_array

if TYPE_CHECKING:  # torch is imported when a model is opened, so that mistakes do not wait for it
    from train.model.clip import Clip

FORMAT, COMPRESSED = 2, 3  # of what embed and what compress writes
FORMATS = (1, FORMAT, COMPRESSED)  # format 1 has no paths: there, a column "path" is one of the data
# Columns of metadata.parquet beside those of the data, which are texts.
SCHEMA = {
    "key": pa.string(),
    "path": pa.string(),
    "split": pa.string(),
    "group": pa.int64(),
    "captions": pa.list_(pa.string()),
}
OWN_COLUMNS = tuple(SCHEMA)
MAKE = "python -m eval embed MODEL --data SHARDS --out INDEX"
COMPRESS = "python -m eval compress LARGER --out INDEX"
NO_IMAGES, SHOWN_VALUES = "This index holds no images.", 12


class Projection(NamedTuple):
    """What an index is compressed by: normalize(image_features @ matrix) ~ codes * scales.

    Attributes:
        matrix: fp32 [d, dims], with orthonormal columns.
        scales: fp32 [dims], above 0: what a code of 1 is worth.
    """

    matrix: np.ndarray
    scales: np.ndarray


class Index:
    """An index that `python -m eval embed` or `python -m eval compress` wrote.

    Attributes:
        name: Of the folder.
        manifest: "model", "model_sha256", "data", "data_sha256", "n", "d" and more from eval.search.indexing.
        stored: features.npy, memory-mapped: fp16 [n, d], or int8 [n, dims] of a compressed index.
        projection: None if the index is not compressed.
        group_of: int64 [n]; images with the same number are variants of one thing.
        columns: Names of the columns of the data, and "split" if there are several.

    Raises:
        UserError: There is no index, or it is damaged.
    """

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name
        self.manifest = read_manifest(folder)
        n, d = self.manifest["n"], self.manifest["d"]
        try:
            self.stored = map_array(file_below(folder, "features.npy"), "c")
            self.projection = self._read_projection() if self.is_compressed else None
            self._thumbnail_starts = starts = map_array(file_below(folder, "thumbnails.npy"))
            stored = file_below(folder, "thumbnails.bin").stat().st_size
            metadata = file_below(folder, "metadata.parquet")
            rows, schema = pq.read_metadata(metadata).num_rows, pq.read_schema(metadata)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(
                f"{folder}: a file of the index cannot be read ({error}); {self._again}"
            ) from None
        width, dtype = (self.projection.scales.size, np.int8) if self.projection else (d, np.float16)
        ascends = (
            starts.dtype == np.int64 and starts.shape == (n + 1,) and (np.diff(starts, prepend=0) >= 0).all()
        )
        for name, is_valid, must in (
            ("features.npy", is_array(self.stored, (n, width), dtype), f"{dtype.__name__} [{n}, {width}]"),
            ("metadata.parquet", rows == n, f"{n} rows"),
            ("thumbnails.npy", ascends, f"int64 [{n + 1}], ascending"),
            ("thumbnails.bin", ascends and stored == starts[-1], "of the size that thumbnails.npy says"),
        ):
            if not is_valid:
                raise UserError(f"{folder / name}: must be {must}, by manifest.json; {self._again}")
        self._table = self._read_table(metadata, schema)

    def _read_projection(self) -> Projection:
        """Raises:
        ValueError: It is not one of the model's features: another shape, or values that no such one has.
        """
        matrix = map_array(file_below(self.folder, "projection.npy"))
        scales = map_array(file_below(self.folder, "scales.npy"))
        d, dims = self.manifest["d"], scales.size
        if not 1 <= dims <= d or not is_array(scales, (dims,), np.float32):
            raise ValueError(f"scales.npy must be float32 [dimensions], 1 to {d}")
        if not is_array(matrix, (d, dims), np.float32):
            raise ValueError(f"projection.npy must be float32 [{d}, {dims}]")
        # Bounds, which NaN fails as well: no feature overflows.
        if not ((np.abs(matrix) <= 1.001).all() and (scales > 0).all() and (scales <= 1).all()):
            raise ValueError("projection.npy must be within -1 and 1, scales.npy above 0 and at most 1")
        return Projection(np.array(matrix), np.array(scales))

    def _read_table(self, metadata: Path, schema: pa.Schema) -> pa.Table:
        """The metadata, which is read only if there are as many features, and if its columns are of an index:
        a few bytes can be any number of rows.
        """
        own = self._own_columns
        if missing := set(own) - set(schema.names):
            raise UserError(f"{metadata}: has no column {', '.join(sorted(missing))}; {self._again}")
        wrong = [
            field.name
            for field in schema
            if field.type != (SCHEMA[field.name] if field.name in own else pa.string())
        ]
        table = pa.table({})
        if not wrong and len(set(schema.names)) == len(schema.names):
            try:
                table = read_table(metadata)
                table.validate(full=True)
            except (OSError, ValueError, pa.ArrowException) as error:
                raise UserError(
                    f"{self.folder}: a file of the index cannot be read ({error}); {self._again}"
                ) from None
            wrong = [name for name in own if table[name].null_count]
        if wrong or not table.num_columns:
            raise UserError(
                f"{metadata}: its columns {', '.join(wrong) or 'have a name twice'} are not of an index;"
                f" {self._again}"
            )
        return table

    def __len__(self) -> int:
        return self.manifest["n"]

    @property
    def _again(self) -> str:
        return f"make the index again: {COMPRESS if self.is_compressed else MAKE}"

    @property
    def is_compressed(self) -> bool:
        return self.manifest["index_format"] == COMPRESSED

    @cached_property
    def features(self) -> np.ndarray:
        """fp16 [n, d], L2-normed; of a compressed index [n, dims], decoded, L2-normed before int8."""
        if not self.projection:
            return self.stored
        features = np.empty(self.stored.shape, np.float16)
        return np.multiply(self.stored, self.projection.scales, out=features, casting="same_kind")

    def decoded(self, numbers: slice | Sequence[int]) -> np.ndarray:
        """The features of some images, fp32 [m, d or dims], without decoding all."""
        stored = self.stored[numbers].astype(np.float32)
        return stored * self.projection.scales if self.projection else stored

    def as_queries(self, numbers: Sequence[int]) -> np.ndarray:
        """The features of some images, fp32 [m, d], as the model has them: what a search takes."""
        features = self.decoded(numbers)
        return features @ self.projection.matrix.T if self.projection else features

    @cached_property
    def group_of(self) -> np.ndarray:
        groups = self._table["group"].to_numpy()
        if len(groups) and not 0 <= groups.min() <= groups.max() < 16 * len(groups) + (1 << 20):
            return np.unique(groups, return_inverse=True)[1]  # they are counted in an array of that length
        return groups

    @cached_property
    def _own_columns(self) -> tuple[str, ...]:
        return OWN_COLUMNS if self.has_paths else tuple(name for name in OWN_COLUMNS if name != "path")

    @property
    def has_paths(self) -> bool:
        """Whether the index knows the images' paths; those of earlier versions do not."""
        return self.manifest["index_format"] > 1

    @property
    def schema(self) -> pa.Schema:
        return self._table.schema

    @cached_property
    def columns(self) -> list[str]:
        splits = ["split"] if len(self._table["split"].unique()) > 1 else []
        return splits + [name for name in self._table.column_names if name not in self._own_columns]

    @cached_property
    def keys(self) -> list[str]:
        return self._table["key"].to_pylist()

    @cached_property
    def paths(self) -> list[str]:
        """The path of each image in its source; "" where it is not known."""
        return self._table["path"].to_pylist() if self.has_paths else [""] * len(self)

    def rows(self, numbers: Sequence[int]) -> list[dict]:
        """Each image as {"number", "key", "path" (text, "" where it is not known), "split", "group" (int),
        "captions" (list), "columns" (name -> text or None)}.
        """
        rows = self._table.take(pa.array(numbers, pa.int64())).to_pylist()
        own = [{"path": "", **{name: row.pop(name) for name in self._own_columns}} for row in rows]
        return [
            {"number": int(number), **{name: known[name] for name in OWN_COLUMNS}, "columns": row}
            for number, known, row in zip(numbers, own, rows, strict=True)
        ]

    def values(self, column: str) -> pa.ChunkedArray:
        """A column as texts, null where an image has no value.

        Raises:
            UserError: No such column.
        """
        known = dict.fromkeys((*self.columns, "split", "key", *(["path"] if self.has_paths else [])))
        if column not in known:
            columns = ", ".join(known)
            raise UserError(f"{self.name}: no column {column!r}; it can be {columns}")
        return self._table[column]

    def choices(self, limit: int = 50) -> dict[str, list[tuple[str, int]]]:
        """Column -> (value, count), most frequent first; without columns of more than `limit` values."""
        choices = {}
        for column in self.columns:
            counts = self._table[column].drop_null().value_counts().to_pylist()
            if 1 < len(counts) <= limit:
                pairs = [(count["values"], count["counts"]) for count in counts]
                choices[column] = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
        return choices

    def thumbnail(self, number: int) -> bytes:
        """A WebP, its longer side at most manifest["thumbnail_px"]."""
        start, end = self._thumbnail_starts[number : number + 2].tolist()
        with open(file_below(self.folder, "thumbnails.bin"), "rb") as file:
            file.seek(start)
            return file.read(end - start)

    def model(self, name: str = "") -> "Clip":
        """The model that made the index, in fp32 on the CPU, for evaluation.

        Args:
            name: The model, if it has moved since; or another one with the same image tower, bit for bit: a
                text tower that was aligned to the index, or trained with the image tower locked.

        Raises:
            UserError: There is no such model, or its image tower differs.
        """
        from eval.embed import load_for_eval
        from eval.options import INFERENCE
        from train.world import World

        made_by = self.made_by
        clip = load_for_eval(name or made_by, INFERENCE, World())
        if clip.fingerprint() != self.manifest["model_sha256"] and not (name and self._has_tower_of(clip)):
            other = (
                f"Search it with the text tower of {name}: python -m eval align"
                f" {quote(str(self.folder))} {quote(name)} --data SHARDS --out ALIGNED"
                if name
                else "Pass --model"
            )
            raise UserError(
                f"{self.folder}: made by {made_by}, weights {self.manifest['model_sha256'][:12]}, but"
                f" {name or made_by} has {clip.fingerprint()[:12]}: their features do not compare."
                f" {other}; or make the index again: python -m eval embed {quote(name or made_by)} --data"
                f" {quote(self.manifest['data'])} --out {quote(str(self.folder))} --overwrite"
            )
        return clip

    def _has_tower_of(self, clip: "Clip") -> bool:
        """Whether a model has the image tower that made the features, by its weights. An index of an earlier
        version knows the whole model's alone, which is opened then.
        """
        known = self.manifest.get("image_tower_sha256") or self.model().fingerprint("image")
        return clip.fingerprint("image") == known

    @property
    def made_by(self) -> str:
        """The model of the manifest, as a command in any folder opens it."""
        place = self.manifest.get("model_place")
        names = ("relative", "absolute", "before", "after")
        if not isinstance(place, dict) or not all(isinstance(place.get(name), str) for name in names):
            return self.manifest["model"]  # without a path, or of an earlier version
        for path in (os.path.normpath(self.folder.resolve() / place["relative"]), place["absolute"]):
            if "\0" not in path and path != str(self.folder.resolve()) and may_be_model(path):
                return f"{place['before']}{path}{place['after']}"
        return self.manifest["model"]

    def same_corpus(self, other: "Index") -> bool:
        """Whether both hold the same images in the same order, so that models can be shown side by side."""
        return len(self) == len(other) and self._table["key"].equals(other._table["key"])


def may_be_model(path: str) -> bool:
    """Whether this is a file, a folder of a model or a run. Of an index in its run (RUN/index) that was moved
    alone, the relative place is "..", which always exists.
    """
    names = ("open_clip_config.json", "config.json", "checkpoints")
    return os.path.isfile(path) or any(os.path.exists(os.path.join(path, name)) for name in names)


def is_array(array: np.ndarray, shape: tuple[int, ...], dtype: type) -> bool:
    return array.shape == shape and array.dtype == dtype


def read_manifest(folder: Path) -> dict:
    """The manifest of an index.

    Raises:
        UserError: There is none that this version can read.
    """
    try:
        manifest = load_json(file_below(folder, "manifest.json"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder}: no index there; make one: python -m eval embed MODEL --data SHARDS --out"
            f" {quote(str(folder))}"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{folder / 'manifest.json'}: damaged ({error}); make the index again: {MAKE}"
        ) from None
    if not isinstance(manifest, dict) or "model_sha256" not in manifest:
        is_shards = isinstance(manifest, dict) and "splits" in manifest
        content = "shards" if is_shards else "something else"
        raise UserError(
            f"{folder}: holds {content}, not an index; make one: python -m eval embed MODEL --data"
            f" {quote(str(folder))} --out INDEX"
        )
    if manifest.get("index_format") not in FORMATS:
        formats = ", ".join(map(str, FORMATS))
        raise UserError(
            f"{folder}: index format {manifest.get('index_format')}, but this version reads {formats}; make"
            f" the index again: {MAKE}"
        )
    kinds = {"n": int, "d": int, "model": str, "model_sha256": str, "data": str}
    if wrong := [name for name, kind in kinds.items() if type(manifest.get(name)) is not kind]:
        raise UserError(
            f"{folder / 'manifest.json'}: has no valid {', '.join(wrong)}; make the index again: {MAKE}"
        )
    return manifest


def open_index(folder: Path) -> Index:
    """An index that holds images.

    Raises:
        UserError: There is no index, it is damaged, or empty.
    """
    index = Index(folder)
    if not len(index):
        raise UserError(f"{folder}: holds no images; make it again from data that has some: {MAKE}")
    return index


def check_indexes(folders: Sequence[Path], models: Sequence[str] = ()) -> None:
    """What can be said before the indexes are opened.

    Raises:
        UserError: A folder holds no index, none is given, or there are not as many models.
    """
    if not folders:
        raise UserError("no INDEX given; make one: python -m eval embed MODEL --data SHARDS --out INDEX")
    if models and len(models) != len(folders):
        raise UserError(
            f"--model: {len(models)} models for {len(folders)} indexes; pass one for each, in their order"
        )
    for folder in folders:
        read_manifest(folder)


def open_indexes(folders: Sequence[Path], models: Sequence[str] = ()) -> list[Index]:
    """Indexes of one corpus.

    Raises:
        UserError: There is no index, one is of another corpus, or there are not as many models.
    """
    check_indexes(folders, models)
    indexes = [Index(folder) for folder in folders]
    for index in indexes[1:]:
        if not index.same_corpus(indexes[0]):
            raise UserError(
                f"{index.folder}: holds other images than {indexes[0].folder} ({len(index)} and"
                f" {len(indexes[0])}), so their results cannot be shown side by side; embed the same --data"
                " with both models, or serve each index on its own --port"
            )
    return indexes


def filter_rows(index: Index, filters: Sequence[str]) -> np.ndarray | None:
    """bool [n], the images that match all of "column=value"; None without filters.

    Raises:
        UserError: No such column, or no image matches all filters.
    """
    rows = np.ones(len(index), bool)
    for condition in filters:
        column, equals, value = condition.partition("=")
        if not equals:
            raise UserError(
                f"filter {condition!r}: must be COLUMN=VALUE; the columns are"
                f" {', '.join(index.columns) or 'none'}"
            )
        rows &= pc.fill_null(pc.equal(index.values(column), value), False).to_numpy()
        if not rows.any():
            values = [name for name, _ in index.choices().get(column, [])]
            more = f" and {len(values) - SHOWN_VALUES} more" if len(values) > SHOWN_VALUES else ""
            listed = f"; {column} can be {', '.join(values[:SHOWN_VALUES])}{more}" if values else ""
            raise UserError(f"filter {condition!r}: no image of {index.name} matches{listed}")
    return rows if filters else None
