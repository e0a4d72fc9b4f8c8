"""Readers of foreign bytes end in rows or in a UserError, whatever the bytes are."""

import contextlib
import gzip
import io
import json
import random
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import noise_images

from data_prep.build.pipeline import Checking, Parallelism, Reading, build
from data_prep.errors import UserError
from data_prep.inputs.formats import read
from data_prep.inputs.rows import Columns

DEEP = "[" * 1_000_000
CELLS = ('{"image": "a.png", "caption": ' + DEEP, DEEP, "{" * 100_000, '{"a":' * 100_000, "1" * 5000)
CELLS += ('{"image": 1e999, "caption": NaN}', '{"image": {"bytes": "text"}, "caption": "a"}', "null", "\0")
CELLS += ('{"image": {"bytes": 1, "path": 2}, "caption": {"a": []}}', '{"image": [[]], "caption": [[]]}')
CELLS += ('{"image": {"bytes": null, "path": null}, "caption": null}', '{"image": {"bytes": [1]}}')
CELLS += ('{"image": ' + "1" * 5000 + ', "caption": "a"}', '{"caption": "\\ud800", "image": "\\udcff"}')


def only_rows_or_a_sentence(path: Path, **options) -> None:
    with contextlib.suppress(UserError):
        for _ in read(str(path), Columns(), **options):
            pass


@pytest.mark.parametrize("number", range(len(CELLS)))
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.tsv"])
def test_odd_cells(name, number, tmp_path):
    path = tmp_path / name
    path.write_text(CELLS[number] + "\n" + '{"image": "b.png", "caption": "b"}\n')
    only_rows_or_a_sentence(path)


@pytest.mark.parametrize("number", range(len(CELLS)))
def test_odd_members_of_a_tar(number, tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in (("a.png", b"\x89PNG\r\n\x1a\n"), ("a.json", CELLS[number].encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    only_rows_or_a_sentence(path)


IMAGES = {
    "text in bytes": pa.array([{"bytes": "text", "path": "a.png"}] * 3),
    "numbers in bytes": pa.array([{"bytes": 1, "path": "a.png"}] * 3),
    "lists in bytes": pa.array([{"bytes": [1, 2], "path": None}] * 3),
    "no path": pa.array(
        [{"bytes": None, "path": None}] * 3, pa.struct({"bytes": pa.binary(), "path": pa.string()})
    ),
    "other fields": pa.array([{"a": 1}] * 3),
    "numbers": pa.array([1, 2, 3]),
    "dates": pa.array([0, 10**18, -(10**18)], pa.timestamp("us")),
    "NUL": pa.array(["a\0b"] * 3),
    "decimals": pa.array([1, 2, 3]).cast(pa.decimal128(22, 2)),
    "nothing": pa.nulls(3),
    "maps": pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
}


@pytest.mark.parametrize("column", ["image", "caption", "other"])
@pytest.mark.parametrize("kind", IMAGES)
def test_odd_columns_of_parquet(kind, column, tmp_path):
    columns = {"image": ["a.png", "b.png", "c.png"], "caption": ["a", "b", "c"]} | {column: IMAGES[kind]}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    noise_images(tmp_path, 2)
    only_rows_or_a_sentence(path)
    with contextlib.suppress(UserError):
        build(
            [str(path)],
            tmp_path / "out",
            Reading(images=str(tmp_path)),
            Checking(max_rejects=0.99),
            parallelism=Parallelism(1),
        )


def seeds() -> dict[str, bytes]:
    """A small file of each format."""
    tar, parquet = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name in ("a.png", "a.txt", "a.json", "b.png", "b.txt"):
            member = tarfile.TarInfo(name)
            member.size = 20
            archive.addfile(member, io.BytesIO(b'{"caption": "a"}    '))
    pq.write_table(pa.table({"image": ["a", "b"], "caption": ["x", "y"]}), parquet)
    table = b'image,caption\na.png,"a, b"\nb.png,c\n'
    rows = b"".join(
        json.dumps({"image": "a.png", "caption": [f"{n}", "ä"]}).encode() + b"\n" for n in range(4)
    )
    return {
        "a.csv": table,
        "a.csv.gz": gzip.compress(table),
        "a.jsonl": rows,
        "a.tar": tar.getvalue(),
        "a.parquet": parquet.getvalue(),
    }


SEEDS = seeds()


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEDS)
def test_changed_bytes_of_each_format(name, tmp_path):
    """500 files each: bytes changed, cut out, repeated."""
    chance, path = random.Random(name), tmp_path / name
    for _ in range(500):
        data = bytearray(SEEDS[name])
        for _ in range(chance.randint(1, 8)):
            start = chance.randrange(len(data) + 1)
            end = min(len(data), start + chance.choice((0, 1, 1, 4, 64)))
            data[start:end] = chance.choice(
                (b"", b"\0", b"\xff", b'"', bytes([chance.randrange(256)]), data[start:end] * 3)
            )
        path.write_bytes(data)
        only_rows_or_a_sentence(path)
