"""A weight for each pair, and captions of several columns: into the shards and out of them."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
import webdataset
from conftest import assert_mistake, call_here, noise_images, tars
from pyarrow import parquet

from data_prep.__main__ import main
from data_prep.atomic import write_json
from data_prep.build.decisions import Decision, write_decisions
from data_prep.build.pipeline import Checking, Parallelism, Reading, Splitting, build, index
from data_prep.errors import UserError
from data_prep.inputs.formats import read
from data_prep.inputs.rows import Columns
from data_prep.shards import Member, Sample, Shards, parse_meta, read_manifest, write_shard

ONE, ALL_TRAIN, LENIENT = Parallelism(1), Splitting(0, 0), Checking(max_rejects=1)
HEADER = ["image", "caption", "weight"]


def table(folder: Path, header: list[str], *rows: list, n: int = 4) -> str:
    """A CSV beside n images."""
    noise_images(folder, n)
    with open(folder / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(folder / "a.csv")


def built(source: str, out: Path, split: Splitting = ALL_TRAIN, check: Checking = LENIENT, **reading) -> Path:
    build([source], out, Reading(**reading), check, split, ONE, min_shards=1)
    return out


def samples_of(shards: Path) -> dict[str, Sample]:
    found = Shards(shards, "train")
    return {sample.path: sample for sample in map(found.read, range(len(found)))}


def reasons_of(out: Path) -> list[tuple[str, str, str]]:
    with open(out / "rejects.csv", newline="") as file:
        return [(row["line"], row["reason"], row["detail"]) for row in csv.DictReader(file)]


def test_a_weight_for_each_caption_is_in_the_shards(tmp_path):
    rows = [["0.png", "a", "2"], ["0.png", "b", "0.5"], ["1.png", "c", ""], ["2.png", "d", " 1e-3 "]]
    out = built(
        table(tmp_path, HEADER, *rows, ["3.png", "e", "-0"]), tmp_path / "out", weight_column="weight"
    )
    found = {path: (sample.captions, sample.weights) for path, sample in samples_of(out).items()}
    assert found == {
        "0.png": (["a", "b"], [2.0, 0.5]),
        "1.png": (["c"], [1.0]),
        "2.png": (["d"], [0.001]),
        "3.png": (["e"], [0.0]),
    }
    assert Shards(out, "train").weight_range == (0.0, 2.0)
    assert all("weight" not in sample.meta.get("columns", {}) for sample in samples_of(out).values())
    tar = next(out.glob("train/*.tar"))
    for sample in webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False).decode():
        captions, weights = found[sample["json"]["image"]]
        assert (sample["json"]["captions"], sample["json"]["weights"]) == (captions, weights)


def test_weights_of_0_are_counted(tmp_path, capsys):
    rows = [["0.png", "a", 0], ["0.png", "b", 2], ["1.png", "c", 0], ["1.png", "d", "0.0"], ["2.png", "e", 1]]
    source = table(tmp_path, HEADER, *rows)
    built(source, tmp_path / "out", weight_column="weight")
    words = "  weights: 3 captions of 0, which teach nothing; 1 image with no other\n"
    assert words in capsys.readouterr().out
    built(source, tmp_path / "without")
    assert "weights:" not in capsys.readouterr().out


def test_without_weights_the_shards_say_nothing_of_them(icon_shards):
    shards = Shards(icon_shards, "train")
    assert shards.weight_range == (1.0, 1.0)
    sample = shards.read(0)
    assert "weights" not in sample.meta
    assert "weights" not in read_manifest(icon_shards)["splits"]["train"]
    assert sample.weights == [1.0] * len(sample.captions)


BAD = ["1_000", "٣", "-1", "nan", "inf", "1,5", "heavy", "1e999"]


def test_a_bad_weight_is_a_reject_with_its_line(tmp_path):
    rows = [[f"{number % 4}.png", f"c{number}", weight] for number, weight in enumerate(BAD)]
    out = built(
        table(tmp_path, HEADER, *rows, ["0.png", "good", 3]), tmp_path / "out", weight_column="weight"
    )
    must = ", but must be a finite number from 0, or empty for 1"
    hints = {"1,5": "; write 1.5, with a decimal point"}
    expected = [
        (str(line), "invalid weight", f"it is {weight!r}{must}{hints.get(weight, '')}")
        for line, weight in enumerate(BAD, start=2)
    ]
    assert reasons_of(out) == expected
    assert {path: sample.weights for path, sample in samples_of(out).items()} == {"0.png": [3.0]}
    with pytest.raises(UserError, match=r"8 of 9 rows cannot be used.*\n +8 x invalid weight"):
        built(str(tmp_path / "a.csv"), tmp_path / "strict", check=Checking(), weight_column="weight")


def test_a_wrong_column_is_named_with_its_option(tmp_path):
    source = table(
        tmp_path, [*HEADER, "source", "part"], *([f"{n}.png", f"c{n}", 1, "web", "a"] for n in range(4))
    )
    for option, column, reason in ("weight", "source", "invalid weight"), ("split", "part", "unknown split"):
        words = f"none of the 4 rows.*pass another --{option}-column: most rows have an {reason} there"
        with pytest.raises(UserError, match=f"(?s){words}"):
            built(source, tmp_path / "out", **{f"{option}_column": column})
    with pytest.raises(UserError) as caught:
        built(source.replace("a.csv", "pairs.csv"), tmp_path / "out", image_column="caption")
    assert "-column" not in str(caught.value)


def test_a_repeated_row_of_another_weight_is_a_reject_that_counts(tmp_path):
    rows = [["0.png", "a", "2"], ["0.png", "a", "2.0"], ["0.png", "a", "3"], ["1.png", "b", ""]]
    source = table(tmp_path, HEADER, *rows)
    out = built(source, tmp_path / "out", weight_column="weight")
    assert reasons_of(out) == [
        ("3", "duplicate row", "an earlier row has the same image and caption"),
        ("4", "conflicting weights", "3 here, 2 before"),
    ]
    with pytest.raises(UserError, match=r"1 of 4 rows cannot be used"):
        built(source, tmp_path / "strict", check=Checking(), weight_column="weight")


def weights_of(source: str) -> list:
    return [
        row.problem.detail.partition(", but")[0].removeprefix("it is ") if row.problem else row.weight
        for row in read(source, Columns(weight="weight"))
    ]


def test_weights_of_other_formats_are_numbers(tmp_path):
    cells = [2, 0.5, "3", None, "", True, float("nan"), [1], {"a": 1}, 10**400, -0.0]
    lines = [json.dumps({"image": "a", "caption": "b", "weight": cell}) for cell in cells[:9]]
    lines += ['{"image": "a", "caption": "b", "weight": -0.0}', '{"image": "a", "caption": "b"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    numbers = [2.0, 0.5, 3.0, 1.0, 1.0, "'True'", "'nan'", "'[1]'", "\"{'a': 1}\"", 0.0, 1.0]
    assert weights_of(str(tmp_path / "a.jsonl")) == numbers
    columns = {"image": ["a"] * 4, "caption": ["b"] * 4, "weight": [2.0, None, float("nan"), 1e300]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert weights_of(str(tmp_path / "a.parquet")) == [2.0, 1.0, "'nan'", 1e300]


def test_a_missing_column_is_named_with_its_option(tmp_path):
    source = table(tmp_path, ["image", "caption"], ["0.png", "a"])
    with pytest.raises(UserError, match=r"no column 'w'; it has 'image', 'caption'; pass --weight-column"):
        built(source, tmp_path / "out", weight_column="w")
    with pytest.raises(UserError, match=r"no column 'name', 'words'; .* pass --caption-column"):
        built(source, tmp_path / "out", caption_column="name,words")


WIDE = ["image", "name", "synonyms", "sentence", "group"]
WIDE_ROWS = [
    ["0.png", "home", "house, building", "A small  home.", "g"],
    ["1.png", "star", "", "", "h"],
    ["2.png", "", " ", "A moon.", "i"],
    ["3.png", "sun", "sun", "The sun.", "j"],
    ["0.png", "home", "a hut", "", "g"],
]


def test_each_column_of_captions_gives_a_caption(tmp_path):
    source = table(tmp_path, WIDE, *WIDE_ROWS, ["1.png", "", "", "", "h"])
    out = built(source, tmp_path / "out", caption_column="name, synonyms,sentence", group_column="group")
    assert {path: each.captions for path, each in samples_of(out).items()} == {
        "0.png": ["home", "house, building", "A small home.", "a hut"],
        "1.png": ["star"],
        "2.png": ["A moon."],
        "3.png": ["sun", "The sun."],
    }
    assert [(line, reason) for line, reason, _ in reasons_of(out)] == [
        ("6", "duplicate row"),
        ("7", "empty caption"),
    ]


def test_pairs_are_counted_as_pairs_and_their_rejects_are_told_apart(tmp_path, capsys):
    source = table(
        tmp_path, WIDE, *WIDE_ROWS[:4], ["none.png", "x", "y", "", "k"], ["gone.png", "z", "", "", ""]
    )
    reading = Reading(caption_column="name,synonyms,sentence")
    report = build([source], tmp_path / "out", reading, LENIENT, ALL_TRAIN, ONE)
    assert (report["rows"], report["lines"], report["records"], report["rejects"]) == (10, 6, 7, 3)
    words = "10 pairs of image and caption (from 6 rows)"
    assert f"{words} = 7 records + 3 rejects" in capsys.readouterr().out
    with open(tmp_path / "out" / "rejects.csv", newline="") as file:
        rejects = [(row["line"], row["path"], row["caption"]) for row in csv.DictReader(file)]
    assert rejects == [("6", "none.png", "x"), ("6", "none.png", "y"), ("7", "gone.png", "z")]
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"3 of {words} were rejected" in page
    assert [page.count(f"<figcaption>line {line}") for line in (6, 7)] == [1, 1]  # an example of each row
    with pytest.raises(UserError, match=r"3 of 10 pairs of image and caption \(from 6 rows\) cannot be used"):
        build([source], tmp_path / "strict", reading, Checking(), ALL_TRAIN, ONE)


def test_what_is_no_text_in_one_of_several_columns_is_a_reject(tmp_path):
    lines = [
        {"image": "a", "name": "3", "words": [3, "3", None]},
        {"image": "b", "name": "", "words": {"en": "x"}},
        {"image": "c", "name": None, "words": float("nan")},
        {"image": "d", "words": ["x", "y", "x"]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = [
        (row.image, row.problem.reason if row.problem else row.caption)
        for row in read(str(tmp_path / "a.jsonl"), Columns(caption="name,words"))
    ]
    assert found == [
        ("a", "3"),
        ("a", "caption is not text"),
        ("b", "caption is not text"),
        ("c", ""),
        ("d", "x"),
        ("d", "y"),
    ]


def test_the_columns_of_a_wide_table_give_the_captions_of_a_long_one(tmp_path):
    """Order and samples of training too, which are by the numbers of rows."""
    wide = [["0.png", "home", "house", "g"], ["1.png", "star", "", "h"], ["2.png", "moon", "luna", "g"]]
    source = table(tmp_path, ["image", "name", "words", "group"], *wide)
    one = built(source, tmp_path / "wide", caption_column="name,words", group_column="group")
    long = [[image, text, group] for image, *texts, group in wide for text in texts if text]
    two = built(
        table(tmp_path, ["image", "caption", "group"], *long), tmp_path / "long", group_column="group"
    )
    a, b = Shards(one, "train"), Shards(two, "train")
    assert a.groups.tolist() == b.groups.tolist()
    for number in range(3):
        assert a.read(number).meta == b.read(number).meta


def test_columns_and_weights_of_a_tars_json(tmp_path):
    noise_images(tmp_path, 3)
    metas = [
        {"name": "home", "words": ["house", "hut"], "weight": 2},
        {"name": "star", "weight": "x"},
        {"weight": 3},
    ]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, meta in enumerate(metas):
            texts = {"json": json.dumps(meta).encode(), "png": (tmp_path / f"{number}.png").read_bytes()}
            if number == 2:
                texts["txt"] = b"moon"
            for extension, data in texts.items():
                about = tarfile.TarInfo(f"{number}.{extension}")
                about.size = len(data)
                archive.addfile(about, io.BytesIO(data))
    reading = {"caption_column": "name,words", "weight_column": "weight"}
    out = built(str(tmp_path / "a.tar"), tmp_path / "out", **reading)
    assert {path: (each.captions, each.weights) for path, each in samples_of(out).items()} == {
        "a.tar/0": (["home", "house", "hut"], [2.0] * 3),
        "a.tar/2": (["moon"], [3.0]),
    }
    assert [reason for _, reason, _ in reasons_of(out)] == ["invalid weight"]


def test_our_own_tars_keep_weights(tmp_path):
    rows = [["0.png", "home", "house", 2], ["1.png", "star", "", ""], ["2.png", "moon", "luna", 0]]
    source = table(tmp_path, ["image", "name", "words", "weight"], *rows)
    first = built(source, tmp_path / "first", caption_column="name,words", weight_column="weight")
    tar = str(next(first.glob("train/*.tar")))
    again = built(tar, tmp_path / "again")
    assert tars(again) == tars(first)
    assert tars(built(tar, tmp_path / "weighted", weight_column="weight")) == tars(first)
    index([tar], tmp_path / "index", split=ALL_TRAIN, parallelism=ONE)
    entries = [read_manifest(shards)["splits"]["train"] for shards in (first, again, tmp_path / "index")]
    assert entries[0]["weights"] == [0.0, 2.0]
    for name in ("weights", "captions"):
        assert entries[0][name] == entries[1][name] == entries[2][name]
    own, indexed = samples_of(first), samples_of(tmp_path / "index")
    assert {path: each.meta for path, each in own.items()} == {
        path: {**each.meta, "sha256": own[path].meta["sha256"]} for path, each in indexed.items()
    }


def test_decisions_keep_the_weight_of_a_caption(tmp_path):
    rows = [["0.png", "home", "house", 2], ["1.png", "star", "", 3]]
    source = table(tmp_path, ["image", "name", "words", "weight"], *rows)
    reading = {"caption_column": "name,words", "weight_column": "weight"}
    keys = {path: each.key for path, each in samples_of(built(source, tmp_path / "a", **reading)).items()}
    decisions = [
        Decision(keys["0.png"], "0.png", "edit", "house", "hut"),
        Decision(keys["1.png"], "1.png", "add", "", "sun"),
    ]
    write_decisions(tmp_path / "d.csv", decisions)
    out = built(source, tmp_path / "b", **reading, decisions=str(tmp_path / "d.csv"))
    assert {path: (each.captions, each.weights) for path, each in samples_of(out).items()} == {
        "0.png": (["home", "hut"], [2.0, 2.0]),
        "1.png": (["star", "sun"], [3.0, 1.0]),
    }


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"weights": [1.0]}, "weights of 1 captions, not 2"),
        ({"weights": [1, -1]}, r"weights\[1\] is not valid"),
        ({"weights": [1, float("inf")]}, r"weights\[1\] is not valid"),
        ({"weights": [True, 1]}, r"weights\[0\] is not valid"),
        ({"weights": 1}, "weights is a whole number, not a list"),
    ],
)
def test_a_json_that_was_damaged_is_named(changes, problem):
    meta = json.dumps({"captions": ["a", "b"], **changes}).encode()
    with pytest.raises(UserError, match=problem):
        parse_meta(meta, Path("a.tar"), "k")


def tar_of(folder: Path, **meta) -> str:
    """A tar with one image and its .json, as a stranger may write it."""
    noise_images(folder, 1)
    texts = {"0.json": json.dumps(meta).encode(), "0.png": (folder / "0.png").read_bytes()}
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name, data in texts.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return str(folder / "a.tar")


def test_weights_of_a_strangers_tar_are_checked(tmp_path):
    out = built(tar_of(tmp_path, captions=["c 0", "c 1"], weights=[2, "heavy"]), tmp_path / "out")
    assert [reason for _, reason, _ in reasons_of(out)] == ["invalid weight"]
    assert [each.weights for each in samples_of(out).values()] == [[2.0]]
    for number, weights in enumerate(([1], {"c 0": 3})):  # that do not belong to the captions
        (tmp_path / f"b{number}").mkdir()
        other = tar_of(tmp_path / f"b{number}", captions=["c 0", "c 1"], weights=weights)
        sample = next(iter(samples_of(built(other, tmp_path / f"b{number}" / "out")).values()))
        assert "weights" not in sample.meta


def test_what_older_shards_say_of_the_columns_of_captions_is_ignored(tmp_path):
    rows = [["0.png", "home", "house", 2], ["1.png", "star", "", 1]]
    source = table(tmp_path, ["image", "name", "words", "weight"], *rows)
    out = built(source, tmp_path / "out", caption_column="name,words", weight_column="weight")
    new, old = Shards(out, "train"), shutil.copytree(out, tmp_path / "old")
    members = []
    for number in range(len(new)):
        sample = new.read(number)
        meta = sample.meta | {"kinds": ["name", "words"][: len(sample.captions)]}
        members.append(Member(sample.key, sample.image, "png", sample.captions, meta, new.groups[number]))
    manifest = read_manifest(old)
    entry = write_shard(next(old.glob("train/*.tar")), members)
    manifest["splits"]["train"] |= {"kinds": {"name": 2, "words": 1}, "shards": [entry]}
    write_json(old / "manifest.json", manifest)
    Shards(old, "train").verify()
    for shards in (out, old):
        assert {path: (each.captions, each.weights) for path, each in samples_of(shards).items()} == {
            "0.png": (["home", "house"], [2.0, 2.0]),
            "1.png": (["star"], [1.0]),
        }
    assert tars(old) != tars(out) == tars(built(str(next(old.glob("train/*.tar"))), tmp_path / "again"))


def test_the_command_line(tmp_path):
    source = table(tmp_path, HEADER, ["0.png", "a", 2], ["1.png", "b", 1])
    result = call_here(main, "build", source, "--out", tmp_path / "out", "--weight-column", "wieght")
    assert_mistake(result, "no column 'wieght'", "--weight-column")
