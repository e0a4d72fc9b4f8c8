"""Where images are: imagefolders, caches of the Hugging Face hub, web servers, paths of Windows."""

import os
from pathlib import Path

import pandas as pd
import pytest
from conftest import noise_images, png
from huggingface_hub import snapshot_download
from test_inputs import images_of, write
from test_tables import captions_of, jsonl, noise

from data_prep.build.pipeline import Checking, Parallelism, Reading, build
from data_prep.errors import UserError
from data_prep.inputs.formats import read
from data_prep.inputs.locations import ImageLocation, read_local
from data_prep.inputs.rows import Columns
from data_prep.inputs.storage import digest, expand
from eval.classify.labelled import read_labelled

ONE = Parallelism(1)


def imagefolder(folder: Path, extension: str, caption: str = "text") -> dict[bytes, list[str]]:
    """As the library `datasets` documents it, with two splits; image -> captions."""
    expected = {}
    for number, image in enumerate(noise(4)):
        split = folder / ("train", "test")[number % 2]
        (split / "images").mkdir(parents=True, exist_ok=True)
        (split / "images" / f"{number}.png").write_bytes(png(image))
        expected[png(image)] = [f"caption {number}"]
    for place, split in enumerate(("train", "test")):
        rows = [
            {"file_name": f"images/{number}.png", caption: f"caption {number}", "label": f"class {place}"}
            for number in (place, place + 2)
        ]
        file = folder / split / f"metadata{extension}"
        if extension == ".jsonl":
            jsonl(folder / split, *rows, name="metadata.jsonl")
        elif extension == ".csv":
            pd.DataFrame(rows).to_csv(file, index=False)
        else:
            pd.DataFrame(rows).to_parquet(file)
    return expected


@pytest.mark.parametrize("extension", [".csv", ".jsonl", ".parquet"])
def test_an_imagefolder_is_read_by_its_metadata(tmp_path, extension):
    expected = imagefolder(tmp_path / "set", extension)
    report = build([str(tmp_path / "set")], tmp_path / "out", parallelism=ONE)
    assert (report["rows"], report["images"]) == (4, 4)
    assert images_of(tmp_path / "out") == expected
    before = digest(str(tmp_path / "set"))
    (tmp_path / "set" / "test" / "unlisted.png").write_bytes(png(noise(5)[4]))
    assert digest(str(tmp_path / "set")) != before
    rows = list(read(str(tmp_path / "set"), Columns()))
    assert [(row.image, row.problem.reason) for row in rows if row.problem] == [
        ("test/unlisted.png", "not in the metadata")
    ]
    for split, kind in (("train", "class 0"), ("test", "class 1")):
        labelled = read_labelled(tmp_path / "set", split)
        assert (labelled.classes, len(labelled)) == ([kind], 2)


def test_an_imagefolder_with_another_caption_column(tmp_path):
    expected = imagefolder(tmp_path / "set", ".jsonl", caption="words")
    with pytest.raises(
        UserError, match="no column 'caption'; it has 'file_name', 'words', 'label'; pass --cap"
    ):
        build([str(tmp_path / "set")], tmp_path / "out", parallelism=ONE)
    build([str(tmp_path / "set")], tmp_path / "out", Reading(caption_column="words"), parallelism=ONE)
    assert images_of(tmp_path / "out") == expected
    with pytest.raises(
        UserError, match=r"it has 'file_name'.*; pass --image-column file_name --caption-column NAME"
    ):
        captions_of(str(tmp_path / "set" / "train" / "metadata.jsonl"))
    build(
        [str(tmp_path / "set" / "train" / "metadata.jsonl")],
        tmp_path / "one",
        Reading(image_column="file_name", caption_column="words"),
        parallelism=ONE,
    )
    assert len(images_of(tmp_path / "one")) == 2


def test_a_table_beside_texts_that_is_no_metadata_changes_nothing(tmp_path):
    noise_images(tmp_path, 2)
    (tmp_path / "0.txt").write_text("zero")
    (tmp_path / "metadata.csv").write_text("licence,author\nMIT,me\n")
    assert captions_of(str(tmp_path)) == ["zero", "no caption file"]


