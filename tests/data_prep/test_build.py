"""From inputs to shards: the same bytes every time, counts that sum, and what other readers make of it."""

import csv
import json
import subprocess
import sys
import tarfile

import pytest
import webdataset
from conftest import (
    ICONS,
    ROOT,
    assert_mistake,
    build_icons,
    call,
    call_here,
    environment,
    noise_images,
    tars,
)

import data_prep.__main__
import eval.__main__
import train.__main__
from data_prep.build.pipeline import Checking, Parallelism, Reading, Splitting, build, merge
from data_prep.build.split import SPLITS, split_of
from data_prep.errors import UserError
from data_prep.icons import icons
from data_prep.shards import Shards


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
        assert [sample["__key__"] for sample in theirs] == [
            shards.key(number) for number in range(len(shards))
        ]
        for number, sample in enumerate(theirs):
            ours = shards.read(number)
            assert sample["png"] == ours.image
            assert sample["txt"].decode() == ours.captions[0]
            assert json.loads(sample["json"]) == ours.meta
            assert ours.captions == shards.captions(number)


@pytest.mark.slow
def test_older_webdataset_and_open_clips_own_pipeline_read_them(icon_shards, tmp_path):
    """open_clip_train requires webdataset 0.2.86, which is installed into a folder for one process."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "--no-deps",
        "--target",
        tmp_path,
    ]
    subprocess.run([*pip, "webdataset==0.2.86"], check=True, capture_output=True)
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "old_readers.py", icon_shards],
        env={**environment(), "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    shards = Shards(icon_shards, "train")
    ours = [[shards.key(number), shards.read(number).captions[0]] for number in range(len(shards))]
    assert found["version"] == "0.2.86"
    assert found["webdataset"] == ours
    assert sorted(found["open_clip"]) == sorted(caption for _, caption in ours)


def test_gnu_tar_and_tarfile_list_the_members(icon_shards):
    for path in icon_shards.rglob("*.tar"):
        listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
        with tarfile.open(path) as archive:
            names = archive.getnames()
            for member in archive:
                assert (member.mtime, member.uname, member.gname, member.uid, member.gid) == (0, "", "", 0, 0)
        assert (listed.stdout.split(), listed.stderr) == (names, "")
        assert json.loads((path.parent / "sizes.json").read_text())[path.name] == len(names) / 3


def test_every_icon_reaches_its_split_once_and_groups_stay_whole(icon_folder, icon_shards):
    with open(icon_folder / "icons.csv") as file:
        rows = {(row["file_path"], row["caption"]): row["group"] for row in csv.DictReader(file)}
    found, named, numbered = set(), {}, {}
    for split in SPLITS:
        shards = Shards(icon_shards, split)
        for number in range(len(shards)):
            sample = shards.read(number)
            found |= {(sample.meta["image"], caption) for caption in sample.captions}
            assert named.setdefault(sample.meta["group"], split) == split
            assert numbered.setdefault(shards.groups[number], split) == split
            assert rows[sample.meta["image"], sample.captions[0]] == sample.meta["group"]
            assert sample.meta["columns"]["set"] in sample.meta["image"]
    assert found == rows.keys()


def test_sizes_and_number_of_shards(tmp_path):
    path = noise_images(tmp_path, 60)
    for name, options, expected in [("a", (25, 1), 3), ("b", (1000, 7), 7), ("c", (1000, 1), 1)]:
        build(
            [str(path)],
            tmp_path / name,
            images_per_shard=options[0],
            min_shards=options[1],
            parallelism=Parallelism(1),
        )
        sizes = Shards(tmp_path / name, "train").shard_sizes
        assert len(sizes) == expected
        assert sizes.max() - sizes.min() <= 1


def test_parts_by_tasks_are_the_same_shards(icon_folder, icon_shards, tmp_path, monkeypatch, capsys):
    source = [str(icon_folder / "icons.csv")]
    writing = {"images_per_shard": 40, "min_shards": 1}
    for task in (2, 0):
        assert build(source, tmp_path / "out", ICONS, parallelism=Parallelism(1, 3, task), **writing) is None
    with pytest.raises(UserError, match="1 of 3 tasks have not finished, or had other options: 1;"):
        merge(tmp_path / "out")
    wrong = Splitting(val=0.2)
    build(source, tmp_path / "out", ICONS, split=wrong, parallelism=Parallelism(1, 3, 1), **writing)
    assert (
        "another --val (0.1, now 0.2); run tasks that were finished before again" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="2 of 3 tasks have not finished, or had other options: 0, 2;"):
        merge(tmp_path / "out")
    for name, value in {"COUNT": 3, "ID": 1, "MIN": 0, "MAX": 2}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert build(source, tmp_path / "out", ICONS, parallelism=Parallelism(1), **writing) is None
    merge(tmp_path / "out", processes=1)
    assert tars(tmp_path / "out") == tars(icon_shards)
    assert (tmp_path / "out" / "report.json").read_text() == (icon_shards / "report.json").read_text()
    assert not (tmp_path / "out.partial").exists()


def test_adding_rows_does_not_move_images_between_splits(tmp_path):
    """Existing groups keep their splits, whether rows are added before or after them."""
    path = noise_images(tmp_path, 110, groups=37)
    header, *rows = path.read_text().splitlines()
    (tmp_path / "old.csv").write_text("\n".join([header, *rows[:100]]) + "\n")
    read = Reading(group_column="group")

    def splits(source, out, **options):
        build(
            [str(tmp_path / source)],
            tmp_path / out,
            read,
            split=Splitting(**options),
            parallelism=Parallelism(1),
        )
        found = {}
        for split in SPLITS:
            shards = Shards(tmp_path / out, split)
            found |= {shards.read(number).meta["image"]: split for number in range(len(shards))}
        return found

    before = splits("old.csv", "old", val=0.3, test=0.3)
    assert set(before.values()) == set(SPLITS)
    for name, lines in {"after.csv": rows, "first.csv": rows[100:] + rows[:100]}.items():
        (tmp_path / name).write_text("\n".join([header, *lines]) + "\n")
        after = splits(name, name[:-4], val=0.3, test=0.3)
        assert len(after) == 110
        assert before.items() <= after.items()

    # An image with a caption of train and one of val joins their groups, so one of them moves. With
    # keep_splits, the new rows are rejected instead.
    train, val = (
        next(image for image, split in before.items() if split == name) for name in ("train", "val")
    )
    names = {row.split(",")[0]: row for row in rows[:100]}
    extra = [f"105.png,{names[train].split(',')[1]},bridge", f"105.png,{names[val].split(',')[1]},bridge"]
    (tmp_path / "bridge.csv").write_text("\n".join([header, *rows[:100], *extra]) + "\n")
    moved = splits("bridge.csv", "moved", val=0.3, test=0.3)
    assert moved[train] == moved[val] == moved["105.png"]
    check = Checking(max_rejects=0.1)
    split = Splitting(val=0.3, test=0.3, keep_splits=str(tmp_path / "old"))
    report = build([str(tmp_path / "bridge.csv")], tmp_path / "kept", read, check, split, Parallelism(1))
    assert report["reasons"] == {"joins two splits": 2}
    kept = {
        Shards(tmp_path / "kept", s).read(n).meta["image"]: s
        for s in SPLITS
        for n in range(len(Shards(tmp_path / "kept", s)))
    }
    assert kept == before


def test_splits_are_a_keyed_hash_of_the_group():
    groups = [f"group {number}" for number in range(2000)]
    splits = [split_of(group, 0.1, 0.1) for group in groups]
    assert 150 < splits.count("val") < 250
    assert 150 < splits.count("test") < 250
    assert splits != [split_of(group, 0.1, 0.1, seed=1) for group in groups]
    # A larger validation fraction takes from train alone.
    wider = [split_of(group, 0.2, 0.1) for group in groups]
    assert all(
        now == before or (before, now) == ("train", "val") for before, now in zip(splits, wider, strict=True)
    )


def test_too_many_rejects_end_the_build_with_their_table(tmp_path):
    path = noise_images(tmp_path, 30)
    with open(path, "a") as file:
        file.write("none.png,missing,\n0.png,,\n0.png,,\n")
    with pytest.raises(UserError) as caught:
        build([str(path)], tmp_path / "out", parallelism=Parallelism(1))
    for words in (
        "3 of 33 rows cannot be used (9.1%)",
        "--max-rejects 0.01",
        "2 x empty caption",
        "1 x missing file",
        "line 32, 'none.png'",
    ):
        assert words in str(caught.value), str(caught.value)
    assert len((tmp_path / "out.partial" / "rejects.csv").read_text().splitlines()) == 4
    # What was checked is not checked again.
    report = build([str(path)], tmp_path / "out", check=Checking(max_rejects=0.1), parallelism=Parallelism(1))
    assert (report["rows"], report["records"], report["rejects"]) == (33, 30, 3)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        ".made.json",
        "leaks.csv",
        "manifest.json",
        "rejects.csv",
        "report.html",
        "report.json",
        "test",
        "train",
        "val",
    ]


def test_a_wrong_column_leaves_nothing_that_refuses_the_right_one(tmp_path):
    path = noise_images(tmp_path, 20)
    one = Parallelism(1)
    with pytest.raises(UserError, match="no column 'text'"):
        build([str(path)], tmp_path / "out", Reading(caption_column="text"), parallelism=one)
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(UserError, match=r"no manifest\.json"):  # before the images are checked
        build([str(path)], tmp_path / "out", split=Splitting(keep_splits=str(tmp_path)), parallelism=one)
    assert not (tmp_path / "out.partial").exists()
    build([str(path)], tmp_path / "out", parallelism=one)


def test_an_image_that_changes_while_it_is_built_is_named(tmp_path):
    path = noise_images(tmp_path, 30)
    for task in (0, 1):
        build([str(path)], tmp_path / "out", parallelism=Parallelism(1, 2, task))
    (tmp_path / "3.png").write_bytes((tmp_path / "4.png").read_bytes())
    with pytest.raises(UserError, match=r"3\.png changed after it was checked"):
        merge(tmp_path / "out", processes=1)


def test_user_mistakes_are_sentences(icon_folder, icon_shards, tmp_path):
    csv_file = icon_folder / "icons.csv"
    with pytest.raises(UserError, match="exists already"):
        build_icons(icon_folder, icon_shards)
    with pytest.raises(UserError, match="no such folder; pass --images"):
        build([str(csv_file)], tmp_path / "a", Reading(images=str(tmp_path / "none")))
    with pytest.raises(UserError, match="no input; pass CSV"):
        build([], tmp_path / "a")
    with pytest.raises(UserError, match="leave a fraction for train"):
        build_icons(icon_folder, tmp_path / "a", val=0.6, test=0.4)
    with pytest.raises(UserError, match="--encode gif: must be png, jpeg or webp"):
        build_icons(icon_folder, tmp_path / "a", encode="gif")
    with pytest.raises(UserError, match="--task 3 of --num-tasks 3: must be a number from 0 to 2"):
        build([str(csv_file)], tmp_path / "a", parallelism=Parallelism(1, 3, 3))
    with pytest.raises(UserError, match="pass --task as well"):
        build([str(csv_file)], tmp_path / "a", parallelism=Parallelism(1, 3))
    with pytest.raises(UserError, match="no unfinished build"):
        merge(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []  # nothing half-made is left
    with pytest.raises(
        UserError,
        match=r"none of the \d+ rows .*:\n +\d+ x missing file\nthe first is line 2.*--images.*Fix the input",
    ):
        build([str(csv_file)], tmp_path / "a", Reading("file_path", "caption", images=str(tmp_path)))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").touch()
    for make in (build_icons, lambda _, out, overwrite: icons(out, limit=3, overwrite=overwrite)):
        with pytest.raises(UserError, match="not made by this command, and is not deleted"):
            make(icon_folder, tmp_path / "letters", overwrite=True)
    assert (tmp_path / "letters" / "a.txt").is_file()
    options = ["--out", tmp_path / "b", "--image-column", "file_path", "--caption-column"]
    assert_mistake(
        call("data_prep", "build", csv_file, *options, "text", expect=2),
        "error:",
        "no column 'text'",
        "--caption-column",
    )
    assert_mistake(
        call_here(data_prep.__main__.main, "build", csv_file, *options, "caption", "--imagse", "x"),
        "--images",
    )


def test_two_builds_at_once_do_not_mix(tmp_path):
    path = noise_images(tmp_path, 10)
    build([str(path)], tmp_path / "out", parallelism=Parallelism(1, 2, 0))
    from data_prep.build.records import Part

    part = Part(tmp_path / "out.partial", 1, 2)
    with pytest.raises(UserError, match="in use by another process"):
        build([str(path)], tmp_path / "out", parallelism=Parallelism(1, 2, 1))
    part.close()


def test_help_that_teaches(monkeypatch, capsys):
    for room in (data_prep.__main__, train.__main__, eval.__main__):
        monkeypatch.setattr("sys.argv", ["python -m"])
        room.main()
        words = capsys.readouterr().out
        assert f"python -m {room.__package__}" in words
        assert "--help" in words
    assert "--background" in call("data_prep", "build", "--help").stdout
