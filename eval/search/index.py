"""A corpus as a model sees it, on disk: features, what is known of each picture, and a small copy of it.

    INDEX/manifest.json       which model, by name and by the sha256 of its weights; which data; how many
    INDEX/features.npy        fp16 [n, d], L2-normed; memory-mapped where it is read
    INDEX/metadata.parquet    a row per picture: key, split, group, captions, and the columns that its data came with
    INDEX/thumbnails.bin      a WebP of each picture, one after the other
    INDEX/thumbnails.npy      int64 [n + 1], where each begins, and the end
    INDEX/unreadable.csv      pictures that could not be read, each with its reason

n pictures, numbered from 0 in the order of their data, on any number of ranks.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.errors import UserError
from train.model.clip import Clip, load

FORMAT = 1
OWN_COLUMNS = ("key", "split", "group", "captions")


class Index:
    """An index that `python -m eval embed` wrote.

    Attributes:
        name: of the folder, for people.
        manifest: "model", "model_sha256", "data", "data_sha256", "n", "d" and what eval/indexing.py adds.
        features: fp16 [n, d], L2-normed, memory-mapped.
        group_of: int64 [n]; pictures with one number are variants of one thing.
        columns: names of the columns that came with the data, and "split" where there is more than one.

    Raises:
        UserError: there is none, or it is not whole; what to do is said.
    """

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name
        self.manifest = read_manifest(folder)
        n, d = self.manifest["n"], self.manifest["d"]
        try:
            self.features = np.load(folder / "features.npy", mmap_mode="c" if n else None, allow_pickle=False)
            self._table = pq.read_table(folder / "metadata.parquet", memory_map=True)
            self._thumbnail_at = np.load(folder / "thumbnails.npy", allow_pickle=False)
            stored = (folder / "thumbnails.bin").stat().st_size
        except (OSError, ValueError, EOFError, pa.ArrowException) as error:
            raise UserError(
                f"{folder}: a file of the index cannot be read ({error}); make it again: python -m eval embed"
            ) from None
        sizes = (
            self.features.shape,
            self.features.dtype,
            self._table.num_rows,
            len(self._thumbnail_at),
            stored,
        )
        if sizes != ((n, d), np.float16, n, n + 1, int(self._thumbnail_at[-1])):
            raise UserError(
                f"{folder}: the files of the index do not belong together {sizes}; make it again: python -m"
                " eval embed"
            )

    def __len__(self) -> int:
        return self.manifest["n"]

    @cached_property
    def group_of(self) -> np.ndarray:
        return self._table["group"].to_numpy()

    @property
    def schema(self) -> pa.Schema:
        return self._table.schema

    @cached_property
    def columns(self) -> list[str]:
        splits = ["split"] if len(self._table["split"].unique()) > 1 else []
        return splits + [name for name in self._table.column_names if name not in OWN_COLUMNS]

    @cached_property
    def keys(self) -> list[str]:
        return self._table["key"].to_pylist()

    def rows(self, numbers: Sequence[int]) -> list[dict]:
        """Of each number: "number", "key", "split", "group" (a number), "captions" (a list) and "columns",
        name -> text or None.
        """
        taken = self._table.take(pa.array(numbers, pa.int64())).to_pylist()
        return [
            {"number": int(number), **{name: row.pop(name) for name in OWN_COLUMNS}, "columns": row}
            for number, row in zip(numbers, taken, strict=True)
        ]

    def values(self, column: str) -> pa.ChunkedArray:
        """A column as texts, null where there is none.

        Raises:
            UserError: no such column; those that there are are named.
        """
        if column not in (*self.columns, "split", "key"):
            raise UserError(
                f"{self.name}: no column {column!r}; it has {', '.join(self.columns) or 'none to filter by'}"
            )
        return self._table[column]

    def choices(self, most: int = 50) -> dict[str, list[tuple[str, int]]]:
        """Column -> its values with their counts, the most frequent first; without columns of more than
        `most` values.
        """
        found = {}
        for column in self.columns:
            counts = self._table[column].drop_null().value_counts().to_pylist()
            if 1 < len(counts) <= most:
                found[column] = sorted(
                    ((each["values"], each["counts"]) for each in counts),
                    key=lambda each: (-each[1], each[0]),
                )
        return found

    def thumbnail(self, number: int) -> bytes:
        """A WebP, its longer side at most manifest["thumbnail_px"]."""
        begin, end = self._thumbnail_at[number : number + 2].tolist()
        with open(self.folder / "thumbnails.bin", "rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    def model(self, name: str = "") -> Clip:
        """The model that made the index, in fp32 on the CPU.

        Args:
            name: where it is now; by default where it was then.

        Raises:
            UserError: it is not there, or its weights are other ones.
        """
        clip = load(name or self.manifest["model"])
        if clip.fingerprint() != self.manifest["model_sha256"]:
            raise UserError(
                f"{self.folder}: made by {self.manifest['model']}, weights"
                f" {self.manifest['model_sha256'][:12]}, but {name or 'that'} has {clip.fingerprint()[:12]}"
                " now: their features do not compare. Pass --model with the one it was made by, or make the"
                f" index again: python -m eval embed {name or self.manifest['model']} --data"
                f" {self.manifest['data']} --out {self.folder}"
            )
        return clip

    def same_corpus(self, other: "Index") -> bool:
        """Whether picture for picture both are of the same data, so that models can be shown side by side."""
        return len(self) == len(other) and self._table["key"].equals(other._table["key"])


def read_manifest(folder: Path) -> dict:
    """The manifest of an index.

    Raises:
        UserError: there is none, or none that this version reads.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder}: no index is there; make one with: python -m eval embed MODEL --data SHARDS --out"
            f" {folder}"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{folder / 'manifest.json'}: not readable as JSON ({error}); make the index again: python -m"
            " eval embed"
        ) from None
    if "model_sha256" not in manifest:
        kind = "shards" if "splits" in manifest else "something else"
        raise UserError(
            f"{folder}: holds {kind}, not an index; make one with: python -m eval embed MODEL --data {folder}"
            " --out INDEX"
        )
    if manifest.get("index_format") != FORMAT:
        raise UserError(
            f"{folder}: format {manifest.get('index_format')} of indexes, this version reads {FORMAT}; make"
            " it again"
        )
    return manifest


def not_empty(index: Index) -> Index:
    """The index itself.

    Raises:
        UserError: it holds no picture.
    """
    if not len(index):
        raise UserError(
            f"{index.folder}: holds no picture; make it again of data that has some: python -m eval embed"
        )
    return index
