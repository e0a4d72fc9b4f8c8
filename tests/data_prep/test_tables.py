"""Tables as people have them: structs, class names, base64, delimiters, encodings, odd captions."""

import base64
import io
import json
import tarfile
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pytest
from conftest import call_here, noise_images, png
from PIL import Image
from pyarrow import parquet
from test_inputs import images_of, write

from data_prep.__main__ import main
from data_prep.build.pipeline import Checking, Parallelism, Reading, build
from data_prep.build.records import is_visible
from data_prep.errors import UserError
from data_prep.inputs.formats import format_of, read
from data_prep.inputs.rows import MAX_CHARACTERS, Columns
from data_prep.shards import Shards

ONE = Parallelism(1)


def jsonl(tmp_path, *cells, name="a.jsonl") -> str:
    return write(tmp_path, "".join(json.dumps(row) + "\n" for row in cells), name=name)


def parquet_of(path, metadata=None, **columns) -> str:
    table = pa.table(columns)
    parquet.write_table(table.replace_schema_metadata(metadata), path)
    return str(path)


def captions_of(source: str, **options) -> list[str]:
    """Captions, or reasons of rejection."""
    return [row.problem.reason if row.problem else row.caption for row in read(source, Columns(**options))]


def problems_of(source: str, **options) -> list[str]:
    return [row.problem.detail for row in read(source, Columns(**options)) if row.problem]


STRUCT = {"text": "cap 0", "lang": "en"}


def test_what_is_no_text_is_no_caption(tmp_path):
    cells = [STRUCT, True, float("nan"), 3, 2.5, [["nested"]], [1, "one"], [], None, "text", {}]
    path = jsonl(tmp_path, *({"image": "a", "caption": cell} for cell in cells))
    wrong = "caption is not text"
    assert captions_of(path) == [*[wrong] * 7, "one", "", "", "text", wrong]
    assert problems_of(path) == [
        "a struct with the fields 'text', 'lang'; choose one, for example --caption-column caption.text",
        "true; text must be a string",
        "NaN; text must be a string",
        "3; text must be a string",
        "2.5; text must be a string",
        "a list in a list",
        "1; text must be a string",
        "a struct with the fields none; choose one, for example --caption-column caption.FIELD",
    ]
    numbers = parquet_of(tmp_path / "n.parquet", image=["a", "b"], caption=[1.5, float("nan")])
    assert captions_of(numbers) == [wrong] * 2
    spark = parquet_of(tmp_path / "binary.parquet", image=["a", "b"], caption=[b"caf\xc3\xa9", b"caf\xe9"])
    assert captions_of(spark) == ["café", "bad UTF-8"]  # text that the schema does not declare as text


def test_a_field_of_a_struct_is_a_column(tmp_path):
    structs = [{"en": "a bell", "de": "eine Glocke"}, {"en": "a house", "de": None}]
    several = [[{"raw": "a"}, {"raw": "b"}], []]
    rows = [
        {"image": {"path": f"{number}.png"}, "caption": structs[number], "sentences": several[number]}
        for number in range(2)
    ]
    table = parquet_of(tmp_path / "a.parquet", **{name: [row[name] for row in rows] for name in rows[0]})
    for path in (jsonl(tmp_path, *rows), table):
        assert captions_of(path, caption="caption.en") == ["a bell", "a house"]
        assert captions_of(path, caption="caption.de") == ["eine Glocke", ""]
        assert captions_of(path, caption="sentences.raw") == ["a", "b", ""]
        named = [
            (row.image, row.group) for row in read(path, Columns("image.path", "caption.en", "caption.de"))
        ]
        assert named == [("0.png", "eine Glocke"), ("1.png", "")]
    with pytest.raises(
        UserError, match=r"'caption' has structs.*--caption-column .* caption\.en, caption\.de"
    ):
        captions_of(table)
    with pytest.raises(UserError, match=r"no field 'fr'; pass --caption-column .* caption\.en, caption\.de"):
        captions_of(table, caption="caption.fr")
    with pytest.raises(UserError, match=r"no column 'caption\.en'; it has 'image', 'caption'"):
        captions_of(write(tmp_path, "image,caption\na,b\n"), caption="caption.en")
    dotted = write(tmp_path, "image,caption.en\na,b\n")
    assert captions_of(dotted, caption="caption.en") == ["b"]
    grouped = jsonl(
        tmp_path,
        {"image": "a", "caption": "b", "group": STRUCT},
        {"image": "a", "caption": "b", "group": float("nan")},
    )
    assert [
        (row.group, row.problem and row.problem.reason) for row in read(grouped, Columns(group="group"))
    ] == [("", "group is not text"), ("", None)]


