"""Tables, tars and folders of changed bytes and fields are rows, rejects or one sentence."""

import base64
import gzip
import io
import json
import tarfile
from pathlib import Path

import fuzz
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import noise_image, png

from data_prep.build.decisions import read_decisions
from data_prep.inputs.formats import read
from data_prep.inputs.rows import Columns

COLUMNS = Columns(group="group", split="split", label="label")
PNG = png(noise_image(8, 8))
ROWS = [
    {"image": "a.png", "caption": ["red", "a red ä"], "group": "g", "split": "train", "label": "x", "n": 1},
    {"image": {"bytes": None, "path": "b.png"}, "caption": "b", "group": 7, "split": None, "label": 1.5},
    {"image": "data:image/png;base64," + base64.b64encode(PNG).decode(), "caption": "c", "x": {"y": [1]}},
]
CSV = b'image,caption,group,split,label\na.png,"a, ""b""",g,train,x\nb.png,"two\nlines",,,\n'
CSV += "c.png,ä,h,val,y\n".encode()
DECISIONS = b"key,image,action,caption,new_caption,note\n"
DECISIONS += b'0123456789abcdef,a.png,edit,"old, one",new,\n0123456789abcdee,b.png,drop,,,why\n'


def read_all(path: Path, data: bytes, **options) -> None:
    path.write_bytes(data)
    for row in read(str(path), COLUMNS, **options):
        if not row.problem:  # else it reaches a shard
            (row.image + row.caption + row.group + row.split + row.label + row.columns).encode()


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_csv(count, memory_folder):
    tables = fuzz.changed_bytes(CSV, CSV.replace(b",", b"\t"), CSV.decode().encode("utf-16"))
    fuzz.check(count, tables, lambda data: read_all(memory_folder / "a.csv", data))


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_compressed_csv(count, memory_folder):
    whole = gzip.compress(CSV)

    def packed(choices: fuzz.Choices) -> bytes:
        inside = choices.number() % 2
        return gzip.compress(fuzz.edited(CSV, choices), 1) if inside else fuzz.edited(whole, choices)

    fuzz.check(count, fuzz.made_by(packed), lambda data: read_all(memory_folder / "a.csv.gz", data))


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_jsonl(count, memory_folder):
    whole = b"\n".join(json.dumps(row).encode() for row in ROWS)

    def lines(choices: fuzz.Choices) -> bytes:
        if not choices.number() % 4:
            return fuzz.edited(whole, choices)
        return fuzz.changed_json(choices.of(ROWS), choices).replace(b"\n", b" ") + b"\n" + whole

    tables = fuzz.made_by(lines)
    fuzz.check(count, tables, lambda data: read_all(memory_folder / "a.jsonl", data))
    fuzz.check(fuzz.FEW, tables, lambda data: read_all(memory_folder / "a.json", data))


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_decisions(count, memory_folder):
    def act(data: bytes) -> None:
        (memory_folder / "decisions.csv").write_bytes(data)
        read_decisions(memory_folder / "decisions.csv")

    fuzz.check(count, fuzz.changed_bytes(DECISIONS), act)


def parquet_of(columns: dict, **options) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


HUB = {b"huggingface": json.dumps({"info": {"features": {"label": {"names": ["a"], "_type": "ClassLabel"}}}})}
PARQUET = {
    "image": pa.array([{"bytes": PNG, "path": "a.png"}, {"bytes": None, "path": "b.png"}] * 4),
    "caption": pa.array([["a", "b"], ["c"]] * 4),
    "group": pa.array([1, 2] * 4),
    "split": pa.array(["train", None] * 4),
    "label": pa.array([0, -1] * 4),
}
PARQUETS = [
    parquet_of(PARQUET),
    parquet_of(PARQUET, compression="zstd", use_dictionary=False, data_page_version="2.0"),
    parquet_of(
        {"image": ["a"] * 8, "caption": ["b"] * 8, "group": ["c"] * 8, "split": ["d"] * 8, "label": ["e"] * 8}
    ),
]
ODD_CELLS = [
    None,
    True,
    3,
    -(1 << 63),
    2.5,
    float("nan"),
    "x",
    "\0",
    "a" * 5000,
    b"\xff",
    PNG,
    [],
    ["a"],
    [None],
]
ODD_CELLS += [
    [["a"]],
    {"bytes": "text"},
    {"bytes": 1, "path": None},
    {"a": {"b": 1}},
    {"path": "a.png"},
    [{"a": 1}],
]


def table_of(cells: dict) -> bytes:
    columns = {name: pa.array([value] * 3) for name, value in cells.items()}
    table = pa.table(columns).replace_schema_metadata(HUB)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_parquet(count, memory_folder):
    def table(choices: fuzz.Choices) -> bytes:
        if choices.number() % 2:
            return fuzz.edited(choices.of(PARQUETS), choices)
        return table_of({name: choices.of(ODD_CELLS) for name in (*PARQUET, "other")})

    fuzz.check(count, fuzz.made_by(table), lambda data: read_all(memory_folder / "a.parquet", data))


