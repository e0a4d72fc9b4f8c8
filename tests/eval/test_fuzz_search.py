"""Indexes of changed files, requests to the search page, and files of queries: values or one sentence."""

import io
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fuzz
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import noise_image, png

from eval.search.command import compress
from eval.search.index import SCHEMA, Index, filter_rows
from eval.search.indexing import start
from eval.search.nearest import Nearest
from eval.search.query import read_queries
from eval.search.serve import Column, Search, about, app, results_of
from eval.search.words import Words


@pytest.fixture
def index(icon_index, memory_folder) -> Path:
    """A copy of the first eight images."""
    folder = Path(shutil.copytree(icon_index, memory_folder / "index"))
    manifest = json.loads((folder / "manifest.json").read_text())
    starts = np.load(folder / "thumbnails.npy")[:9]
    np.save(folder / "features.npy", np.load(folder / "features.npy")[:8])
    np.save(folder / "thumbnails.npy", starts)
    (folder / "thumbnails.bin").write_bytes((folder / "thumbnails.bin").read_bytes()[: starts[-1]])
    pq.write_table(pq.read_table(folder / "metadata.parquet").slice(0, 8), folder / "metadata.parquet")
    (folder / "manifest.json").write_text(json.dumps({**manifest, "n": 8}))
    return folder


def search(folder: Path) -> None:
    """All that search, the page and clustering read of an index, without its model."""
    opened = Index(folder)
    column = Column(opened, None, ThreadPoolExecutor(1), Words(opened)) if len(opened) else None
    if column:
        found = [about([column.index]), results_of([column], Search(like=0, k=3))]
        json.dumps(found, allow_nan=False).encode()
        opened.thumbnail(len(opened) - 1)
        filter_rows(opened, [f"split={opened.rows([0])[0]['split']}"])
        Nearest(opened, use_faiss=False).top(column.like(0), 3)


CHANGES = {
    "manifest.json": lambda data: fuzz.json_files(json.loads(data)),
    "features.npy": fuzz.changed_bytes,
    "thumbnails.npy": fuzz.changed_bytes,
    "metadata.parquet": lambda data: fuzz.made_by(lambda choices: changed_table(data, choices)),
}
CELLS = [None, True, -1, 1 << 62, 2.5, float("nan"), "x", "\0", b"\xff", [], ["a"], [None], {"a": 1}]


def changed_table(data: bytes, choices: fuzz.Choices) -> bytes:
    """A Parquet file with changed bytes, or with a column of other values."""
    if choices.number() % 4 == 0:
        return fuzz.edited(data, choices)
    table, buffer = pq.read_table(io.BytesIO(data)), io.BytesIO()
    name, cells = choices.of([*SCHEMA, "other"]), [choices.of(CELLS)] * len(table)
    columns = dict(zip(table.column_names, table.columns, strict=True)) | {name: pa.array(cells)}
    if choices.number() % 4 == 0:
        del columns[choices.of(list(columns))]
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_index(count, name, index):
    check_index(count, name, index)


def check_index(count: int, name: str, index: Path) -> None:
    whole = (index / name).read_bytes()

    def act(data: bytes) -> None:
        (index / name).unlink()  # another may be mapped
        (index / name).write_bytes(data)
        search(index)

    fuzz.check(count, CHANGES.get(name, fuzz.changed_bytes)(whole), act, valid=[whole])


@pytest.mark.parametrize("name", ["manifest.json", "features.npy", "projection.npy", "scales.npy"])
@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_compressed_index(count, name, index, memory_folder):
    compress(index, memory_folder / "small", dims=4)
    check_index(count, name, memory_folder / "small")


@pytest.mark.parametrize("count", fuzz.COUNTS[:1])
def test_what_an_unfinished_index_is_of(count, memory_folder):
    started = {"index_format": 2, "model": "a", "model_sha256": "b", "data": "c", "data_sha256": "d"}

    def act(data: bytes) -> None:
        (memory_folder / "started.json").write_bytes(data)
        start(memory_folder, started)

    fuzz.check(count, fuzz.json_files(started), act, valid=[json.dumps(started).encode()])


@pytest.fixture(scope="module")
def ask(icon_index) -> fuzz.Asked:
    opened = Index(icon_index)
    return fuzz.Asked(app([Column(opened, opened.model(), ThreadPoolExecutor(1), Words(opened))]))


PNG = png(noise_image(16, 16))
BODIES = [
    {"like": 3, "k": 2, "grouped": False},
    {"like": 0, "filters": ["split=train"]},
    {"text": "a bell", "k": 1},
]
QUERIES = [b"k=3&grouped=true", b"k=2&filter=split%3Dtrain&filter=key=x", b"grouped=false"]
PATHS = [
    "/api/about",
    "/thumbnail/0",
    "/thumbnail/-1",
    "/thumbnail/9" + "9" * 30,
    "/thumbnail/x",
    "/",
    "/x",
    "/thumbnail/\0",
]


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_requests_to_search(count, ask):
    json_type = (b"content-type", b"application/json")

    def request(choices: fuzz.Choices) -> tuple:
        kind = choices.number() % 8
        if kind < 6:
            body = fuzz.changed_json(choices.of(BODIES[:2] if kind else BODIES), choices)
            return "POST", "/api/search", b"", [json_type], body
        query = fuzz.edited(choices.of(QUERIES), choices)
        if kind == 6:
            return choices.of(["GET", "GET", "POST", "HEAD"]), choices.of(PATHS), query, [], b""
        return "POST", "/api/search", query, [], fuzz.edited(PNG, choices)

    def act(values: tuple) -> None:
        status, body = ask(*values)
        assert status < 500
        assert status == 200 or values[0] == "HEAD" or json.loads(body)["error"]

    for body in BODIES:
        assert ask("POST", "/api/search", b"", [json_type], json.dumps(body).encode())[0] == 200
    fuzz.check(count, fuzz.made_by(request, 60), act)


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_a_csv_of_queries(count, memory_folder):
    whole = 'text,image\na bell,\n,a.png\n"two\nlines",\nä,b.png\n'.encode()

    def act(data: bytes) -> None:
        (memory_folder / "queries.csv").write_bytes(data)
        for query in read_queries(memory_folder / "queries.csv"):
            query.text.encode()

    fuzz.check(count, fuzz.changed_bytes(whole), act, valid=[whole])
