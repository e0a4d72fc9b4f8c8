"""Every kind of input gives the same rows; every row is a record or a reject with its line."""

import gzip
import io
import json
import tarfile

import numpy as np
import pandas as pd
import pytest
from conftest import noise_images, png, tars
from PIL import Image

from data_prep.build.pipeline import Checking, Parallelism, Reading, build
from data_prep.build.split import SPLITS
from data_prep.errors import UserError
from data_prep.inputs.formats import read
from data_prep.inputs.rows import Columns
from data_prep.shards import Shards

PLAIN = Columns("file", "caption")


def write(tmp_path, text, encoding="utf-8", name="a.csv"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return str(path)


def images_of(out) -> dict[str, tuple]:
    """Image bytes -> captions, over all splits: what is in, whatever its name."""
    found = {}
    for split in SPLITS:
        if json.loads((out / "manifest.json").read_text())["splits"][split]["samples"]:
            shards = Shards(out, split)
            found |= {sample.image: sample.captions for sample in map(shards.read, range(len(shards)))}
    return found


def test_cells_are_text_and_lines_are_the_files(tmp_path):
    path = write(
        tmp_path, 'file,caption\na.png,null\n\nb.png,"two\nlines"\nc.png,NA\n"d.png",\n007.png,1.50\ne.png\n'
    )
    rows = [(row.line, row.image, row.caption) for row in read(path, PLAIN)]
    assert rows == [
        (2, "a.png", "null"),
        (4, "b.png", "two\nlines"),
        (6, "c.png", "NA"),
        (7, "d.png", ""),
        (8, "007.png", "1.50"),
        (9, "e.png", ""),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_and_encodings(tmp_path, encoding, delimiter):
    path = write(tmp_path, f"caption{delimiter}file\nCafé{delimiter}a.png\n", encoding)
    read_as = "utf-8-sig" if encoding.startswith("utf-8") else encoding
    assert [(row.caption, row.image) for row in read(path, PLAIN, delimiter, read_as)] == [("Café", "a.png")]


def test_defaults_by_name(tmp_path):
    assert next(read(write(tmp_path, "file\tcaption\na,b\tc\n", name="a.tsv"), PLAIN)).image == "a,b"
    assert next(read(write(tmp_path, "file\tcaption\na,b\tc\n"), PLAIN, "\\t")).image == "a,b"
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"file,caption\na.png,b\n"))
    assert next(read(str(tmp_path / "a.csv.gz"), PLAIN)).caption == "b"


