"""What tests of damaged shards share."""

import json
from pathlib import Path

from data_prep.shard_index import HEADER, HEADER_WITHOUT_HASH
from data_prep.shards import Shards, sha256_of


def flip(shards: Shards, number: int) -> Path:
    """Change one bit of a sample's image; gives the tar."""
    shard = next(shard for shard, end in enumerate(shards.shard_sizes.cumsum()) if number < end)
    path = shards.folder / shards.entries[shard]["file"]
    offset, size = shards._offsets[number, :2].tolist()
    with open(path, "r+b") as file:
        file.seek(offset + size // 2)
        byte = file.read(1)[0]
        file.seek(offset + size // 2)
        file.write(bytes([byte ^ 1]))
    return path


def reindex(folder: Path, change) -> None:
    """Change each index of some shards, and the manifest so that it fits.

    Args:
        change: of the bytes of an index.
    """
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    for split in manifest["splits"].values():
        for entry in split["shards"]:
            index = folder / entry["index"]
            index.write_bytes(change(index.read_bytes()))
            entry["index_sha256"] = sha256_of(index)
    file.write_text(json.dumps(manifest))


def as_an_older_build(folder: Path) -> Path:
    """Make the indexes of some shards those of a build that knew no hash of a sample."""

    def older(data: bytes) -> bytes:
        header, _, rows = data.partition(b"\n")
        assert header + b"\n" == HEADER
        return HEADER_WITHOUT_HASH + b"".join(row.rpartition(b"\t")[0] + b"\n" for row in rows.splitlines())

    reindex(folder, older)
    return folder
