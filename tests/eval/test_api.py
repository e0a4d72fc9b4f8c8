"""`import cliptune`: features as in an index, of files and PIL images of any kind; results as of `search`."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, noise_image
from PIL import Image

import cliptune
from eval.options import Inference
from eval.search.command import embed, search


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Opaque, transparent, rotated, gray, 16-bit, palette and CMYK images."""
    folder = tmp_path_factory.mktemp("files")
    image = noise_image(40, 30)
    rgba = np.dstack([np.asarray(image), np.tile(np.arange(40, dtype=np.uint8) * 6, (30, 1))])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    levels = np.random.default_rng(1).integers(0, 65536, (30, 40), dtype=np.uint16)
    palette = image.quantize(16)
    palette.info["transparency"] = 3
    image.save(folder / "a_rgb.png")
    Image.fromarray(rgba).save(folder / "b_rgba.png")
    Image.fromarray(rgba).convert("LA").save(folder / "c_la.png")
    image.save(folder / "d_turned.jpg", exif=exif, quality=90)
    Image.fromarray(rgba).save(folder / "e_turned.png", exif=exif)
    image.convert("L").save(folder / "f_gray.png")
    Image.fromarray(levels).save(folder / "g_16bit.png")
    palette.save(folder / "h_palette.png", transparency=3)
    image.convert("CMYK").save(folder / "i_cmyk.jpg")
    Image.fromarray(rgba).save(folder / "j_rgba.webp", lossless=True)
    image.save(folder / "k_plain.jpg")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def model(tiny_model) -> cliptune.Model:
    return cliptune.load(tiny_model, device="cpu")


def test_features_are_those_of_an_index_for_paths_and_for_pil_images(files, model, tiny_model, tmp_path):
    embed(tiny_model, files[0].parent, tmp_path / "index", inference=Inference(workers=0))
    index = cliptune.Index(tmp_path / "index")
    assert index.index.keys == [path.name for path in files]
    by_path = model.encode_images(files)
    assert (by_path.dtype, by_path.shape) == (np.float32, (len(files), 16))
    assert np.array_equal(by_path.astype(np.float16), index.features)
    assert np.allclose(np.linalg.norm(by_path, axis=1), 1, atol=1e-6)
    for images in ([str(path) for path in files], [Image.open(path) for path in files]):
        assert np.array_equal(model.encode_images(images), by_path)
    assert np.allclose(model.encode_images(files, batch_size=3, workers=2), by_path, atol=1e-6)
    assert np.allclose(model.encode_images(files[1]), by_path[1], atol=1e-6)
    assert model.encode_images([]).shape == (0, 16)
    assert np.array_equal(model.encode_images(path for path in files), by_path)


def test_a_model_is_a_folder_a_run_or_a_name(model, tiny_model, tuned_run, files):
    folder = tiny_model.removeprefix("local-dir:")
    expected = model.encode_images(files)
    for name in (folder, Path(folder), tiny_model):
        assert np.array_equal(cliptune.load(name, device="cpu").encode_images(files), expected)
    run = cliptune.load(tuned_run[0], device="cpu").encode_images(files)
    assert not np.allclose(run, expected)
    best = cliptune.load(tuned_run[0] / "checkpoints" / "best", device="cpu")
    assert np.array_equal(best.encode_images(files), run)
    assert cliptune.load("demo-vit:none", device="cpu").encode_texts(["a", "b"]).shape[0] == 2
    with pytest.raises(cliptune.UserError, match="no model 'nothing'"):
        cliptune.load("nothing")


