"""From CSV to shards: the same bytes every time, counts that sum, and what other readers make of it."""

import csv
import json
import tarfile

import numpy as np
import pytest
import webdataset
from conftest import assert_mistake, build_icons, call, call_here
from PIL import Image

import data_prep.__main__
import eval.__main__
import train.__main__
from data_prep.build import build
from data_prep.errors import UserError
from data_prep.icons import icons
from data_prep.shards import Shards, sha256_of
from data_prep.split import SPLITS, split_of


def tars(folder):
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*.tar"))}


def test_the_same_csv_gives_the_same_bytes(icon_folder, icon_shards, tmp_path):
    build_icons(icon_folder, tmp_path / "again", processes=2)
    assert tars(tmp_path / "again") == tars(icon_shards)
    assert len(tars(icon_shards)) > 5
    manifest = json.loads((icon_shards / "manifest.json").read_text())
    entries = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    assert {entry["file"]: entry["sha256"] for entry in entries} == tars(icon_shards)


def test_webdatasets_own_reader_yields_the_same_samples(icon_shards):
    for split in SPLITS:
        shards = Shards(icon_shards, split)
        urls = [str(icon_shards / entry["file"]) for entry in shards.entries]
        theirs = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
        assert [sample["__key__"] for sample in theirs] == [shards.key(number) for number in range(len(shards))]
        for number, sample in enumerate(theirs):
            ours = shards.read(number)
            assert sample["png"] == ours.image
            assert sample["txt"].decode() == ours.captions[0]
            assert json.loads(sample["json"]) == ours.meta
            assert ours.captions == shards.captions(number)


def test_tar_members_say_nothing_of_who_and_when(icon_shards):
    with tarfile.open(next(icon_shards.rglob("*.tar"))) as archive:
        for member in archive:
            assert (member.mtime, member.uname, member.gname, member.uid, member.gid) == (0, "", "", 0, 0)


def test_every_icon_reaches_its_split_once_and_groups_stay_whole(icon_folder, icon_shards):
    with open(icon_folder / "icons.csv") as file:
        rows = list(csv.DictReader(file))
    expected = {(row["file_path"], row["caption"]): split_of(row["group"], 0.1, 0.1) for row in rows}
    found, groups = {}, {}
    for split in SPLITS:
        shards = Shards(icon_shards, split)
        for number in range(len(shards)):
            sample = shards.read(number)
            for caption in sample.captions:
                found[sample.meta["image"], caption] = split
            assert groups.setdefault(sample.meta["group"], split) == split
    assert found == expected


def test_bad_rows_are_counted_and_listed(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("hello")
    rows = [f"{number}.png,caption {number}" for number in range(12)]
    rows += ["0.png,another caption", "broken.png,one", "broken.png,two", "text.png,x", "none.png,x", "1.png,"]
    (tmp_path / "a.csv").write_text("\n".join(["file,caption", *rows]) + "\n")
    report = build(tmp_path / "a.csv", tmp_path / "out", "file", "caption", processes=1)
    assert (report["rows"], report["records"], report["rejects"], report["images"]) == (18, 13, 5, 12)
    assert report["reasons"] == {"damaged image": 2, "missing file": 1, "empty caption": 1, "not an image": 1}
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    with open(tmp_path / "out" / "rejects.csv") as file:
        listed = [(int(row["line"]), row["path"], row["reason"]) for row in csv.DictReader(file)]
    assert [line for line, _, _ in listed] == [15, 16, 17, 18, 19]
    assert listed[0] == (15, "broken.png", "damaged image")
    assert sum(split["images"] for split in report["splits"].values()) == 12


def test_adding_rows_moves_nobody():
    groups = [f"group {number}" for number in range(2000)]
    splits = [split_of(group, 0.1, 0.1) for group in groups]
    assert 150 < splits.count("val") < 250
    assert 150 < splits.count("test") < 250
    # A larger validation fraction takes from train alone.
    wider = [split_of(group, 0.2, 0.1) for group in groups]
    assert all(now == before or (before, now) == ("train", "val") for before, now in zip(splits, wider, strict=True))


def test_user_mistakes_are_sentences(icon_folder, icon_shards, tmp_path):
    csv_file = icon_folder / "icons.csv"
    with pytest.raises(UserError, match="exists already"):
        build_icons(icon_folder, icon_shards)
    with pytest.raises(UserError, match=r"none of its \d+ rows can be used: \d+ x missing file; the first is line 2.*--images"):
        build_icons(icon_folder, tmp_path / "a", images=tmp_path)
    with pytest.raises(UserError, match="no such folder; pass --images"):
        build_icons(icon_folder, tmp_path / "a", images=tmp_path / "none")
    with pytest.raises(UserError, match="leave something for train"):
        build_icons(icon_folder, tmp_path / "a", val=0.6, test=0.4)
    assert list(tmp_path.iterdir()) == []  # nothing half-made is left
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").touch()
    for make in (build_icons, lambda _, out, overwrite: icons(out, limit=3, overwrite=overwrite)):
        with pytest.raises(UserError, match="not made by this command, and is not deleted"):
            make(icon_folder, tmp_path / "letters", overwrite=True)
    assert (tmp_path / "letters" / "a.txt").is_file()
    options = ["--out", tmp_path / "a", "--image-column", "file_path", "--caption-column"]
    assert_mistake(call("data_prep", "build", csv_file, *options, "text", expect=2), "error:", "no column 'text'", "--caption-column")
    assert_mistake(call_here(data_prep.__main__.main, "build", csv_file, *options, "caption", "--imagse", "x"), "--images")


def test_help_that_teaches(monkeypatch, capsys):
    for room in (data_prep.__main__, train.__main__, eval.__main__):
        monkeypatch.setattr("sys.argv", ["python -m"])
        room.main()
        words = capsys.readouterr().out
        assert f"python -m {room.__package__}" in words
        assert "--help" in words
    assert "--background" in call("data_prep", "build", "--help").stdout