def test_class_names_of_the_schema_are_used(tmp_path):
    """As `datasets` stores them: CIFAR-10's captions are the names of its classes."""
    features = {"image": {"_type": "Image"}, "label": {"names": ["a plane", "a car"], "_type": "ClassLabel"}}
    path = parquet_of(
        tmp_path / "a.parquet",
        {b"huggingface": json.dumps({"info": {"features": features}}).encode()},
        image=[png(image) for image in noise(4)],
        label=[1, 0, -1, None],
        caption=["w", "x", "y", "z"],
    )
    assert captions_of(path, caption="label") == ["a car", "a plane", "", ""]
    columns = [row.columns for row in read(path, Columns(label="label"))]
    assert [row.label for row in read(path, Columns(label="label"))] == ["a car", "a plane", "", ""]
    assert columns == [""] * 4
    build([path], tmp_path / "out", parallelism=ONE)
    found = []
    for split in ("train", "val", "test"):
        if (tmp_path / "out" / split).is_dir() and list((tmp_path / "out" / split).glob("*.tar")):
            shards = Shards(tmp_path / "out", split)
            found += [shards.meta(number).get("columns", {}).get("label") for number in range(len(shards))]
    assert sorted(map(str, found)) == ["None", "None", "a car", "a plane"]


def noise(n: int) -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)) for _ in range(n)]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet"])
def test_images_in_base64(tmp_path, name):
    """As Chinese-CLIP and OFA store them: in either alphabet, with and without padding; and as data: URLs."""
    formats = ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]
    files = [png(image, format) for image, format in zip(noise(6), formats, strict=True)]
    texts = [base64.b64encode(files[0]).decode(), base64.urlsafe_b64encode(files[1]).decode().rstrip("=")]
    texts += [f"data:image/gif;base64,{base64.b64encode(files[2]).decode()}"]
    texts += [base64.b64encode(data).decode() for data in files[3:]]
    rows = [{"image": text, "caption": f"caption {number}"} for number, text in enumerate(texts)]
    if name == "a.jsonl":
        path = jsonl(tmp_path, *rows)
    elif name == "a.parquet":
        path = parquet_of(tmp_path / name, image=texts, caption=[row["caption"] for row in rows])
    else:
        sign = "\t" if name == "a.tsv" else ","
        quoted = [[f'"{text}"' if "," in text else text, f"caption {at}"] for at, text in enumerate(texts)]
        path = write(tmp_path, "\n".join(map(sign.join, [["image", "caption"], *quoted])), name=name)
    assert [row.data for row in read(path, Columns())] == files
    assert build([path], tmp_path / "out", parallelism=ONE)["images"] == 6
    assert {f"caption {number}" for number in range(6)} == {
        caption for captions in images_of(tmp_path / "out").values() for caption in captions
    }


def test_a_string_that_is_no_image_is_named_without_printing_it(tmp_path):
    long = "x" * 5000
    images = [long, "data:image/png;base64,???" + long, ["a.png", "b.png"], "https://host/" + long]
    path = jsonl(tmp_path, *({"image": image, "caption": "a"} for image in images))
    rows = list(read(path, Columns()))
    reasons = ["image is not a path", "broken data: URL", "image is not a path", None]
    assert [row.problem and row.problem.reason for row in rows] == reasons
    assert "5,000 characters that are neither a path nor the base64 of an image" in rows[0].problem.detail
    assert max(len(row.image) for row in rows[:3]) < 50
    headerless = write(tmp_path, f"1000002\t{base64.b64encode(png(noise(1)[0])).decode()}\n", name="imgs.tsv")
    with pytest.raises(UserError, match="put a line with the names of the columns before it") as raised:
        list(read(headerless, Columns()))
    assert len(str(raised.value)) < 400


def test_data_urls_of_each_kind(tmp_path):
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="100%"/>'
    gif = base64.b64encode(png(noise(1)[0], "GIF")).decode()
    read_as = {
        f"data:image/svg+xml;utf8,{svg}": svg.encode(),
        f"data:image/svg+xml,{quote(svg)}": svg.encode(),
        f"DATA:image/gif;BASE64,{quote(gif)}": base64.b64decode(gif),
        "data:image/png;base64,AAAA": bytes(3),  # short; no image, which the check of images says
    }
    broken = {
        "data:image/png;base64,A": "23 characters: its base64 is damaged",
        "data:image/png;base64,": "it holds no bytes",
        "data:,": "it holds no bytes",
        "data:image/png;base64": "it has no comma before its data",
    }
    images = [*read_as, *broken]
    rows = list(read(jsonl(tmp_path, *({"image": image, "caption": "a"} for image in images)), Columns()))
    assert [row.data for row in rows] == [*read_as.values(), *[None] * len(broken)]
    for row, words in zip(rows[len(read_as) :], broken.values(), strict=True):
        assert row.problem.reason == "broken data: URL"
        assert row.problem.detail.endswith(words)