def test_other_columns_are_kept(tmp_path):
    (row,) = read(write(tmp_path, "file,caption,label,empty\na.png,b,7,\n"), PLAIN)
    assert json.loads(row.columns) == {"label": "7"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("file,caption,caption\na,b,c\n", "'caption' more than once"),
        ("file,text\na,b\n", "no column 'caption'; it has 'file', 'text'"),
        (
            'file,caption\na.png,"never closed\nb.png,b\n',
            r"a\.csv:2: .*unexpected end of data.*quote captions",
        ),
        ('file,caption\na.png,b\nc.png,"x" y\n', r"a\.csv:3: .*double the quotes"),
    ],
)
def test_a_csv_that_cannot_be_used_is_explained(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        list(read(write(tmp_path, text), PLAIN))


def test_an_encoding_that_does_not_fit_is_said_with_line_and_byte(tmp_path):
    with pytest.raises(
        UserError, match=r"a\.csv:1: the header is not utf-8-sig; pass --encoding, for example utf-16"
    ):
        list(read(write(tmp_path, "file,caption\na,b\n", "utf-16"), PLAIN))
    text = "file,caption\n" + "a.png,plain\n" * 9000 + "a.png,Café\n"
    path = write(tmp_path, text, "latin-1")
    with pytest.raises(UserError, match=rf":9002: byte {text.index('é')} of the file is not ascii"):
        list(read(path, PLAIN, encoding="ascii"))
    with pytest.raises(UserError, match=r":2: byte 28 of the file is not utf-16"):
        list(read(_odd_utf16(tmp_path), PLAIN, encoding="utf-16"))
    with pytest.raises(UserError, match="unknown encoding"):
        list(read(path, PLAIN, encoding="utf-99"))
    rejects = [row for row in read(path, PLAIN) if row.problem]
    assert [(row.line, row.problem[0]) for row in rejects] == [(9002, "bad UTF-8")]
    assert r"byte b'\xe9' after 'Caf'" in rejects[0].problem[1]


def _odd_utf16(tmp_path) -> str:
    path = tmp_path / "odd.csv"
    path.write_bytes("file,caption\n".encode("utf-16") + b"\x00\xdc" + "a,b\n".encode("utf-16-le"))
    return str(path)


def test_a_missing_input_and_a_wrong_delimiter_are_explained(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        list(read(str(tmp_path / "none.csv"), PLAIN))
    with pytest.raises(UserError, match="--delimiter '::'"):
        list(read(write(tmp_path, "file,caption\na,b\n"), PLAIN, "::"))
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        list(read(write(tmp_path, "PAR1", name="a.parquet"), PLAIN))
    with pytest.raises(UserError, match=r"a\.tar: cannot be read"):
        list(read(write(tmp_path, "no tar", name="a.tar"), PLAIN))


def test_every_format_gives_the_same_shards(tmp_path):
    """One set as CSV, TSV, JSONL with lists, Parquet with paths: the same tars, byte for byte."""
    path = noise_images(tmp_path, 24)
    rows = pd.read_csv(path, dtype=str).fillna("")
    second = rows[:5].assign(caption="another " + rows.caption[:5])
    rows = pd.concat([rows, second])
    rows.to_csv(tmp_path / "a.csv", index=False)
    rows.to_csv(tmp_path / "b.tsv", index=False, sep="\t")
    rows.to_parquet(tmp_path / "c.parquet")
    lists = rows.groupby("image", sort=False).agg({"caption": list, "group": "first"}).reset_index()
    lists.to_json(tmp_path / "d.jsonl", orient="records", lines=True)
    lists.to_parquet(tmp_path / "e.parquet")
    rows[:10].to_csv(tmp_path / "f.csv", index=False)
    rows[10:].to_json(tmp_path / "g.jsonl", orient="records", lines=True)
    made = []
    for names in ("a.csv", "b.tsv", "c.parquet", "d.jsonl", "e.parquet", "f.csv g.jsonl"):
        out = tmp_path / names.replace(" ", "_").replace(".", "_")
        report = build([str(tmp_path / name) for name in names.split()], out, parallelism=Parallelism(1))
        assert (report["rows"], report["records"], report["images"]) == (29, 29, 24), names
        made.append(tars(out))
    assert all(other == made[0] for other in made)


def hub_parquet(path, n=12, seed=1):
    """As image data sets on the Hugging Face hub are stored: a struct of bytes and path, and captions in a
    list.
    """
    rng = np.random.default_rng(seed)
    images = [png(Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))) for _ in range(n)]
    rows = {"image": [{"bytes": data, "path": f"{at}.png"} for at, data in enumerate(images)]}
    pd.DataFrame(
        {**rows, "text": [[f"photo {at}", f"image {at}"] for at in range(n)], "label": range(n)}
    ).to_parquet(path)
    return {data: [f"photo {at}", f"image {at}"] for at, data in enumerate(images)}


def test_parquet_with_images_inside(tmp_path):
    expected = hub_parquet(tmp_path / "train-00000-of-00001.parquet")
    report = build(
        [str(tmp_path / "train-00000-of-00001.parquet")],
        tmp_path / "out",
        Reading(caption_column="text"),
        parallelism=Parallelism(2),
    )
    assert (report["rows"], report["images"]) == (24, 12)
    assert images_of(tmp_path / "out") == expected
    sample = Shards(tmp_path / "out", "train").read(0)
    assert sample.captions == [f"{word} {sample.meta['columns']['label']}" for word in ("photo", "image")]


