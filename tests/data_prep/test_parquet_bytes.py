"""A small Parquet file whose rows share large values is read within bounds."""

import tracemalloc
from itertools import chain

import pyarrow as pa
import pytest
from conftest import noise_images
from pyarrow import parquet

from data_prep.build import records
from data_prep.build.pipeline import Reading
from data_prep.images import BadImage
from data_prep.inputs.formats import read
from data_prep.inputs.parquet import BATCH_BYTES, ParquetImages, _pieces, _sizes, read_label_column
from data_prep.inputs.rows import Columns

LONG = "b" * 5_000_000
NAMES = [f"{number}.png" for number in range(200)]


def repeated(value, rows: int, kind=None) -> pa.Array:
    """A column of one value, which is in memory once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value], kind))


def write(path, table: dict):
    parquet.write_table(pa.table(table), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 20_000
    return path


def test_texts_that_are_stored_once_are_rejects_without_being_expanded(tmp_path):
    """1 GB as text."""
    path = write(tmp_path / "a.parquet", {"image": NAMES, "caption": repeated(LONG, 200)})
    pa.default_memory_pool().release_unused()
    tracemalloc.start()
    before, held = pa.total_allocated_bytes(), 0
    found = []
    for row in read(str(path), Columns()):
        held = max(held, pa.total_allocated_bytes() - before)
        found.append((row.line, row.image, row.problem))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    problem = ("text too long", "its caption has 5,000,000 bytes; at most 131,072 characters")
    assert found == [(number, name, problem) for number, name in enumerate(NAMES, 1)]
    assert peak < 1 << 24
    assert held < 1 << 26


@pytest.mark.parametrize("other", [pa.string(), pa.binary(), pa.struct({"a": pa.binary()})])
def test_columns_that_are_not_used_are_bounded(tmp_path, other):
    """Text is kept with the row; bytes and structs are not, and not read."""
    is_struct = pa.types.is_struct(other)
    values = pa.array([{"a": b"a" * 99}] * 20) if is_struct else repeated(LONG * 4, 20, other)
    rows = {"image": NAMES[:20], "caption": ["a"] * 20, "other": values}
    path = write(tmp_path / "a.parquet", rows)
    tracemalloc.start()
    found = [(row.image, row.problem and row.problem.reason) for row in read(str(path), Columns())]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    reason = "text too long" if other == pa.string() else None
    assert found == [(name, reason) for name in NAMES[:20]]
    assert peak < 1 << 24


def test_images_that_are_stored_once_are_held_one_by_one(tmp_path):
    image = bytes(20_000_000)
    path = write(tmp_path / "a.parquet", {"image": repeated(image, 10), "label": ["x"] * 10})
    before, held = pa.total_allocated_bytes(), 0
    for row in read(str(path), Columns(caption="", label="label")):
        held = max(held, pa.total_allocated_bytes() - before)
        assert (row.data, row.label) == (image, "x")
    images = ParquetImages([path], "image", [[10]])
    assert all(images(row) == image for row in range(10))
    held = max(held, pa.total_allocated_bytes() - before)
    assert held < 120_000_000  # of 200


def test_labels_that_are_too_long_are_left_out_and_equal_ones_are_held_once(tmp_path):
    label = "c" * 100_000
    coded = pa.array(["x", LONG, label, "y"])
    labels = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, None, 3] * 40, pa.int32()), coded)
    path = write(tmp_path / "a.parquet", {"image": NAMES, "label": labels})
    tracemalloc.start()
    column = read_label_column(path, Columns(caption="", label="label"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert column.values == ["x", None, label, None, "y"] * 40
    assert peak < 1 << 24
    assert set(column.problems) == set(range(1, 200, 5))
    assert str(BadImage(*column.problems[1])).startswith("text too long")


def test_rows_are_the_same_whatever_their_types(tmp_path):
    """Pieces of a batch hold all its rows in order."""
    columns = {
        "image": ["a", None, "c", "d"],
        "list": [["x", "y"], None, [], ["z"]],
        "map": pa.array(
            [[("a", "bb")], None, [], [("c", "d"), ("e", "f")]], pa.map_(pa.string(), pa.string())
        ),
        "fixed": pa.array([[1, 2], None, [3, 4], [5, 6]], pa.list_(pa.int64(), 2)),
        "struct": [{"a": "x", "b": [1]}, None, {"a": None, "b": []}, {"a": "y", "b": None}],
        "coded": pa.array(["q", None, "q", "r"]).dictionary_encode(),
        "number": [1.5, None, 2.0, 3.0],
    }
    batch = pa.table(columns).to_batches()[0]
    for part in (batch, batch.slice(1), batch.slice(2, 1), batch.slice(0, 0)):
        assert all(_sizes(column).shape == (part.num_rows,) for column in part.columns)
        pieces = [piece.to_pylist() for piece, problem in _pieces(part, Columns()) if not problem]
        assert list(chain(*pieces)) == part.to_pylist()


def test_sizes_are_those_of_the_texts():
    texts = pa.array([["a" * 1000, "b" * 500], [], ["c" * 70]])
    assert _sizes(texts).tolist() == [64 + 1500, 64, 64 + 70]
    coded = pa.array(
        [["a" * 1000, "b" * 500], [], ["c" * 70]], pa.list_(pa.dictionary(pa.int32(), pa.string()))
    )
    assert _sizes(coded).tolist() == _sizes(texts).tolist()
    large = pa.record_batch({"image": ["a"] * 9, "n": ["b" * (BATCH_BYTES // 8)] * 9})
    assert [piece.num_rows for piece, _ in _pieces(large, Columns())] == [7, 2]


def test_equal_captions_of_one_image_are_held_once(tmp_path, monkeypatch):
    """They are duplicates."""
    text = "d" * 100_000
    path = write(tmp_path / "a.parquet", {"image": ["0.png"] * 400, "caption": repeated(text, 400)})
    noise_images(tmp_path, 1)
    monkeypatch.setattr(records, "INSERT_CHARACTERS", 1 << 20)
    part, pending = records.Part(tmp_path, 0, 1), []
    insert = records._Loader.insert_pending
    monkeypatch.setattr(
        records._Loader,
        "insert_pending",
        lambda loader: (pending.append(loader.pending_characters), insert(loader)),
    )
    records.load(part, [str(path)], Reading(images=str(tmp_path), context_length=0))
    (image,) = records.unchecked_images(part)
    assert [row.caption for row in image.rows] == [text] * 400
    assert len({id(row.caption) for row in image.rows}) == 1
    assert (sum(pending), max(pending)) == (400 * len(text), 11 * len(text))
    part.close()