@pytest.mark.parametrize("sign", ["\t", ";", "|", ","])
def test_the_delimiter_is_the_one_that_the_header_shows(tmp_path, sign):
    """open_clip's own csv files are separated by tabs, those of Excel in Europe by semicolons."""
    path = write(tmp_path, f"filepath{sign}title\na.png{sign}one\n")
    assert [(row.image, row.caption) for row in read(path, Columns("filepath", "title"))] == [
        ("a.png", "one")
    ]
    with pytest.raises(
        UserError, match=r"it has 'filepath', 'title'; pass --image-column filepath --caption-column title"
    ):
        list(read(path, Columns()))
    with pytest.raises(UserError, match=r"no column 'image', 'caption'; it has .*--delimiter"):
        list(read(path, Columns(), "~"))
    quoted = write(tmp_path, f'"image"{sign}"caption"{sign}"a, b; c"\na.png{sign}"one{sign} two"{sign}\n')
    assert captions_of(quoted) == [f"one{sign} two"]


def test_json_lines_under_other_names(tmp_path):
    rows = [{"image": "a.png", "caption": "one"}, {"image": "b.png", "caption": "two"}]
    assert captions_of(jsonl(tmp_path, *rows, name="a.json")) == ["one", "two"]
    for text in (json.dumps(rows), json.dumps(rows, indent=1), json.dumps({"images": rows}, indent=2)):
        for name in ("b.json", "b.csv", "b"):
            with pytest.raises(UserError, match="one JSON document; only JSON Lines are read"):
                captions_of(write(tmp_path, text, name=name))
    with pytest.raises(UserError, match=r"is JSON Lines; name it \.jsonl"):
        captions_of(jsonl(tmp_path, *rows, name="a.txt"))
    with pytest.raises(UserError, match=r"no column 'label'; it has 'image', 'caption'; pass --label-column"):
        captions_of(jsonl(tmp_path, *rows), label="label")
    assert captions_of(write(tmp_path, "[" * 100_000, name="deep.jsonl")) == ["malformed row"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.xlsx", "is a spreadsheet; save it as CSV UTF-8"),
        ("a.tgz", r"is a compressed tar; name it \.tar\.gz"),
        ("a.zip", "is an archive; unpack it"),
        ("a.pkl", "is not read; write its rows to"),
        ("a.PNG", "is an image; pass a table"),
    ],
)
def test_formats_that_are_not_read_get_a_sentence(tmp_path, name, words):
    with pytest.raises(UserError, match=words):
        format_of(write(tmp_path, "", name=name))
    result = call_here(main, "build", tmp_path / name, "--out", tmp_path / "out")
    assert result.stderr.startswith(f"error: {tmp_path / name}: is a") or "is not read" in result.stderr


def test_another_format_under_the_name_of_a_csv_is_named(tmp_path):
    for start, words in (
        (b"PK\x03\x04\x14\0", "zip or Excel"),
        (b"\x1f\x8b\x08\0", "compressed"),
        (b"PAR1\x15", "Parquet"),
    ):
        (tmp_path / "a.csv").write_bytes(start + bytes(range(256)))
        with pytest.raises(UserError, match=words):
            captions_of(str(tmp_path / "a.csv"))


def test_a_byte_order_mark_is_no_part_of_utf8(tmp_path):
    for name, text in (
        ("a.csv", "image,caption\na,one\n"),
        ("a.jsonl", '{"image": "a", "caption": "one"}\n'),
    ):
        path = write(tmp_path, text, "utf-8-sig", name)
        assert [row.caption for row in read(path, Columns(), encoding="UTF8")] == ["one"]


def test_text_that_is_too_long_is_a_reject(tmp_path):
    long = "x" * (MAX_CHARACTERS + 1)
    rows = [
        {"image": f"{number}.png", "caption": text}
        for number, text in enumerate(("a", long, "b" * MAX_CHARACTERS))
    ]
    csv = write(tmp_path, "image,caption\n" + "".join(f"{row['image']},{row['caption']}\n" for row in rows))
    for path in (csv, jsonl(tmp_path, *rows)):
        assert captions_of(path) == ["a", "text too long", "b" * MAX_CHARACTERS]
        assert problems_of(path) == ["its caption has 131,073 characters; at most 131,072"]
    noise_images(tmp_path, 3)
    report = build([csv], tmp_path / "out", check=Checking(max_rejects=0.5), parallelism=ONE)
    assert (report["records"], report["reasons"]) == (2, {"text too long": 1})