def test_a_cache_of_the_hub_is_read_through_its_links(hub, tmp_path):
    """snapshots/COMMIT/train/... are links into blobs/."""
    expected = imagefolder(tmp_path / "set", ".jsonl")
    files = {
        str(path.relative_to(tmp_path / "set")): path.read_bytes()
        for path in (tmp_path / "set").rglob("*")
        if path.is_file()
    }
    hub.put("datasets/me/icons", files)
    snapshot = Path(snapshot_download("me/icons", repo_type="dataset"))
    assert (snapshot / "train" / "images" / "0.png").is_symlink()
    report = build([str(snapshot)], tmp_path / "out", parallelism=ONE)
    assert (report["rows"], report["images"]) == (4, 4)
    assert images_of(tmp_path / "out") == expected
    table = snapshot / "train" / "metadata.jsonl"
    options = Reading(image_column="file_name", caption_column="text")
    assert build([str(table)], tmp_path / "table", options, parallelism=ONE)["images"] == 2
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    other = snapshot.parents[2] / "datasets--you--secrets" / "blobs"
    other.mkdir(parents=True)
    (other / "abc").write_bytes(b"secret")
    for number, target in enumerate((secret, other / "abc", snapshot.parents[1] / "refs" / "main")):
        os.symlink(target, snapshot / f"link{number}.png")
        assert (
            read_local(ImageLocation(str(snapshot), f"link{number}.png")).reason
            == "outside of the images folder"
        )
    with pytest.raises(
        UserError, match=r"has no Parquet file; .* hf://datasets/me/icons@refs/convert/parquet"
    ):
        expand(["hf://datasets/me/icons"])


def test_links_to_nothing_and_texts_that_lead_out(tmp_path):
    """A stranger's folder: a caption file must not be a link to somebody's secret."""
    folder = tmp_path / "set"
    folder.mkdir()
    noise_images(folder, 4)
    (tmp_path / "secret").write_text("password")
    os.symlink(tmp_path / "secret", folder / "0.txt")
    os.symlink(tmp_path / "nothing", folder / "1.txt")
    os.mkfifo(folder / "2.txt")
    (folder / "3.txt").write_text("three")
    jsonl(tmp_path, {"file_name": "3.png", "text": "not of this folder"}, name="metadata.jsonl")
    os.symlink(tmp_path / "metadata.jsonl", folder / "metadata.jsonl")
    os.mkfifo(folder / "metadata.csv")
    reasons = captions_of(str(folder))
    assert reasons == [*["unreadable caption file"] * 3, "three"]
    report = build([str(folder)], tmp_path / "out", check=Checking(max_rejects=0.9), parallelism=ONE)
    assert (report["records"], report["rejects"]) == (1, 3)
    assert "password" not in (tmp_path / "out" / "rejects.csv").read_text()


def test_signs_of_urls_in_names_under_a_web_server(served, tmp_path):
    folder, url = served
    names = ["c#.png", "50% off.png", "100%.png", "a%20b.png", "x y.png", "50%25#%.png", "d%2Fe.png"]
    names += ["u v.png"]
    for name, image in zip(names, noise(len(names)), strict=True):
        (folder / name).write_bytes(png(image))
    rows = [{"image": name, "caption": name} for name in names[:-1]]
    rows += [{"image": f"{url}/u%20v.png#part", "caption": "u v.png"}, {"image": "no%20.png", "caption": "-"}]
    path = jsonl(tmp_path, *rows)
    report = build([path], tmp_path / "out", Reading(images=url), Checking(max_rejects=0.5), parallelism=ONE)
    assert report["reasons"] == {"missing file": 1}
    found = [caption for captions in images_of(tmp_path / "out").values() for caption in captions]
    assert sorted(found) == sorted(names)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        (r"C:\Users\me\a.png", "make paths relative to --images"),
        (r"D:/photos/a.png", "make paths relative to --images"),
        (r"\\server\share\a.png", "make paths relative to --images"),
        (r"photos\a.png", "write / instead of \\"),
        ("photos/a.png", "see --images"),
    ],
)
def test_paths_of_windows_get_a_hint(tmp_path, name, hint):
    bad = read_local(ImageLocation(str(tmp_path), name))
    assert bad.reason == "missing file"
    assert hint in bad.detail
    with pytest.raises(UserError) as raised:
        build([write(tmp_path, f"image,caption\n{name},a\n")], tmp_path / "out", parallelism=ONE)
    assert hint in str(raised.value)
