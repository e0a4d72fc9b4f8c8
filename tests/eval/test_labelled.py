"""Pictures with labels are the same from every format, and nothing is lost on the way without being said."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import png
from labelled_formats import CLASSES, as_cars, as_csv, as_folder, as_parquet, labelled_images
from PIL import Image

from data_prep.build.pipeline import Checking, Reading, Splitting, Work, build
from data_prep.errors import NotFinite, UserError
from data_prep.images import BadImage
from eval.classify.features import LabelledImages, embed_rows, image_features, usable_rows
from eval.classify.labelled import IMAGENETTE, Labelled, read_labelled
from eval.options import Inference
from train.model.clip import load
from train.world import World


@pytest.fixture(scope="module")
def found():
    return labelled_images()


def contents(data: Labelled) -> list[tuple[str, bytes]]:
    return [(data.classes[label], data.read(number)) for number, label in enumerate(data.labels.tolist())]


def test_every_format_gives_the_same_pictures_and_labels(found, tmp_path):
    expected = [(CLASSES[label], data) for label, data in found]
    csv = as_csv(tmp_path / "csv", found)
    places = {
        "folder": as_folder(tmp_path / "folder", found),
        "csv": csv,
        "parquet": as_parquet(tmp_path / "one.parquet", found, row_group_size=3),
        "cars": as_cars(tmp_path / "cars", found),
    }
    for kind, place in places.items():
        data = read_labelled(place)
        assert data.classes == CLASSES, kind
        assert contents(data) == expected, kind
        assert not data.unlabelled
    assert len({read_labelled(place).sha256 for place in places.values()}) == 1
    altered = as_folder(tmp_path / "altered", [*found[:-1], (found[-1][0], found[-2][1])])
    assert read_labelled(altered).sha256 != read_labelled(csv).sha256
    backwards = read_labelled(places["parquet"])
    assert [backwards.read(number) for number in reversed(range(len(found)))] == [
        data for _, data in reversed(found)
    ]


def test_a_damaged_part_of_a_parquet_file_is_named(found, tmp_path):
    path = as_parquet(tmp_path / "a.parquet", found, row_group_size=10, compression="zstd")
    content = bytearray(path.read_bytes())
    content[200:1200] = bytes(1000)
    path.write_bytes(content)
    data = read_labelled(path)
    assert [isinstance(data.read(number), BadImage) for number in range(20)] == [True] * 10 + [False] * 10


def test_splits_of_folders_and_of_parquet_files(found, tmp_path):
    as_folder(tmp_path / "folders", found[:9], split="train")
    as_folder(tmp_path / "folders", found[5:], split="val")
    as_parquet(tmp_path / "hub" / "data" / "train-00000-of-00002.parquet", found[:4])
    as_parquet(tmp_path / "hub" / "data" / "train-00001-of-00002.parquet", found[4:9])
    as_parquet(tmp_path / "hub" / "data" / "validation-00000-of-00001.parquet", found[5:])
    for place, val in (("folders", "val"), ("hub", "validation")):
        assert [data for _, data in contents(read_labelled(tmp_path / place, "train"))] == [
            data for _, data in found[:9]
        ]
        assert len(read_labelled(tmp_path / place, val)) == len(found) - 5
        with pytest.raises(UserError, match=f"pass --split with one of train, {val}"):
            read_labelled(tmp_path / place)


def test_imagenette_gets_its_names(found, tmp_path):
    wnids = list(IMAGENETTE)[:3]
    as_folder(tmp_path, found, classes=wnids, split="val")
    assert read_labelled(tmp_path, "val").classes == ["tench", "English springer", "cassette player"]


def test_shards_keep_a_column_of_labels(found, tmp_path):
    rows = ["image,caption,kind"]
    for number, (label, data) in enumerate(found):
        (tmp_path / f"{number}.png").write_bytes(data)
        rows.append(f"{number}.png,caption {number},{CLASSES[label] if number else ''}")
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    build(
        [str(tmp_path / "a.csv")],
        tmp_path / "shards",
        Reading(),
        Checking(),
        Splitting(val=0.0, test=0.0),
        Work(1),
    )
    data = read_labelled(tmp_path / "shards", label_column="kind")
    assert data.classes == CLASSES
    assert len(data) == len(found) - 1
    assert [reason for _, reason in data.unlabelled] == ["no label"]
    opaque = {content: CLASSES[label] for label, content in found}
    kept = [(name, content) for name, content in contents(data) if content in opaque]
    assert len(kept) == len(found) - 1 - 3  # three were see-through, and were composited by the build
    assert all(opaque[content] == name for name, content in kept)
    with pytest.raises(UserError, match="no column 'label' was kept in its samples; it has kind"):
        read_labelled(tmp_path / "shards")


def test_what_cannot_be_used_is_counted_and_named(found, tiny_model, tmp_path):
    path = as_csv(tmp_path / "csv", found)
    (path.parent / "damaged.png").write_bytes(found[0][1][:-20])
    (tmp_path / "secret.png").write_bytes(found[0][1])
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
    assert len(features.labels) == len(features.numbers) == len(features.image_features) == len(found)
    assert len(data) + len(data.unlabelled) == len(found) + len(bad) + 1


def test_pixels_are_those_of_the_models_own_preprocessing_on_white(found, tiny_model, tmp_path):
    clip, data = load(tiny_model), read_labelled(as_folder(tmp_path, found))
    images = LabelledImages(data, clip)
    for number, (_, content) in enumerate(found[:3]):
        (tmp_path / "one").write_bytes(content)
        image = Image.open(tmp_path / "one").convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        pixels, usable = images[number]
        assert usable
        torch.testing.assert_close(
            (pixels.float() / 255 - clip.towers.mean) / clip.towers.std, clip.preprocess(flat)
        )


def test_cached_features_are_the_fresh_ones_until_weights_or_pictures_change(
    found, tiny_model, tmp_path, monkeypatch
):
    clip, data = load(tiny_model), read_labelled(as_folder(tmp_path / "a", found))
    cache = tmp_path / "cache"
    fresh = image_features(clip, data, World(), Inference(6, 0))
    first = image_features(clip, data, World(), Inference(6, 0), cache)
    (file,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("eval.classify.features.embed_rows", None)  # would be called
        again = image_features(
            clip, read_labelled(as_csv(tmp_path / "b", found)), World(), Inference(9, 0), cache
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


def test_a_feature_that_is_not_finite_names_its_image(found, tiny_model, tmp_path):
    data = read_labelled(as_folder(tmp_path, found))
    rows, usable = embed_rows(load(tiny_model), data, World(), Inference(8, 0))
    rows[9, 2] = torch.nan
    with pytest.raises(NotFinite, match=f"image {data.names[9]}"):
        usable_rows(data, rows, usable)


def test_mistakes_are_sentences(found, tiny_model, tmp_path):
    path = as_csv(tmp_path / "csv", found)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" * 8)
    cars = as_cars(tmp_path / "cars", found)
    (cars / "devkit" / "cars_train_annos.mat").write_bytes(b"no mat" * 50)
    for place, options, words in (
        (tmp_path / "none", {}, "no such file or folder"),
        (tmp_path / "empty", {}, "one folder of pictures per class is wanted"),
        (path, {"label_column": "class"}, "no column 'class'; it has 'image', 'label'"),
        (path, {"split": "val"}, "a file is one split"),
        (tmp_path / "bad.parquet", {}, "cannot be read as Parquet"),
        (cars, {"split": "train"}, "not as Stanford Cars is published"),
        (cars, {"split": "test"}, "pass --split with one of train"),
        (as_folder(tmp_path / "flat", found), {"split": "val"}, "has no splits"),
    ):
        with pytest.raises(UserError, match=words):
            read_labelled(Path(place), **options)
    (tmp_path / "blank" / "one").mkdir(parents=True)
    (tmp_path / "blank" / "one" / "a.png").write_bytes(png(Image.new("RGB", (9, 9))))
    data = read_labelled(tmp_path / "blank")
    with pytest.raises(UserError, match=r"none of 1 images can be read .the first: blank image"):
        image_features(load(tiny_model), data, World(), Inference(2, 0))
