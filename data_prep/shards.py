"""Shards: deterministic WebDataset tars, an index beside each, and random access to any sample by its number.

    SHARDS/manifest.json                 splits -> counts, and per shard: samples, bytes, sha256
    SHARDS/train/train-000000.tar        KEY.png or KEY.jpg, KEY.json, KEY.txt; members of a key are adjacent
    SHARDS/train/train-000000.index.tsv  key, group, offset and size of each member in the tar, hash

KEY.txt is the first caption, for readers that expect one; KEY.json has all captions and, where the input has
them, the weight of each. Samples are numbered within a split, over its shards in order, so that reading one
never scans a tar.
"""

import copy
import hashlib
import json
import math
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import numpy as np
import xxhash

from data_prep.atomic import MANGLED_URL, atomic_file
from data_prep.below import file_below, regular
from data_prep.errors import UserError
from data_prep.images import WHITE, BadImage, hex_color
from data_prep.progress import progress
from data_prep.shard_index import key_text, read_indexes, sample_hash, write_index
from data_prep.store.cache import CachedFile, cached_file, is_only_node, whole_files
from data_prep.store.remote import Short, file_at, is_url, place_of, store_of
from data_prep.strict_json import MAX_BYTES, load_json, parse_json, problem_of, read_bytes

FORMAT = 2
_TAR_FIELDS = struct.Struct("100s8s8s8s12s12s8s1s100s8s247x")
_REST_OF_SUM = sum(b"00004440000000000000000000000000        0ustar\x0000")  # all but name and size
as_json = json.JSONEncoder(ensure_ascii=False, sort_keys=True, allow_nan=False).encode


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _is_weight(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max


# What every reader of a manifest and of KEY.json needs; other keys may be missing.
MANIFEST = {
    "splits": {
        str: {
            "samples": _is_count,
            "weights?": [_is_weight],
            "shards": [
                {
                    "samples": _is_count,
                    "bytes": _is_count,
                    **dict.fromkeys(("file", "index", "sha256", "index_sha256"), str),
                    **dict.fromkeys(("json?", "json_sha256?", "version?"), str),
                }
            ],
        }
    },
    "check?": {"max_pixels?": _is_count, "background?": str, "skip_decode?": bool},
    "read?": {"images?": str},
    "inputs?": {str: (str, type(None))},
}
META = {"captions": _is_texts, "image?": str, "sha256?": str, "columns?": dict, "weights?": [_is_weight]}


@dataclass(frozen=True)
class Sample:
    key: str
    image: bytes  # an encoded PNG or JPEG
    captions: list[str]
    meta: dict  # KEY.json

    @property
    def weights(self) -> list[float]:
        """The weight of each caption with this image, in the training loss."""
        return self.meta.get("weights") or [1.0] * len(self.captions)

    @property
    def path(self) -> str:
        """The image's path in its source, relative to the folder or URL of images; "" if it is not known."""
        return self.meta.get("image", "")


class Member(NamedTuple):
    """A sample to write."""

    key: str
    image: bytes
    extension: str
    captions: list[str]
    meta: dict
    group: int


def write_shard(path: Path, members: Iterable[Member]) -> dict:
    """Write one tar and its index. The bytes depend on the members only, not on date or user.

    Returns:
        The shard's entry for the manifest.
    """
    rows, sha256, end = [], hashlib.sha256(), 0
    with atomic_file(path) as partial, open(partial, "wb") as file:
        for member in members:
            meta = as_json(member.meta).encode()
            row = [member.key, member.group]
            for extension, data in (
                (member.extension, member.image),
                ("json", meta),
                ("txt", member.captions[0].encode()),
            ):
                row += [end + 512, len(data)]
                block = b"".join(
                    (_tar_header(f"{member.key}.{extension}", len(data)), data, bytes(-len(data) % 512))
                )
                file.write(block)
                sha256.update(block)
                end += len(block)
            rows.append([*row, sample_hash(xxhash.xxh3_128_digest(member.image), meta)])
        file.write(bytes(1024))
        sha256.update(bytes(1024))
    index = path.with_suffix(".index.tsv")
    write_index(index, rows)
    return _entry(path, index, len(rows), sha256.hexdigest())


def shard_entry(path: Path) -> dict:
    """The manifest's entry of a shard that exists already."""
    index = path.with_suffix(".index.tsv")
    with open(index, "rb") as file:
        samples = sum(1 for _ in file) - 1
    return _entry(path, index, samples, sha256_of(path))


def _entry(path: Path, index: Path, samples: int, sha256: str) -> dict:
    return {
        "file": f"{path.parent.name}/{path.name}",
        "index": f"{path.parent.name}/{index.name}",
        "samples": samples,
        "bytes": path.stat().st_size,
        "sha256": sha256,
        "index_sha256": sha256_of(index),
    }


def _tar_header(name: str, size: int) -> bytes:
    """The header block of a plain file (POSIX.1-1988, ustar): mode 444, owner 0, time 0.

    Our own because tarfile takes 13 us per header and this 0.6, at three headers per image, and webdataset's
    writer imports torch. Tests read the result with both, and with GNU tar.
    """
    assert len(name) <= 100, name
    assert size < 8**11, size
    name_bytes, octal = name.encode(), b"%011o" % size
    checksum = b"%06o\0 " % (_REST_OF_SUM + sum(name_bytes) + sum(octal))
    return _TAR_FIELDS.pack(
        name_bytes,
        b"0000444",
        b"0000000",
        b"0000000",
        octal,
        b"00000000000",
        checksum,
        b"0",
        b"",
        b"ustar\x0000",
    )


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class Shards:
    """The samples of one split, by number. Cheap to pickle for worker processes: each opens its own files.

    Args:
        folder: that build or index wrote; or its URL, as s3://bucket/shards, of which shards are read through
            data_prep.store.cache.

    Attributes:
        groups: int64 [n], the group number of each sample.
        shard_sizes: int64 [shards], samples in each shard, in the order in which samples are numbered.
        fingerprint: sha256 of the content of all splits; it does not depend on the folder's path.
        weight_range: the smallest and the largest weight of a caption.

    Raises:
        UserError: no such split, or a file is missing or damaged.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = place_of(folder), split
        self.manifest = read_manifest(self.folder)
        found = self.manifest["splits"].get(split, {})
        if not found.get("samples") or not sum(entry["samples"] for entry in found["shards"]):
            sizes = [f"{name} ({entry['samples']})" for name, entry in self.manifest["splits"].items()]
            raise UserError(f"{folder}: no samples in split {split!r}; it has {', '.join(sizes)}")
        self.entries = found["shards"]
        weights = found.get("weights") or [1.0]
        self.weight_range = min(weights), max(weights)
        self.fingerprint = hashlib.sha256(
            json.dumps(self.manifest["splits"], sort_keys=True).encode()
        ).hexdigest()
        self.shard_sizes = np.array([entry["samples"] for entry in self.entries])
        bring(self.folder, self.entries)
        self._tars = [existing_tar(self.folder, entry) for entry in self.entries]
        self._jsons = [json_file(self.folder, entry) for entry in self.entries]
        indexes = [(shard_file(self.folder, entry, "index"), entry) for entry in self.entries]
        self._keys, self.groups, self._offsets, self._hashes = read_indexes(indexes)
        self._ends = np.cumsum(self.shard_sizes)
        # Of older builds, whose samples have no hash; of all samples, whichever are chosen. Not of a URL, for
        # every byte would be fetched twice.
        of_shards = zip(self.entries, self._tars, np.split(self._hashes, self._ends[:-1]), strict=True)
        self._unhashed = [
            entry for entry, tar, hashes in of_shards if isinstance(tar, Path) and not hashes.all()
        ]
        self._files: dict[Path, int] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def only(self, chosen: np.ndarray) -> "Shards":
        """The chosen samples of this split, numbered anew; nothing is copied.

        Args:
            chosen: bool [n].
        """
        part = copy.copy(self)
        part.shard_sizes = np.array([each.sum() for each in np.split(chosen, self._ends[:-1])])
        part._ends = np.cumsum(part.shard_sizes)
        part._keys, part.groups = self._keys[chosen], self.groups[chosen]
        part._offsets, part._hashes, part._files = self._offsets[chosen], self._hashes[chosen], {}
        return part

    @property
    def background(self) -> str:
        """`#rrggbb`, on which transparent images were composited."""
        return hex_color(self.manifest.get("check", {}).get("background", WHITE))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}

    def key(self, number: int) -> str:
        return key_text(int(self._keys[number]))

    def locate(self, number: int) -> tuple["Shards", int]:
        """As Joined has it."""
        return self, number

    def located(self, numbers: np.ndarray) -> Iterator[tuple["Shards", np.ndarray, np.ndarray]]:
        """As Joined has it."""
        yield self, np.arange(len(numbers)), numbers

    def read(self, number: int) -> Sample:
        """Sample `number`: its image and captions.

        Raises:
            Damaged: it is not what was built, or its file is too short.
            UserError: it was built with a .json that no reader takes.
        """
        shard = int(np.searchsorted(self._ends, number, side="right"))
        try:
            data, image = self._whole(number, shard)
        except Damaged as error:
            raise Damaged(error.file, error.found, self.key(number)) from None
        meta = parse_meta(data, self._jsons[shard], self.key(number))
        return Sample(self.key(number), image, meta["captions"], meta)

    def _whole(self, number: int, shard: int) -> tuple[bytes, bytes]:
        """KEY.json and the image of a sample, with the hash that they had when they were built.

        Raises:
            Damaged: they have another, or a file is too short.
        """
        image_offset, image_size, json_offset, json_size = self._offsets[number].tolist()
        expected, tar = int(self._hashes[number]), self._tars[shard]
        for is_last in (not isinstance(tar, CachedFile), True):
            data = self._bytes(self._jsons[shard], json_offset, json_size, number)
            image = self._bytes(tar, image_offset, image_size, number)
            if not expected or sample_hash(xxhash.xxh3_128_digest(image), data) == expected:
                return data, image
            if is_last:
                break
            for offset, size in self.pieces(np.array([number])).tolist():
                tar.forget(offset, size)  # the damage may be in the cache alone
        raise Damaged(tar, "altered since it was built (its hash differs from the index's)")

    @contextmanager
    def naming(self, number: int) -> Iterator[None]:
        """Turn a BadImage into a UserError that names sample `number`."""
        try:
            yield
        except BadImage as bad:
            path = self.meta(number).get("image", "")
            again = "build the shards again without --skip-decode"
            if self.manifest.get("check", {}).get("unread"):
                again = "index the tars again with --full-check"
            compare = f" (python -m data_prep verify {quote(str(self.folder))} says whether they are altered)"
            compare = "" if self._hashes[number] else compare
            raise UserError(
                f"{self.folder}, {self.split}: sample {self.key(number)} ({path or 'no path'}): {bad};"
                f" {again}, which leaves such images out, or drop it by a decision{compare}"
            ) from None

    def meta(self, number: int) -> dict:
        """KEY.json of sample `number`, without reading its image."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        data = self._bytes(self._jsons[shard], *self._offsets[number, 2:].tolist(), number)
        return parse_meta(data, self._jsons[shard], self.key(number))

    def captions(self, number: int) -> list[str]:
        """The captions of sample `number`, without reading its image."""
        return self.meta(number)["captions"]

    def remote_files(self) -> list[CachedFile | None]:
        """The tar of each shard, None where it is on this machine."""
        return [tar if isinstance(tar, CachedFile) else None for tar in self._tars]

    def shards_of(self, numbers: np.ndarray) -> np.ndarray:
        """The number of the shard that holds each sample: int64 [n]."""
        return np.searchsorted(self._ends, numbers, side="right")

    def pieces(self, numbers: np.ndarray) -> np.ndarray:
        """Where samples of one shard are in its tar: int64 [n, 2], offset and size."""
        image_offsets, image_sizes, json_offsets, json_sizes = self._offsets[numbers].T
        if "json" in self.entries[int(self.shards_of(numbers[:1])[0])]:
            return np.stack([image_offsets, image_sizes], axis=1)
        starts = np.minimum(image_offsets, json_offsets)
        ends = np.maximum(image_offsets + image_sizes, json_offsets + json_sizes)
        return np.stack([starts, ends - starts], axis=1)

    def _around(self, number: int) -> np.ndarray:
        """What is fetched with a sample that is not here: all of its shard, or where other nodes read parts
        of it, the sample.
        """
        if not is_only_node():
            return self.pieces(np.array([number]))
        shard = int(self.shards_of(np.array([number]))[0])
        return self.pieces(np.arange(self._ends[shard] - self.shard_sizes[shard], self._ends[shard]))

    def _bytes(self, file: Path | CachedFile, offset: int, size: int, number: int) -> bytes:
        """A piece of a file, of sample `number`; files stay open between reads."""
        if isinstance(file, CachedFile):
            try:
                return file.read(offset, size, lambda: self._around(number))
            except Short as error:
                raise Damaged(file, error.found) from None
        if file not in self._files:
            if len(self._files) >= 64:  # far below the usual limit on open files
                os.close(self._files.pop(next(iter(self._files))))
            self._files[file] = os.open(file, os.O_RDONLY)
        return read_piece(self._files[file], file, offset, size)

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare the sha256 of shards whose samples have no hash for read() to check, as those of older
        builds, with the manifest: every `parts`-th of them, starting at `part`.

        Raises:
            UserError: names a shard that is missing or altered.
        """
        entries = self._unhashed[part::parts]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing and reading release the GIL
            checked = pool.map(self._verify_one, entries)
            for _ in progress(
                checked,
                total=len(entries),
                desc=f"verify {self.split}",
                unit="shard",
                delay=2,
                disable=part != 0,
            ):
                pass

    def _verify_one(self, entry: dict) -> None:
        for problem in altered(self.folder, entry):
            raise UserError(problem)


class Joined:
    """The samples of several splits or folders under one numbering: those of the first, then the next."""

    def __init__(self, parts: list[Shards]):
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, number: int) -> tuple[Shards, int]:
        """The part that a sample is in, and its number there."""
        part = int(np.searchsorted(self.ends, number, side="right"))
        return self.parts[part], number - int(self.ends[part]) + len(self.parts[part])

    def located(self, numbers: np.ndarray) -> Iterator[tuple[Shards, np.ndarray, np.ndarray]]:
        """Each part that has some of the samples, which of `numbers` these are, and their numbers there.

        Args:
            numbers: int64 [n].
        """
        of_part = np.searchsorted(self.ends, numbers, side="right")
        for part in np.unique(of_part).tolist():
            here = np.flatnonzero(of_part == part)
            yield self.parts[part], here, numbers[here] - int(self.ends[part]) + len(self.parts[part])


def read_piece(opened: int, file: Path, offset: int, size: int) -> bytes:
    """A piece of an open file, as an index has it.

    Raises:
        Damaged: the file does not have so many bytes, and no memory was taken for them.
    """
    data = os.pread(opened, size, offset) if size <= os.fstat(opened).st_size - offset else b""
    if len(data) != size:
        raise Damaged(file, f"ends before byte {offset + size}")
    return data


def is_below_url(folder: str | Path, entry: dict, kind: str) -> bool:
    """Whether a file of one shard is behind a URL: all are of a folder that is, and tars that were indexed
    there.
    """
    return is_url(folder) or (kind == "file" and "json" in entry and is_url(entry["file"]))


def bring(folder: str | Path, entries: Sequence[dict]) -> None:
    """Fetch the small files of shards behind a URL, many at once: their indexes.

    Raises:
        UserError: one is missing or altered.
    """
    if is_url(folder):
        files = [
            (entry[kind], entry[f"{kind}_sha256"])
            for entry in entries
            for kind in ("index", "json")
            if kind in entry
        ]
        whole_files(store_of(folder), files, "fetching indexes")


class Damaged(UserError):
    """A sample is not what was built.

    Attributes:
        file: that holds it.
        found: what is wrong, in words.
    """

    def __init__(self, file: Path | CachedFile, found: str, key: str = ""):
        sample = f"sample {key}: " if key else ""
        super().__init__(f"{file}: {sample}{found}; restore this file or build the shards again")
        self.file, self.found, self._arguments = file, found, (file, found, key)

    def __reduce__(self):
        return Damaged, self._arguments


def altered(folder: str | Path, entry: dict) -> Iterator[str]:
    """A message for each file of one shard that is missing or altered.

    Args:
        entry: the shard's entry in the manifest.
    """
    for kind, expected in (("file", "sha256"), ("index", "index_sha256"), ("json", "json_sha256")):
        if kind not in entry:
            continue
        path = shard_file(folder, entry, kind)
        if isinstance(path, CachedFile) and not entry[expected]:
            if path.store.version(path.name) != entry.get("version"):
                yield f"{path}: replaced since it was indexed, as its store says; index it again"
        elif isinstance(path, CachedFile):
            if path.sha256() != entry[expected]:
                yield f"{path}: altered since it was built (its sha256 differs); upload it, or build, again"
        elif not path.is_file():
            yield f"{path}: missing, but listed in the manifest; restore it or build the shards again"
        elif sha256_of(path) != entry[expected]:
            yield (
                f"{path}: altered since it was built (its sha256 differs from {folder / 'manifest.json'});"
                " restore it or build the shards again"
            )


def shard_file(folder: str | Path, entry: dict, kind: str = "file") -> Path | CachedFile:
    """A file of one shard: its tar, its "index", or the "json" of a tar that was indexed in place.

    Returns:
        Its path. Of a tar behind a URL what reads it through the cache; of an index there, the path in the
        cache.

    Raises:
        UserError: it leads out of the folder, which only a tar that was indexed in place may.
    """
    name = entry[kind]
    if is_below_url(folder, entry, kind):
        return _remote_file(folder, entry, kind)
    if kind == "file" and "json" in entry and name.endswith(".tar"):
        return regular(folder, name)
    return file_below(folder, name)


def _remote_file(folder: str | Path, entry: dict, kind: str) -> Path | CachedFile:
    if not is_url(folder):
        # a tar that was not read whole is known by what its store says of it
        digest = entry["sha256"] or entry.get("version", "")
        return cached_file(*file_at(entry["file"]), entry["bytes"], digest)
    store, digest = store_of(folder), entry["sha256" if kind == "file" else f"{kind}_sha256"]
    if kind == "file":
        return cached_file(store, entry["file"], entry["bytes"], digest)
    return whole_files(store, [(entry[kind], digest)], "fetching an index")[0]


def existing_tar(folder: str | Path, entry: dict) -> Path | CachedFile:
    """The tar of one shard; one behind a URL is not asked for.

    Raises:
        UserError: it is missing.
    """
    tar = shard_file(folder, entry)
    if not isinstance(tar, CachedFile) and not tar.is_file():
        raise UserError(f"{tar}: missing, but listed in the manifest; restore it or build the shards again")
    return tar


def json_file(folder: str | Path, entry: dict) -> Path | CachedFile:
    """The file of one shard that has KEY.json of its samples."""
    return shard_file(folder, entry, "json" if "json" in entry else "file")


def _remote_manifest(url: str) -> dict:
    store = store_of(url)
    try:
        return read_bytes(store.read_whole("manifest.json", MAX_BYTES), dict)
    except FileNotFoundError as error:
        raise UserError(
            f"{store.shown}: no manifest.json ({error}), so not a folder of shards; check the name, or make"
            " one with: python -m data_prep build"
        ) from None


def read_manifest(folder: str | Path) -> dict:
    """The manifest of a folder that `python -m data_prep build` or `index` wrote.

    Args:
        folder: or its URL.

    Raises:
        UserError: missing, damaged, or of another version.
    """
    try:
        local = not is_url(folder) and file_below(folder, "manifest.json")
        manifest = load_json(local, dict) if local else _remote_manifest(folder)
    except (FileNotFoundError, NotADirectoryError):
        is_part = (folder.parent / "manifest.json").is_file()
        fix = f"pass {folder.parent}" if is_part else "make one with: python -m data_prep build"
        if MANGLED_URL.match(str(folder)):
            fix = "a URL has two slashes: s3://BUCKET/FOLDER"
        raise UserError(f"{folder}: no manifest.json, so not a folder of shards; {fix}") from None
    except ValueError as error:
        raise UserError(f"{folder}/manifest.json: damaged ({error}); build the shards again") from None
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder}: shards of format {manifest.get('format')}, but this version reads format {FORMAT};"
            " build the shards again"
        )
    if problem := problem_of(manifest, MANIFEST):
        raise UserError(f"{folder}/manifest.json: {problem}; restore it, or build the shards again")
    return manifest


def has_manifest(folder: str | Path) -> bool:
    """Whether a folder, or a URL, is one of shards."""
    if is_url(folder):
        return store_of(folder).size("manifest.json") is not None
    return (Path(folder) / "manifest.json").is_file()


def _float_or_text(text: str) -> float | str:
    return value if math.isfinite(value := float(text)) else text


def parse_meta(data: bytes, file: Path, key: str) -> dict:
    """KEY.json of a sample.

    Args:
        file, key: that it is from, for the message.

    Raises:
        UserError: it is damaged, or lacks the captions.
    """
    try:
        # NaN and 1e999, of other writers, are text
        meta = parse_json(data.decode(), parse_constant=str, parse_float=_float_or_text)
        if b"\\u" in data:
            json.dumps(meta, ensure_ascii=False).encode()  # a UnicodeEncodeError is a ValueError
        problem = problem_of(meta, META) or _unequal(meta)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise UserError(f"{file}: sample {key}: its .json is damaged ({problem}); build the shards again")
    return meta


def _unequal(meta: dict) -> str:
    """How many weights KEY.json has for how many captions, if these differ; else ""."""
    captions = len(meta["captions"])
    weights = len(meta.get("weights") or meta["captions"])
    return "" if weights == captions else f"weights of {weights} captions, not {captions}"
