"""Export of an index to other programs: PostgreSQL with pgvector, Parquet, NumPy."""

import csv
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.atomic import atomic_file
from data_prep.errors import UserError
from data_prep.progress import progress
from data_prep.terminal import say
from eval.search.index import OWN_COLUMNS, Index, open_index

ROWS_AT_ONCE = 4096
NUL = "\0", "\ufffd"  # PostgreSQL's text and jsonb cannot hold the first
MAX_HNSW_DIMENSIONS = 4000  # of a halfvec column, for pgvector's HNSW


def export_index(folder: Path, out: Path, table: str) -> None:
    """Write an index in the format of out's extension; see eval.search.command.export.

    Raises:
        UserError: There is no index or no image in it, or the extension is unknown.
    """
    writers = {".sql": partial(write_sql, table=table), ".parquet": write_parquet, ".npy": write_npy}
    if out.suffix not in writers:
        raise UserError(f"--out {out}: the extension must be one of {', '.join(writers)}")
    index = open_index(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as unfinished:
        writers[out.suffix](unfinished, index)
    if out.suffix == ".npy":
        write_keys(out.with_suffix(".csv"), index)
    if index.projection:
        matrix = out.with_suffix(".projection.npy")
        with atomic_file(matrix) as unfinished, open(unfinished, "wb") as file:
            np.save(file, index.projection.matrix)
        d, dims = index.projection.matrix.shape
        say(f"a query is text_features or image_features [{d}] @ the matrix [{d}, {dims}] in {matrix}")
    load = f"    load it: psql -v ON_ERROR_STOP=1 -1 -f {out} DATABASE" if out.suffix == ".sql" else ""
    say(f"{len(index)} images: {out}{load}")


def parts(index: Index) -> Iterator[tuple[list[dict], np.ndarray]]:
    """Rows as Index.rows returns them, and fp16 features, ROWS_AT_ONCE at a time."""
    for start in progress(range(0, len(index), ROWS_AT_ONCE), desc="exporting", unit="part", delay=1):
        numbers = range(start, min(start + ROWS_AT_ONCE, len(index)))
        yield index.rows(numbers), index.features[numbers.start : numbers.stop]


def write_sql(path: Path, index: Index, table: str) -> None:
    """Write COPY data in PostgreSQL's text format; halfvec holds each fp16 value exactly.

    The CSV format would be simpler, but psql up to version 18 ends it differently.
    """
    d, name = index.features.shape[1], '"' + table.replace('"', '""') + '"'
    comment = f"{index.manifest['model']}, sha256 {index.manifest['model_sha256']}"
    comment = comment.replace("'", "''").replace("\n", " ")
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write("CREATE EXTENSION IF NOT EXISTS vector;\n")
        file.write(
            f"CREATE TABLE {name} (number bigint PRIMARY KEY, key text NOT NULL, path text NOT NULL,"
            " split text NOT NULL, group_number bigint NOT NULL,\n"
        )
        file.write(
            f"  captions text[] NOT NULL, columns jsonb NOT NULL, image_features halfvec({d}) NOT NULL);\n"
        )
        file.write(f"COMMENT ON TABLE {name} IS '{comment}';\n")
        file.write(f"COPY {name} FROM STDIN;\n")
        for rows, features in parts(index):
            cells = map(_cells, rows, features.tolist())
            file.writelines("\t".join(map(_escaped, row)) + "\n" for row in cells)
        file.write("\\.\n")
        if d <= MAX_HNSW_DIMENSIONS:
            file.write(f"CREATE INDEX ON {name} USING hnsw (image_features halfvec_cosine_ops);\n")
        file.write(
            f"-- nearest: SELECT path, 1 - (image_features <=> $1) AS cosine FROM {name} ORDER BY"
            " image_features <=> $1 LIMIT 10;\n"
        )


def _cells(row: dict, features: list[float]) -> list:
    columns = {
        name: value.replace(*NUL) if isinstance(value, str) else value
        for name, value in row["columns"].items()
        if value is not None
    }
    captions = ",".join(
        '"' + caption.replace("\\", "\\\\").replace('"', '\\"') + '"' for caption in row["captions"]
    )
    values = [row[name] for name in ("number", "key", "path", "split", "group")]
    return [*values, f"{{{captions}}}", json.dumps(columns, ensure_ascii=False), json.dumps(features)]


def _escaped(cell: object) -> str:
    text = str(cell).replace(*NUL)
    return text.translate({ord("\\"): "\\\\", ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r"})


def write_parquet(path: Path, index: Index) -> None:
    d, writer = index.features.shape[1], None
    for rows, features in parts(index):
        flat = [{**{name: row[name] for name in OWN_COLUMNS}, **row["columns"]} for row in rows]
        lists = pa.FixedSizeListArray.from_arrays(pa.array(features.astype(np.float32).ravel()), d)
        table = pa.Table.from_pylist(flat, index.schema).append_column("image_features", lists)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def write_npy(path: Path, index: Index) -> None:
    with open(path, "wb") as file:
        np.lib.format.write_array(file, index.features)


def write_keys(path: Path, index: Index) -> None:
    with atomic_file(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "key", "path", "caption"])
        for rows, _ in parts(index):
            writer.writerows(
                (row["number"], row["key"], row["path"], (row["captions"] or [""])[0]) for row in rows
            )
