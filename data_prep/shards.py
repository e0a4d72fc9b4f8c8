"""Shards: deterministic WebDataset tars, an index beside each, and any one sample by its number.

    SHARDS/manifest.json                 splits -> counts, and per shard: samples, bytes, sha256
    SHARDS/train/train-000000.tar        KEY.png or KEY.jpg, KEY.json, KEY.txt; members of a key are adjacent
    SHARDS/train/train-000000.index.tsv  key, group number, and where in the tar each member's bytes stand

KEY.txt is the first caption, for readers that know one; KEY.json holds all of them. A sample is found by its
number in the split, counted over its shards in order: no tar is ever scanned to read from it.
"""

import csv
import hashlib
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import webdataset

from data_prep.atomic import atomic_file
from data_prep.errors import UserError
from data_prep.progress import progress

FORMAT = 1
INDEX_COLUMNS = ["key", "group", "image_offset", "image_size", "json_offset", "json_size", "txt_offset", "txt_size"]


@dataclass(frozen=True)
class Sample:
    key: str
    image: bytes  # an encoded PNG or JPEG
    captions: list[str]
    meta: dict  # KEY.json as it stands in the tar


def write_shard(path: Path, samples: list[Sample], groups: list[int], extensions: list[str]) -> dict:
    """Write one tar and its index; the same samples give the same bytes on any day by any user.

    Returns:
        The shard's entry in the manifest: file, samples, bytes, sha256, index_sha256.
    """
    with atomic_file(path) as partial:
        with open(partial, "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
            for sample, extension in zip(samples, extensions, strict=True):
                tar.write(
                    {
                        "__key__": sample.key,
                        extension: sample.image,
                        "json": json.dumps(sample.meta, sort_keys=True, ensure_ascii=False).encode(),
                        "txt": sample.captions[0].encode(),
                    }
                )
        rows = _index(partial, {sample.key: group for sample, group in zip(samples, groups, strict=True)})
    index = path.with_suffix(".index.tsv")
    with atomic_file(index) as partial, open(partial, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(INDEX_COLUMNS)
        writer.writerows(rows)
    return {
        "file": f"{path.parent.name}/{path.name}",
        "samples": len(samples),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "index_sha256": sha256_of(index),
    }


def _index(tar: Path, groups: dict[str, int]) -> list[list]:
    """One row of INDEX_COLUMNS per sample, read back from the tar's own headers."""
    places: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            key, _, extension = member.name.partition(".")
            kind = extension if extension in ("json", "txt") else "image"
            places.setdefault(key, {})[kind] = (member.offset_data, member.size)
    assert places.keys() == groups.keys(), (len(places), len(groups))
    return [[key, groups[key], *place["image"], *place["json"], *place["txt"]] for key, place in places.items()]


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class Shards:
    """The samples of one split, by number. Cheap to hand to worker processes: files are opened where they are read.

    Attributes:
        groups: int64 [n], the group number of each sample.
        shard_sizes: int64 [shards], samples in each shard, in the order in which samples are numbered.
        fingerprint: sha256 that stands for the content of all splits, wherever the folder lies.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(self.folder)
        if not self.manifest["splits"].get(split, {}).get("samples"):
            having = ", ".join(f"{name} ({entry['samples']})" for name, entry in self.manifest["splits"].items())
            raise UserError(f"{folder}: no samples in split {split!r}; it has {having}")
        self.entries = self.manifest["splits"][split]["shards"]
        self.fingerprint = hashlib.sha256(json.dumps(self.manifest["splits"], sort_keys=True).encode()).hexdigest()
        self.shard_sizes = np.array([entry["samples"] for entry in self.entries])
        tables = [_read_index(self.folder / entry["file"], entry) for entry in self.entries]
        index = pd.concat(tables, ignore_index=True)
        self._ends = np.cumsum(self.shard_sizes)
        self._keys = index["key"].to_numpy(dtype="U")
        self.groups = index["group"].to_numpy()
        self._places = index[INDEX_COLUMNS[2:6]].to_numpy()
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}

    def key(self, number: int) -> str:
        return str(self._keys[number])

    def read(self, number: int) -> Sample:
        """Sample `number`: its image and captions."""
        image_offset, image_size, json_offset, json_size = self._places[number].tolist()
        shard = int(np.searchsorted(self._ends, number, side="right"))
        meta = json.loads(self._bytes(shard, json_offset, json_size))
        return Sample(self.key(number), self._bytes(shard, image_offset, image_size), meta["captions"], meta)

    def captions(self, number: int) -> list[str]:
        """The captions of sample `number`, without reading its image."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return json.loads(self._bytes(shard, *self._places[number, 2:].tolist()))["captions"]

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        if shard not in self._files:
            if len(self._files) >= 64:  # far below any limit on open files
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.folder / self.entries[shard]["file"], os.O_RDONLY)
        data = os.pread(self._files[shard], size, offset)
        if len(data) != size:
            raise UserError(f"{self.folder / self.entries[shard]['file']}: ends before byte {offset + size}; build the shards again")
        return data

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Hash every `parts`-th shard and index, from `part` on, against the manifest.

        Raises:
            UserError: a shard is missing or is not what was built; it is named.
        """
        entries = self.entries[part::parts]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing and reading release the GIL
            checked = pool.map(self._verify_one, entries)
            for _ in progress(checked, total=len(entries), desc=f"verify {self.split}", unit="shard", delay=2, disable=part != 0):
                pass

    def _verify_one(self, entry: dict) -> None:
        path = self.folder / entry["file"]
        for file, expected in ((path, entry["sha256"]), (path.with_suffix(".index.tsv"), entry["index_sha256"])):
            if sha256_of(file) != expected:
                raise UserError(
                    f"{file}: altered since it was built (its sha256 is not the one in {self.folder / 'manifest.json'}); "
                    "build the shards again, or restore the file"
                )


def read_manifest(folder: Path) -> dict:
    """The manifest of a folder that `python -m data_prep build` made."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no manifest.json, so not a folder of shards; make one with: python -m data_prep build") from None
    except ValueError as error:
        raise UserError(f"{folder / 'manifest.json'}: not readable as JSON ({error}); build the shards again") from None
    if manifest.get("format") != FORMAT:
        raise UserError(f"{folder}: format {manifest.get('format')} of shards, this version reads {FORMAT}; build the shards again")
    return manifest


def _read_index(tar: Path, entry: dict) -> pd.DataFrame:
    path = tar.with_suffix(".index.tsv")
    if not tar.is_file() or not path.is_file():
        raise UserError(f"{tar if path.is_file() else path}: missing, but listed in the manifest; restore it or build the shards again")
    types = {"key": str} | dict.fromkeys(INDEX_COLUMNS[1:], np.int64)
    try:
        table = pd.read_csv(path, sep="\t", dtype=types, keep_default_na=False, quoting=csv.QUOTE_NONE)
    except (ValueError, UnicodeError) as error:
        raise UserError(f"{path}: not readable ({error}); build the shards again") from None
    if list(table.columns) != INDEX_COLUMNS or len(table) != entry["samples"]:
        raise UserError(f"{path}: {len(table)} rows where the manifest has {entry['samples']}; build the shards again")
    return table