def test_captions_that_cannot_be_seen_are_empty(tmp_path):
    assert [is_visible(text) for text in ("\u200b", "\ufeff\u2060 \u200d", "\u00ad", "\u0007", "")] == [
        False
    ] * 5
    assert [is_visible(text) for text in ("a\u200b", "→", "🙂", "\ue000", "字", "-")] == [True] * 6
    noise_images(tmp_path, 4)
    rows = [{"image": "0.png", "caption": "seen"}, {"image": "1.png", "caption": "\u200b\u200d"}]
    rows += [
        {"image": "2.png", "caption": "NUL \0 in it"},
        {"image": "3.png", "caption": "ok", "group": "a\0b"},
    ]
    path = jsonl(tmp_path, *rows)
    report = build(
        [path], tmp_path / "out", Reading(group_column="group"), Checking(max_rejects=0.9), parallelism=ONE
    )
    assert report["reasons"] == {"NUL character": 2, "empty caption": 1}
    rejects = (tmp_path / "out" / "rejects.csv").read_text()
    assert "only U+200B, U+200D" in rejects
    assert "in its caption after 'NUL '" in rejects


TEXTS = {  # bytes of a .txt, its encoding, its captions
    "latin-1": (b"caf\xe9\r\nna\xefve \x85 more\n\n", ["café", "naïve \x85 more"]),
    "utf-16": ("über\nzwei\n".encode("utf-16"), ["über", "zwei"]),
    "utf-8-sig": ("\ufeffein\u2028s\rzwei".encode(), ["ein\u2028s", "zwei"]),
}


@pytest.mark.parametrize("encoding", TEXTS)
def test_a_txt_means_the_same_in_a_folder_and_in_a_tar(tmp_path, encoding):
    data, captions = TEXTS[encoding]
    image = png(noise(1)[0])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(image)
    (tmp_path / "set" / "a.txt").write_bytes(data)
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for name, content in (("a.png", image), ("a.txt", data)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    for source in ("set", "set.tar"):
        rows = list(read(str(tmp_path / source), Columns(), encoding=encoding))
        assert [row.caption for row in rows] == captions
        assert not any(row.problem for row in rows)
        if encoding != "utf-8-sig":
            reasons = [row.problem.reason for row in read(str(tmp_path / source), Columns())]
            assert reasons[0] == "bad UTF-8"
        ascii = [row.problem.reason for row in read(str(tmp_path / source), Columns(), encoding="ascii")]
        assert ascii == ["bad encoding"]
    out = build([str(tmp_path / "set")], tmp_path / "out", Reading(encoding=encoding), parallelism=ONE)
    assert out["records"] == 2
    with pytest.raises(UserError, match="--encoding must be one that Python knows"):
        list(read(str(tmp_path / "set"), Columns(), encoding="base64"))


def test_a_caption_with_line_breaks_of_img2dataset_is_one(tmp_path):
    members = {"a.png": png(noise(1)[0]), "a.txt": b"two\nlines", "a.json": b'{"caption": "two\\nlines"}'}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert captions_of(str(tmp_path / "a.tar")) == ["two\nlines"]


def test_many_lines_of_a_txt_are_asked_about(tmp_path, capsys):
    """As tuxpaint's stamps: the first line is English, 70 translations follow."""
    folder = tmp_path / "stamps"
    folder.mkdir()
    noise_images(folder, 3)
    for number in range(3):
        lines = [f"caption {number} in language {language}" for language in range(70)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    with pytest.raises(
        UserError,
        match=r"0\.txt: 70 lines \(the second: 'caption 0 in .*--captions-per-txt 1 .* --captions-per-txt 70",
    ):
        build([str(folder)], tmp_path / "out", parallelism=ONE)
    report = build([str(folder)], tmp_path / "out", Reading(captions_per_txt=1), parallelism=ONE)
    assert (report["records"], report["images"]) == (3, 3)
    capsys.readouterr()
    report = build([str(folder)], tmp_path / "all", Reading(captions_per_txt=70), parallelism=ONE)
    assert report["records"] == 210
    assert "each line of a .txt is a caption: 210 captions of 3 images" in capsys.readouterr().out
