"""The index beside each shard: a row per sample, with what is needed to read it without scanning the tar.

    SHARDS/train/train-000000.index.tsv   key, group, offset and size of each member in the tar, hash

`hash` is of the sample's image and KEY.json: who reads both knows whether they are what was built, so that no
shard must be hashed whole before it is used. An index of an older build has no such column.
"""

import binascii
import hashlib
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash

from data_prep.atomic import atomic_file
from data_prep.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

OFFSETS = ("image_offset", "image_size", "json_offset", "json_size")
COLUMNS = ("key", "group", *OFFSETS, "txt_offset", "txt_size", "hash")
HEADER, HEADER_WITHOUT_HASH = (("\t".join(names) + "\n").encode() for names in (COLUMNS, COLUMNS[:-1]))
MIN_ROW_BYTES = 31  # a key of 16 digits, seven numbers, and what separates them
TOGETHER_BYTES = 1 << 21  # of indexes, parsed at once


def sample_hash(content: bytes, meta: bytes) -> int:
    """64 bits that change with a sample's image or KEY.json; never 0, which stands for no hash.

    Args:
        content: xxh3_128 of the encoded image. Not the image: `data_prep index` has its hash from the checks,
            and would have to read the tars once more.
        meta: KEY.json.
    """
    return xxhash.xxh3_64_intdigest(content + meta) or 1


class Rows(NamedTuple):
    """The indexes of some shards, one after another.

    Attributes:
        keys: uint64 [n]; a key is 16 hexadecimal digits.
        groups: int64 [n].
        offsets: uint32 [n, 4], OFFSETS; int64 if one is 4 GiB or more.
        hashes: uint64 [n], of sample_hash(); 0 where an index has none.
    """

    keys: np.ndarray
    groups: np.ndarray
    offsets: np.ndarray
    hashes: np.ndarray


def key_text(key: int) -> str:
    """A key as files and people have it."""
    return f"{key:016x}"


def write_index(path: Path, rows: list[list]) -> None:
    """Write rows of COLUMNS; their hash is an integer."""
    with atomic_file(path) as partial, open(partial, "wb") as file:
        file.write(HEADER)
        for *values, sample in rows:
            file.write(("\t".join(map(str, values)) + f"\t{sample:016x}\n").encode())


def read_indexes(indexes: Sequence[tuple[Path, dict]]) -> Rows:
    """Read indexes, and compare their sha256 with the manifest.

    Args:
        indexes: of each shard, the file, and the shard's entry in the manifest.

    Raises:
        UserError: a file is missing or altered, or does not match the manifest.
    """
    sizes = [_size(path, entry["samples"]) for path, entry in indexes]
    n, start = sum(entry["samples"] for _, entry in indexes), 0
    integers = [np.empty(n, np.uint64), np.empty(n, np.int64), np.empty((n, 4), np.uint32)]
    rows = Rows(*integers, np.zeros(n, np.uint64))
    together = (np.cumsum(sizes) // TOGETHER_BYTES).tolist()
    for _, part in groupby(zip(indexes, together, strict=True), itemgetter(1)):
        read = [(path, *_read(path, entry)) for (path, entry), _ in part]
        for has_hashes, alike in groupby(read, itemgetter(1)):
            for parsed in _parse([(path, body) for path, _, body in alike], has_hashes):
                if parsed.offsets.max(initial=0) >= 1 << 32:
                    rows = rows._replace(offsets=rows.offsets.astype(np.int64))
                for column, values in zip(rows, parsed, strict=True):
                    column[start : start + len(values)] = values
                start += len(parsed.keys)
    return rows


def _size(path: Path, samples: int) -> int:
    """Bytes of an index, which must have room for so many rows: memory is taken for them."""
    if not path.is_file():
        raise UserError(f"{path}: missing, but listed in the manifest; restore it or build the shards again")
    size = path.stat().st_size
    if samples * MIN_ROW_BYTES > size:
        raise UserError(
            f"{path}: has no room for {samples} rows, but the manifest says so many; build the shards again"
        )
    return size


def _read(path: Path, entry: dict) -> tuple[bool, bytes]:
    """Whether an index has hashes, and its rows."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["index_sha256"]:
        raise UserError(
            f"{path}: altered since it was built (its sha256 differs from the manifest's); restore it or"
            " build the shards again"
        )
    header, end, body = data.partition(b"\n")
    header, n = header + end, body.count(b"\n")
    if (
        header not in (HEADER, HEADER_WITHOUT_HASH)
        or b"\r" in body
        or not body.endswith((b"\n", b"")[not n :])
    ):
        raise UserError(f"{path}: not readable (no index of a shard); build the shards again")
    if n != entry["samples"]:
        raise UserError(f"{path}: {n} rows, but the manifest says {entry['samples']}; build the shards again")
    return header == HEADER, body


def _parse(bodies: list[tuple[Path, bytes]], has_hashes: bool) -> list[Rows]:
    """The rows of indexes, parsed at once; where one of them cannot be, one by one, which names it."""
    try:
        return [_rows(b"".join(body for _, body in bodies), has_hashes)]
    except (ValueError, OverflowError) as error:
        if len(bodies) > 1:
            return [rows for body in bodies for rows in _parse([body], has_hashes)]
        raise UserError(f"{bodies[0][0]}: not readable ({error}); build the shards again") from None


def _rows(body: bytes, has_hashes: bool) -> Rows:
    import pyarrow as pa  # slow to import (0.1 s), and not needed for building
    from pyarrow import csv

    if not body:
        return Rows(*(np.empty(shape, np.int64) for shape in (0, 0, (0, 4), 0)))
    names = COLUMNS if has_hashes else COLUMNS[:-1]
    hexadecimal = dict.fromkeys(("key", "hash"), pa.binary(16))
    table = csv.read_csv(
        pa.BufferReader(body),
        csv.ReadOptions(column_names=names),
        csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
        csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.int64()) | hexadecimal,
            include_columns=[name for name in names if not name.startswith("txt")],
            null_values=[],
        ),
    )
    offsets = np.stack([table[name].to_numpy() for name in OFFSETS], axis=1)
    if (offsets < 0).any():
        raise ValueError("a negative offset or size")
    hashes = _from_hex(table["hash"]) if has_hashes else np.zeros(len(table), np.uint64)
    return Rows(_from_hex(table["key"]), table["group"].to_numpy(), offsets, hashes)


def _from_hex(column: "pa.ChunkedArray") -> np.ndarray:
    """uint64 [n] of a column of 16 hexadecimal digits."""
    digits = (memoryview(chunk.buffers()[1])[: 16 * len(chunk)] for chunk in column.chunks)
    return np.frombuffer(binascii.unhexlify(b"".join(digits)), ">u8")
