"""An index leaves for other programs: PostgreSQL with pgvector, Parquet, NumPy."""

import csv
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from data_prep.atomic import atomic_file
from data_prep.errors import UserError
from data_prep.progress import progress
from eval.search.index import Index, not_empty

ROWS = 4096
HNSW_MOST = 4000  # dimensions of a halfvec that pgvector's HNSW takes


def export(index: Annotated[Path, tyro.conf.Positional], out: Path, table: str = "pictures") -> None:
    """Writes an index for other programs; the ending of --out says which.

    .sql is for `psql -f`: a table (key, split, group_number, captions, columns, image_features halfvec) for
    pgvector 0.7 or newer, with an HNSW index by cosine. .parquet holds the metadata, and image_features as
    lists of float32. .npy holds image_features alone, fp16, with a .csv of keys and captions beside it.

    Args:
        index: Folder that `python -m eval embed` made.
        out: File to write.
        table: Of the .sql: it is created, and must not be there.
    """
    writers = {".sql": partial(write_sql, table=table), ".parquet": write_parquet, ".npy": write_npy}
    if out.suffix not in writers:
        raise UserError(f"--out {out}: a file that ends in {', '.join(writers)} is wanted")
    opened = not_empty(Index(index))
    with atomic_file(out) as unfinished:
        writers[out.suffix](unfinished, opened)
    if out.suffix == ".npy":
        write_keys(out.with_suffix(".csv"), opened)
    load = f"    load it: psql -v ON_ERROR_STOP=1 -1 -f {out} DATABASE" if out.suffix == ".sql" else ""
    print(f"{len(opened)} pictures: {out}{load}")


def parts(index: Index) -> Iterator[tuple[list[dict], np.ndarray]]:
    """Rows as Index.rows has them, and features fp16, some thousand at a time."""
    for start in progress(range(0, len(index), ROWS), desc="exporting", unit="part", delay=1):
        numbers = range(start, min(start + ROWS, len(index)))
        yield index.rows(numbers), index.features[numbers.start : numbers.stop]


def write_sql(path: Path, index: Index, table: str) -> None:
    """COPY in PostgreSQL's text format: whatever a caption holds, it is data; halfvec keeps each fp16 value
    exactly.

    Its CSV format would be shorter here, but psql 18 and older ones end it differently.
    """
    d, name = index.manifest["d"], '"' + table.replace('"', '""') + '"'
    said = f"{index.manifest['model']}, sha256 {index.manifest['model_sha256']}".replace("'", "''").replace(
        "\n", " "
    )
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write("CREATE EXTENSION IF NOT EXISTS vector;\n")
        file.write(
            f"CREATE TABLE {name} (number bigint PRIMARY KEY, key text NOT NULL, split text NOT NULL,"
            " group_number bigint NOT NULL,\n"
        )
        file.write(
            f"  captions text[] NOT NULL, columns jsonb NOT NULL, image_features halfvec({d}) NOT NULL);\n"
        )
        file.write(f"COMMENT ON TABLE {name} IS '{said}';\n")
        file.write(f"COPY {name} FROM STDIN;\n")
        for rows, features in parts(index):
            file.writelines(
                "\t".join(map(_escaped, _cells(*each))) + "\n"
                for each in zip(rows, features.tolist(), strict=True)
            )
        file.write("\\.\n")
        if d <= HNSW_MOST:
            file.write(f"CREATE INDEX ON {name} USING hnsw (image_features halfvec_cosine_ops);\n")
        file.write(
            f"-- nearest: SELECT key, 1 - (image_features <=> $1) AS cosine FROM {name} ORDER BY"
            " image_features <=> $1 LIMIT 10;\n"
        )


def _cells(row: dict, features: list[float]) -> list:
    columns = {name: value for name, value in row["columns"].items() if value is not None}
    captions = ",".join(
        '"' + caption.replace("\\", "\\\\").replace('"', '\\"') + '"' for caption in row["captions"]
    )
    known = [row[name] for name in ("number", "key", "split", "group")]
    return [*known, f"{{{captions}}}", json.dumps(columns, ensure_ascii=False), json.dumps(features)]


def _escaped(cell: object) -> str:
    return str(cell).translate({ord("\\"): "\\\\", ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r"})


def write_parquet(path: Path, index: Index) -> None:
    d, writer = index.manifest["d"], None
    for rows, features in parts(index):
        flat = [
            {**{name: row[name] for name in ("key", "split", "group", "captions")}, **row["columns"]}
            for row in rows
        ]
        known = pa.Table.from_pylist(flat, index.schema)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(features.astype(np.float32).ravel()), d)
        whole = known.append_column("image_features", lists)
        writer = writer or pq.ParquetWriter(path, whole.schema)
        writer.write_table(whole)
    writer.close()


def write_npy(path: Path, index: Index) -> None:
    with open(path, "wb") as file:
        np.lib.format.write_array(file, index.features)


def write_keys(path: Path, index: Index) -> None:
    with atomic_file(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "key", "caption"])
        for rows, _ in parts(index):
            writer.writerows((row["number"], row["key"], (row["captions"] or [""])[0]) for row in rows)
