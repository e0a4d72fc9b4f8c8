"""Images with labels are equal in every format, and each image that cannot be used is listed."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import png
from labelled_formats import CLASSES, as_cars, as_csv, as_folder, as_parquet, as_table, labelled_images
from PIL import Image

from data_prep.build.pipeline import Checking, Parallelism, Reading, Splitting, build
from data_prep.errors import NotFinite, UserError
from data_prep.images import BadImage
from data_prep.inputs.formats import FOLDER, READERS, read
from data_prep.inputs.rows import Columns
from eval.classify.features import LabelledImages, embed_rows, image_features, usable_rows
from eval.classify.labelled import IMAGENETTE, Labelled, read_labelled
from eval.options import Inference
from train.model.clip import load
from train.world import World


@pytest.fixture(scope="module")
def images():
    return labelled_images()


def contents(data: Labelled) -> list[tuple[str, bytes]]:
    return [(data.classes[label], data.read(number)) for number, label in enumerate(data.labels.tolist())]


def test_every_format_gives_the_same_images_and_labels(images, tmp_path):
    expected = [(CLASSES[label], data) for label, data in images]
    csv = as_csv(tmp_path / "csv", images)
    places = {
        "folder": as_folder(tmp_path / "folder", images),
        "csv": csv,
        "parquet": as_parquet(tmp_path / "one.parquet", images, row_group_size=3),
        "cars": as_cars(tmp_path / "cars", images),
    }
    for kind, place in places.items():
        data = read_labelled(place)
        assert data.classes == CLASSES, kind
        assert contents(data) == expected, kind
        assert not data.unlabelled
    assert len({read_labelled(place).sha256 for place in places.values()}) == 1
    altered = as_folder(tmp_path / "altered", [*images[:-1], (images[-1][0], images[-2][1])])
    assert read_labelled(altered).sha256 != read_labelled(csv).sha256
    backwards = read_labelled(places["parquet"])
    assert [backwards.read(number) for number in reversed(range(len(images)))] == [
        data for _, data in reversed(images)
    ]


@pytest.mark.parametrize("extension", sorted(set(READERS) - {FOLDER}))
def test_every_table_is_read_alike_by_build_and_as_labelled_data(images, tmp_path, extension):
    table = as_table(tmp_path, images, extension)
    data = read_labelled(table)
    assert data.classes == CLASSES
    assert contents(data) == [(CLASSES[label], content) for label, content in images]
    assert len(list(read(str(table), Columns()))) == len(images)
    report = build([str(table)], tmp_path / "shards", parallelism=Parallelism(1))
    assert report["records"] == len(images)


def test_a_compressed_tar_is_copied_and_the_copy_deleted(images, tmp_path, monkeypatch):
    (tmp_path / "copies").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "copies"))
    tar = as_table(tmp_path, images, ".tar")
    (tmp_path / "table.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    data = read_labelled(tmp_path / "table.tar.gz")
    assert contents(data) == contents(read_labelled(tar))
    assert len(list((tmp_path / "copies").iterdir())) == 1
    del data
    assert list((tmp_path / "copies").iterdir()) == []


def test_paths_are_relative_to_the_images_folder_or_absolute(images, tmp_path):
    table = as_csv(tmp_path / "csv", images)
    text = table.read_text()
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "labels.csv"
    moved.write_text(text.replace("images/3.png", str(table.parent / "images" / "3.png")), "utf-16")
    data = read_labelled(moved, images=str(table.parent), encoding="utf-16")
    assert contents(data) == contents(read_labelled(table))
    other_root = read_labelled(moved, images=str(table.parent / "images"), encoding="utf-16")
    assert other_root.read(2).reason == "missing file"
    assert other_root.read(3) == images[3][1]
    with pytest.raises(UserError, match="no such folder; pass --images"):
        read_labelled(moved, images=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"--images .* is for tables"):
        read_labelled(as_folder(tmp_path / "folder", images), images=str(tmp_path))


def test_rows_that_cannot_be_parsed_are_listed(images, tmp_path):
    table = as_csv(tmp_path, images)
    with open(table, "ab") as file:
        file.write(b"images/0.png,a,b\nimages/1.png,caf\xe9\n")
    data = read_labelled(table)
    assert len(data) == len(images)
    assert [name for name, _ in data.unlabelled] == ["line 22", "images/1.png"]
    assert [reason.split(" (")[0] for _, reason in data.unlabelled] == ["malformed row", "bad UTF-8"]


def test_a_damaged_part_of_a_parquet_file_is_named(images, tmp_path):
    path = as_parquet(tmp_path / "a.parquet", images, row_group_size=10, compression="zstd")
    content = bytearray(path.read_bytes())
    content[200:1200] = bytes(1000)
    path.write_bytes(content)
    data = read_labelled(path)
    assert [isinstance(data.read(number), BadImage) for number in range(20)] == [True] * 10 + [False] * 10


def test_splits_of_folders_and_of_parquet_files(images, tmp_path):
    as_folder(tmp_path / "folders", images[:9], split="train")
    as_folder(tmp_path / "folders", images[5:], split="val")
    as_parquet(tmp_path / "hub" / "data" / "train-00000-of-00002.parquet", images[:4])
    as_parquet(tmp_path / "hub" / "data" / "train-00001-of-00002.parquet", images[4:9])
    as_parquet(tmp_path / "hub" / "data" / "validation-00000-of-00001.parquet", images[5:])
    for place, val in (("folders", "val"), ("hub", "validation")):
        assert [data for _, data in contents(read_labelled(tmp_path / place, "train"))] == [
            data for _, data in images[:9]
        ]
        assert len(read_labelled(tmp_path / place, val)) == len(images) - 5
        with pytest.raises(UserError, match=f"pass one of train, {val} as its split"):
            read_labelled(tmp_path / place)


def test_imagenette_gets_its_names(images, tmp_path):
    wnids = list(IMAGENETTE)[:3]
    as_folder(tmp_path, images, classes=wnids, split="val")
    assert read_labelled(tmp_path, "val").classes == ["tench", "English springer", "cassette player"]


def test_shards_keep_a_column_of_labels(images, tmp_path):
    rows = ["image,caption,kind"]
    for number, (label, data) in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(data)
        rows.append(f"{number}.png,caption {number},{CLASSES[label] if number else ''}")
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    build(
        [str(tmp_path / "a.csv")],
        tmp_path / "shards",
        Reading(),
        Checking(),
        Splitting(val=0.0, test=0.0),
        Parallelism(1),
    )
    data = read_labelled(tmp_path / "shards", label_column="kind")
    assert data.classes == CLASSES
    assert len(data) == len(images) - 1
    assert [reason for _, reason in data.unlabelled] == ["no label"]
    opaque = {content: CLASSES[label] for label, content in images}
    kept = [(name, content) for name, content in contents(data) if content in opaque]
    assert len(kept) == len(images) - 1 - 3  # three have transparency, which the build composited
    assert all(opaque[content] == name for name, content in kept)
    with pytest.raises(UserError, match="its samples have no column 'label'; they have kind"):
        read_labelled(tmp_path / "shards")


def test_what_cannot_be_used_is_counted_and_named(images, tiny_model, tmp_path):
    path = as_csv(tmp_path / "csv", images)
    (path.parent / "damaged.png").write_bytes(images[0][1][:-20])
    (tmp_path / "secret.png").write_bytes(images[0][1])
    os.symlink(tmp_path / "secret.png", path.parent / "link.png")
    bad = ["damaged.png", "absent.png", "../secret.png", "link.png", ""]
    with open(path, "a") as file:
        file.writelines(f"{name},{CLASSES[0]}\n" for name in bad)
        file.write("images/0.png,\n")
    data = read_labelled(path)
    assert data.unlabelled == [("images/0.png", "no label")]
    features = image_features(load(tiny_model), data, World(), Inference(7, 0))
    assert [name for name, _ in features.unreadable] == bad
    reasons = [reason for _, reason in features.unreadable]
    for reason, word in zip(
        reasons, ("truncated", "missing file", "outside", "outside", "no image path"), strict=True
    ):
        assert word in reason
    assert len(features.labels) == len(features.numbers) == len(features.image_features) == len(images)
    assert len(data) + len(data.unlabelled) == len(images) + len(bad) + 1


def test_pixels_are_those_of_the_models_own_preprocessing_on_white(images, tiny_model, tmp_path):
    clip, data = load(tiny_model), read_labelled(as_folder(tmp_path, images))
    loaded = LabelledImages(data, clip)
    for number, (_, content) in enumerate(images[:3]):
        (tmp_path / "one").write_bytes(content)
        image = Image.open(tmp_path / "one").convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        pixels, usable = loaded[number]
        assert usable
        torch.testing.assert_close(
            (pixels.float() / 255 - clip.towers.mean) / clip.towers.std, clip.preprocess(flat)
        )


def test_cached_features_are_the_fresh_ones_until_weights_or_images_change(
    images, tiny_model, tmp_path, monkeypatch
):
    clip, data = load(tiny_model), read_labelled(as_folder(tmp_path / "a", images))
    cache = tmp_path / "cache"
    fresh = image_features(clip, data, World(), Inference(6, 0))
    first = image_features(clip, data, World(), Inference(6, 0), cache)
    (file,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("eval.classify.features.embed_rows", None)  # would be called
        again = image_features(
            clip, read_labelled(as_csv(tmp_path / "b", images)), World(), Inference(9, 0), cache
        )
    for other in (first, again):
        assert torch.equal(other.image_features, fresh.image_features)
        assert np.array_equal(other.labels, fresh.labels)
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(
        image_features(clip, data, World(), Inference(6, 0), cache).image_features, fresh.image_features
    )
    with torch.no_grad():
        clip.towers.model.visual.proj[0, 0] += 1
    changed = image_features(clip, data, World(), Inference(6, 0), cache)
    assert not torch.equal(changed.image_features, fresh.image_features)
    assert len(list(cache.iterdir())) == 2


def test_a_feature_that_is_not_finite_names_its_image(images, tiny_model, tmp_path):
    data = read_labelled(as_folder(tmp_path, images))
    rows, usable = embed_rows(load(tiny_model), data, World(), Inference(8, 0))
    rows[9, 2] = torch.nan
    with pytest.raises(NotFinite, match=f"image {data.names[9]}"):
        usable_rows(data, rows, usable)


def test_mistakes_are_sentences(images, tiny_model, tmp_path):
    path = as_csv(tmp_path / "csv", images)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" * 8)
    cars = as_cars(tmp_path / "cars", images)
    (cars / "devkit" / "cars_train_annos.mat").write_bytes(b"no mat" * 50)
    for place, options, words in (
        (tmp_path / "none", {}, "no such file or folder"),
        (tmp_path / "empty", {}, "must have one folder of images per class"),
        (path, {"label_column": "class"}, "no column 'class'; it has 'image', 'label'; pass --label-column"),
        (path, {"split": "val"}, "a file is one split"),
        (tmp_path / "bad.parquet", {}, "cannot be read as Parquet"),
        (cars, {"split": "train"}, "not as Stanford Cars is published"),
        (cars, {"split": "test"}, "pass one of train"),
        (as_folder(tmp_path / "flat", images), {"split": "val"}, "has no splits"),
    ):
        with pytest.raises(UserError, match=words):
            read_labelled(Path(place), **options)
    (tmp_path / "hollow" / "one").mkdir(parents=True)
    with pytest.raises(UserError, match=r"none of its 1 folders has an image \(one\)"):
        read_labelled(tmp_path / "hollow")
    (tmp_path / "blank" / "one").mkdir(parents=True)
    (tmp_path / "blank" / "one" / "a.png").write_bytes(png(Image.new("RGB", (9, 9))))
    data = read_labelled(tmp_path / "blank")
    with pytest.raises(UserError, match=r"none of 1 .* can be read.*blank image"):
        image_features(load(tiny_model), data, World(), Inference(2, 0))


def test_a_table_with_several_rows_per_image_has_each_image_once(images, tmp_path):
    """As captions of one image; by bytes, so copies under other names count once too."""
    csv = as_csv(tmp_path / "csv", images)
    once = read_labelled(csv)
    header, *lines = csv.read_text().splitlines()
    (tmp_path / "csv" / "copy.png").write_bytes(images[0][1])
    copy = ",".join(["copy.png", *lines[0].split(",")[1:]])
    csv.write_text("\n".join([header, *lines, *lines, lines[0], copy]) + "\n")
    several = read_labelled(csv)
    assert (len(several), several.duplicates) == (len(once), len(lines) + 2)
    assert several.sha256 == once.sha256
    other = ",".join([*lines[0].split(",")[:-1], lines[-1].split(",")[-1]])
    csv.write_text("\n".join([header, *lines, other]) + "\n")
    with_two_labels = read_labelled(csv)
    assert len(with_two_labels) == len(once) + 1
    assert with_two_labels.groups[-1] == with_two_labels.groups[0]  # in one group, so on one side of a split