def test_the_background_is_that_of_the_model(model, tiny_model, files, tmp_path):
    shutil.copytree(tiny_model.removeprefix("local-dir:"), tmp_path / "black")
    config = json.loads((tmp_path / "black" / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["background"] = "#000000"
    (tmp_path / "black" / "open_clip_config.json").write_text(json.dumps(config))
    black = cliptune.load(tmp_path / "black", device="cpu")
    transparent = Image.open(files[1])
    canvas = Image.new("RGBA", transparent.size, "black")
    canvas.alpha_composite(transparent)
    composited = model.encode_images(canvas.convert("RGB"))
    for image in (files[1], transparent):
        assert np.array_equal(black.encode_images(image), composited)
        assert not np.allclose(model.encode_images(image), composited, atol=1e-3)


def test_texts_and_ranks(model, files):
    texts = ["a bell", "a house", "a slash"]
    features = model.encode_texts(texts)
    assert (features.dtype, features.shape) == (np.float32, (3, 16))
    assert np.allclose(model.encode_texts("a house"), features[1], atol=1e-6)
    assert model.encode_texts([]).shape == (0, 16)
    assert np.array_equal(model.encode_texts(text for text in texts), features)
    assert model.rank(texts[1], images=iter(files)) == model.rank(texts[1], images=files)
    images = model.encode_images(files)
    ranked = model.rank("a bell", images=files, k=4)
    order = np.argsort(-(images @ features[0]))[:4]
    assert [path for path, _ in ranked] == [files[number] for number in order]
    assert np.allclose([cosine for _, cosine in ranked], (images @ features[0])[order], atol=1e-6)
    best = model.rank(files[2], texts=texts)
    assert best[0][0] == texts[int(np.argmax(features @ images[2]))]
    by_features = model.rank(images[2], texts=texts)
    assert [text for text, _ in by_features] == [text for text, _ in best]
    assert model.logit_scale == pytest.approx(model.clip.towers.model.logit_scale.exp().item())


def test_a_search_gives_what_the_command_finds(icon_index, icon_folder, tmp_path):
    index = cliptune.Index(icon_index)
    assert "images)" in repr(index)
    search(icon_index, text="a bell", filter=("split=train",), k=7, json=tmp_path / "found.json")
    expected = json.loads((tmp_path / "found.json").read_text())["results"]
    assert index.search("a bell", k=7, filters=["split=train"]) == expected
    path = next(icon_folder.rglob("*.png"))
    by_path = index.search(path, k=3, all_variants=True)
    assert by_path == index.search(Image.open(path), k=3, all_variants=True)
    assert by_path == index.search(index.model.encode_images(path), k=3, all_variants=True)
    assert by_path[0]["score"] == pytest.approx(1, abs=2e-3)


def test_mistakes_are_one_sentence(model, icon_index, files, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    damaged = files[0].read_bytes()[:200]
    (tmp_path / "cut.png").write_bytes(damaged)
    index = cliptune.Index(icon_index)
    for call, words in (
        (lambda: model.encode_images([files[0], tmp_path / "gone.png"]), r"gone\.png: cannot be read \(No"),
        (lambda: model.encode_images([tmp_path / "text.png"], workers=1), r"text\.png: not an image"),
        (lambda: model.encode_images([tmp_path / "cut.png"]), r"cut\.png: truncated image"),
        (lambda: model.encode_images([Image.open(tmp_path / "cut.png")]), r"images\[0\]: "),
        (lambda: model.encode_images([3]), r"images\[0\]: int is neither a path nor a PIL image"),
        (lambda: model.encode_texts(["a", None]), r"texts\[1\] is NoneType, not a str: None"),
        (lambda: model.rank("a bell"), r"pass images=\[\.\.\.\] or texts="),
        (lambda: index.search("a", k=0), "k=0: must be at least 1"),
        (lambda: index.search("a", filters=["nothing=1"]), "no column 'nothing'"),
        (lambda: index.search(np.zeros(3)), r"are \[16\], not \[3\]"),
        (lambda: cliptune.Index(tmp_path), "no index there; make one"),
        (lambda: index.search(["a bell", "a house"]), r"one sentence \(str\).*, not list; pass them one at"),
        (lambda: model.rank(["a bell"], images=files), "not list; pass them one at a time"),
        (lambda: model.rank("a bell", images="a.png"), "images is one str; pass a list"),
        (lambda: model.encode_images(None), "images=None: must be a list"),
        (lambda: model.encode_images(files, workers=-2), "workers=-2: must be at least 0"),
        (lambda: model.encode_images(files, batch_size=0), "batch_size=0: must be at least 1"),
        (lambda: model.encode_texts(["a"], batch_size=0), "batch_size=0: must be at least 1"),
    ):
        with pytest.raises(cliptune.UserError, match=words) as error:
            call()
        assert "Traceback" not in str(error.value)
    with pytest.raises(AttributeError, match="it has Index, Model, UserError, load"):
        _ = cliptune.nothing


def test_the_example_runs(tiny_model, files, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["find_images.py", tiny_model, "a bell", *map(str, files)])
    runpy.run_path(str(ROOT / "examples" / "find_images.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "'a bell' is nearest to:"
    assert len(lines) == 1 + 5 + 1 + 3
    for arguments in ([], [tiny_model, "a bell"]):
        monkeypatch.setattr(sys, "argv", ["find_images.py", *arguments])
        with pytest.raises(SystemExit, match=r"usage: .* MODEL SENTENCE IMAGE"):
            runpy.run_path(str(ROOT / "examples" / "find_images.py"), run_name="__main__")


def test_the_code_of_the_documentation_runs(tuned_run, icon_shards, tmp_path, monkeypatch, capsys):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(tuned_run[0])
    for name in ("bell.png", "house.png"):
        noise_image().save(tmp_path / name)
    embed(str(tuned_run[0]), icon_shards, tmp_path / "index", inference=Inference(workers=0))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    (tmp_path / "code.py").write_text(code)
    runpy.run_path("code.py")
    assert len(capsys.readouterr().out.splitlines()) == 2 + 1 + 1 + 5
