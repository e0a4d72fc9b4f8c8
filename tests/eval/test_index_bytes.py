"""An index whose metadata is a few bytes that become gigabytes is refused in one sentence."""

import shutil
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import UserError
from data_prep.inputs.parquet import read_table
from eval.search.index import Index


def test_metadata_that_becomes_many_times_its_size_is_refused(icon_index, tmp_path):
    folder = tmp_path / "index"
    shutil.copytree(icon_index, folder)
    path = folder / "metadata.parquet"
    table = pq.read_table(path)
    assert read_table(path).equals(table)
    assert Index(folder).schema == table.schema
    codes = pa.array([0] * len(table), pa.int32())
    evil = pa.DictionaryArray.from_arrays(codes, pa.array(["z" * (400_000_000 // len(table))]))
    pq.write_table(table.append_column("evil", evil), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 200_000
    with pytest.raises(UserError, match=r"metadata\.parquet becomes more than 200 times its size"):
        Index(folder)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than 200 times"):
        read_table(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()
    assert pa.total_allocated_bytes() - before < 1 << 26


def test_columns_that_are_not_of_an_index_are_not_read(icon_index, tmp_path):
    folder = tmp_path / "index"
    shutil.copytree(icon_index, folder)
    path = folder / "metadata.parquet"
    table = pq.read_table(path)
    numbers = pa.array([1] * len(table))
    pq.write_table(table.append_column("number", numbers), path)
    with pytest.raises(UserError, match="its columns number are not of an index"):
        Index(folder)