def tar_of(format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        members = [("a.png", PNG), ("a.txt", b"one\ntwo\n"), ("a.json", json.dumps(ROWS[0]).encode())]
        members += [
            ("b/" + "long/" * 25 + "x.png", PNG),
            ("b/" + "long/" * 25 + "x.json", b'{"caption": "x"}'),
        ]
        for name, data in (*members, ("c.cls", b"1"), ("c.png", PNG)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            if format == tarfile.PAX_FORMAT:
                member.pax_headers = {"comment": "ä", "mtime": "1.5"}
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("d.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return buffer.getvalue()


def sparse_tar(size: bytes, pairs: bytes, version: str) -> bytes:
    """A tar with a sparse member in one of GNU's pax formats."""
    headers = {
        "0.0": {"GNU.sparse.size": size, "GNU.sparse.offset": b"0", "GNU.sparse.numbytes": pairs},
        "0.1": {"GNU.sparse.size": size, "GNU.sparse.map": pairs, "GNU.sparse.name": b"a.png"},
        "1.0": {"GNU.sparse.major": b"1", "GNU.sparse.minor": b"0", "GNU.sparse.realsize": size},
    }[version]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a.png")
        member.size = 1024
        member.pax_headers = {name: value.decode("latin-1") for name, value in headers.items()}
        archive.addfile(member, io.BytesIO((pairs + b"\n") * 2 + bytes(1024)))
    return buffer.getvalue()


TARS = [tar_of(format) for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)]
FIELDS = [
    (0, 100),
    (100, 8),
    (124, 12),
    (124, 12),
    (136, 12),
    (156, 1),
    (156, 1),
    (157, 100),
    (257, 8),
    (345, 155),
]
FIELDS += [(386, 12), (482, 1), (483, 12)]  # of GNU's sparse members
CONTENTS = [
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,
    b"77777777777\0",
    b"-1\0",
    b"",
    b"\0" * 12,
    b"x",
    b"../a.png",
    b"a\xff",
]
CONTENTS += [bytes([kind]) for kind in b"0123456LKSxgXV7"] + [
    b"00000001000\0",
    b"/etc/passwd",
    b"a.png",
    b"\x80" + b"\0" * 7,
]


def with_headers(seed: bytes, choices: fuzz.Choices) -> bytes:
    """A tar with up to four fields of headers replaced, and their sums right."""
    data = bytearray(seed)
    headers = [
        block for block in range(0, len(data) - 511, 512) if data[block + 257 : block + 262] == b"ustar"
    ]
    for _ in range(1 + choices.number() % 4):
        header, (start, size) = choices.of(headers), choices.of(FIELDS)
        content = choices.of([*CONTENTS, choices.number().to_bytes(2, "big")])
        data[header + start : header + start + size] = content[:size].ljust(size, b"\0")
        data[header + 148 : header + 156] = b" " * 8
        data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    return bytes(data)


NUMBERS = [b"2147483648", b"-1", b"x", b"", b"9" * 40, b"0,1,2", b"0,9", b"1", b"1e9", b"\xff"]


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_tar(count, memory_folder):
    def tar(choices: fuzz.Choices) -> bytes:
        kind = choices.number() % 4
        if not kind:
            return sparse_tar(choices.of(NUMBERS), choices.of(NUMBERS), choices.of(["0.0", "0.1", "1.0"]))
        return (fuzz.edited if kind == 1 else with_headers)(choices.of(TARS), choices)

    fuzz.check(count, fuzz.made_by(tar), lambda data: read_all(memory_folder / "a.tar", data))


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_json_and_texts_in_a_tar(count, memory_folder):
    def act(members: tuple[bytes, bytes]) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, data in zip(
                ("a.png", "a.json", "b.png", "b.txt"), (PNG, members[0], PNG, members[1]), strict=True
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        read_all(memory_folder / "a.tar", buffer.getvalue())

    ours = {"key": "0" * 16, "image": "a.png", "captions": ["a", "b"], "group": "g", "columns": {"n": 1}}
    seeds, text = (ours, *ROWS), "one\nzwei ä\n".encode()
    made = fuzz.made_by(
        lambda choices: (fuzz.changed_json(choices.of(seeds), choices), fuzz.edited(text, choices)), 60
    )
    fuzz.check(count, made, act)


@pytest.mark.parametrize("count", fuzz.COUNTS[:1])
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet", "a.txt"])
def test_a_folder_with_texts(count, name, memory_folder):
    (memory_folder / "a.png").write_bytes(PNG)
    seeds = {
        "metadata.csv": [CSV],
        "metadata.jsonl": [json.dumps(ROWS[0]).encode()],
        "metadata.parquet": PARQUETS,
    }

    def act(data: bytes) -> None:
        (memory_folder / name).write_bytes(data)
        for _ in read(str(memory_folder), Columns(image="image" if name != "a.txt" else "")):
            pass

    fuzz.check(count, fuzz.changed_bytes(*seeds.get(name, [b"one\ntwo\n"])), act)