def test_bad_rows_of_jsonl_and_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    lines = [
        '{"file": "a", "caption": "b"}',
        "{oops",
        "[1]",
        "",
        '{"file": "a", "caption": []}',
        '{"file": null, "caption": 3}',
        r'{"file": "\ud800", "caption": "x"}',
    ]
    rows = list(read(write(tmp_path, "\n".join(lines), name="a.jsonl"), PLAIN))
    assert [(row.line, row.image, row.caption, (row.problem or [""])[0]) for row in rows] == [
        (1, "a", "b", ""),
        (2, "", "", "malformed row"),
        (3, "", "", "malformed row"),
        (5, "a", "", ""),
        (6, "", "", "caption is not text"),
        (7, "\ud800", "x", "bad UTF-8"),
    ]
    sources = [
        write(tmp_path, "\n".join(lines).replace("file", "image"), name="a.jsonl"),
        str(noise_images(tmp_path, 3)),
    ]
    report = build(sources, tmp_path / "out", check=Checking(max_rejects=0.9), parallelism=Parallelism(1))
    assert report["reasons"] == {
        "malformed row": 2,
        "missing file": 1,
        "empty caption": 1,
        "caption is not text": 1,
        "bad UTF-8": 1,
    }
    broken = pyarrow.array([b"good", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"file": ["a", "b"], "caption": broken}), tmp_path / "a.parquet")
    assert [(row.line, (row.problem or [""])[0]) for row in read(str(tmp_path / "a.parquet"), PLAIN)] == [
        (1, ""),
        (2, "bad UTF-8"),
    ]


def test_a_folder_with_texts_beside_the_images(tmp_path):
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    noise_images(folder, 3)
    (folder / "2.png").rename(folder / "sub" / "2.png")
    (folder / "0.txt").write_text("zero\nnought\n")
    (folder / "sub" / "2.txt").write_text("two")
    report = build(
        [str(folder)], tmp_path / "out", check=Checking(max_rejects=0.5), parallelism=Parallelism(1)
    )
    assert (report["rows"], report["reasons"]) == (4, {"no caption file": 1})
    assert sorted(images_of(tmp_path / "out").values()) == [["two"], ["zero", "nought"]]


def tar_of(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            else:
                member.type, member.linkname = tarfile.SYMTYPE, data
                archive.addfile(member)
    return str(path)


def foreign_members(n=8):
    rng = np.random.default_rng(2)
    images = [png(Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))) for _ in range(n)]
    members = []
    for at, data in enumerate(images):  # as img2dataset names them
        meta = {
            "caption": f"thing {at}",
            "url": f"https://host/{at}",
            "key": f"{at:09d}",
            "status": "success",
        }
        members += [
            (f"{at:09d}.png", data),
            (f"{at:09d}.txt", meta["caption"].encode()),
            (f"{at:09d}.json", json.dumps(meta).encode()),
        ]
    return members, {data: [f"thing {at}"] for at, data in enumerate(images)}


def test_tars_of_others_are_an_input(tmp_path):
    members, expected = foreign_members()
    good = members[1][1], members[0][1]
    members += [
        ("../../escape.png", members[0][1]),
        ("../../escape.txt", b"leaves"),
        ("/etc/evil.png", members[0][1]),
        ("/etc/evil.txt", b"absolute"),
        ("link.png", "/etc/passwd"),
        ("link.txt", b"a link"),
        ("caf\udce9/../x.png", members[0][1]),
        ("text.txt", b"no image"),
        ("000000000.cls", b"1"),  # back again: not adjacent
        ("Cancel_20.5.png", members[3][1]),
        ("Cancel_20.5.txt", b"a dot in its name"),
        ("wordless.png", members[6][1]),
    ]
    path = tar_of(tmp_path / "00000.tar", members)
    report = build([path], tmp_path / "out", check=Checking(max_rejects=0.9), parallelism=Parallelism(1))
    assert report["reasons"] == {
        "path outside of the tar": 3,
        "not a regular file": 1,
        "members not adjacent": 1,
        "empty caption": 1,
    }
    assert report["ignored"] == {"no image beside it": 1}
    assert report["rows"] == report["records"] + 6 == 15
    assert "../../escape" in (tmp_path / "out" / "rejects.csv").read_text()
    assert not (tmp_path / "escape.png").exists()
    found = images_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert found[good[1]] == ["thing 0"]
    assert sorted(found[members[3][1]]) in (["a dot in its name"], ["thing 1"])  # two samples with one image
