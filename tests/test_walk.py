"""From files as people have them to a published model and back: one R@1 in every library.

SVG and transparent PNG -> cliptune build -> train -> retrieval -> publish -> a hub on the loopback
    -> cliptune, open_clip, transformers, sentence-transformers, onnxruntime
"""

import csv
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
import webdataset
from huggingface_hub import hf_hub_download
from PIL import Image, ImageDraw, ImageOps
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

import cliptune
from train.metrics import DIRECTIONS, INSTANCE

COLORS = ("red", "blue", "green", "orange", "black", "purple")
SHAPES = {"disc": "circle", "square": "rect", "frame": "frame", "bar": "bar"}
SIDE_PX = 32  # the size of demo-vit, because transformers and open_clip resize by other code
REPO = "me/clip"


def draw(folder: Path) -> None:
    """192 images, half of them SVG and half transparent PNG; pairs.csv names them."""
    rows = []
    combinations = itertools.product(SHAPES, COLORS, ("small", "large"), ("left", "right"), ("top", "bottom"))
    for number, (shape, color, size, x, y) in enumerate(combinations):
        side = {"small": 8, "large": 14}[size]
        left, top = {"left": 1, "right": 17}[x], {"top": 1, "bottom": 17}[y]
        height = side // 3 if shape == "bar" else side
        name = f"{number:03}.{'svg' if number % 2 else 'png'}"
        if number % 2:
            style = (
                f'fill="none" stroke="{color}" stroke-width="2"' if shape == "frame" else f'fill="{color}"'
            )
            box = f'x="{left}" y="{top}" width="{side}" height="{height}" {style}'
            if shape == "disc":
                box += f' rx="{side // 2}"'
            text = f'<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32"><rect {box}/></svg>'
            (folder / name).write_text(text)
        else:
            image = Image.new("RGBA", (SIDE_PX, SIDE_PX), (0, 0, 0, 0))
            place, pen = (left, top, left + side, top + height), ImageDraw.Draw(image)
            if shape == "disc":
                pen.ellipse(place, color)
            else:
                pen.rectangle(place, None if shape == "frame" else color, color, 2)
            image.save(folder / name)
        rows.append((name, f"a {size} {color} {shape} at the {y} {x}", shape + color + size))
    with open(folder / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "text", "product"), *rows])


def test_pairs(shards: Path, originals: Path) -> tuple[list[Image.Image], list[str]]:
    """The test split as webdataset reads it; a PNG as a person opens the original, by the card's lines. No
    library renders SVG: there it is the PNG that the build made.
    """
    images, texts = [], []
    tars = sorted(str(path) for path in (shards / "test").glob("*.tar"))
    for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False):
        name = json.loads(sample["json"])["image"]
        data = sample["png"] if name.endswith(".svg") else (originals / name).read_bytes()
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        images.append(Image.alpha_composite(background, image).convert("RGB"))
        texts.append(sample["txt"].decode())
    return images, texts


test_pairs.__test__ = False
Features = tuple[np.ndarray, np.ndarray]


def by_cliptune(images: list[Image.Image], texts: list[str]) -> Features:
    model = cliptune.load(f"hf-hub:{REPO}")
    return model.encode_images(images), model.encode_texts(texts)


def by_open_clip(images: list[Image.Image], texts: list[str]) -> Features:
    model, _, preprocess = open_clip.create_model_and_transforms(f"hf-hub:{REPO}")
    tokens = open_clip.get_tokenizer(f"hf-hub:{REPO}")(texts)
    pixels = torch.stack([preprocess(image) for image in images])
    return model.eval().encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)


def by_transformers(images: list[Image.Image], texts: list[str]) -> Features:
    model = AutoModelForZeroShotImageClassification.from_pretrained(REPO)
    inputs = AutoProcessor.from_pretrained(REPO)(
        text=texts, images=images, return_tensors="pt", padding=True, truncation=True
    )
    outputs = model(**inputs)
    return outputs.image_embeds, outputs.text_embeds


def by_sentence_transformers(images: list[Image.Image], texts: list[str]) -> Features:
    model = SentenceTransformer(REPO)
    return model.encode(images), model.encode(texts)


def by_onnxruntime(images: list[Image.Image], texts: list[str]) -> Features:
    inputs = AutoProcessor.from_pretrained(REPO)(
        text=texts, images=images, return_tensors="np", padding=True, truncation=True
    )
    towers = [
        onnxruntime.InferenceSession(hf_hub_download(REPO, f"onnx/{name}_model.onnx"))
        for name in ("vision", "text")
    ]
    return tuple(
        tower.run(None, {tensor.name: inputs[tensor.name] for tensor in tower.get_inputs()})[0]
        for tower in towers
    )


LIBRARIES: dict[str, Callable[[list[Image.Image], list[str]], Features]] = {
    "cliptune": by_cliptune,
    "open_clip": by_open_clip,
    "transformers": by_transformers,
    "sentence-transformers": by_sentence_transformers,
    "onnxruntime": by_onnxruntime,
}


@pytest.mark.slow
def test_one_recall_in_every_library(installed, hub, tmp_path):
    draw(installed.folder)
    columns = ["--image-column", "file", "--caption-column", "text", "--group-column", "product"]
    said = installed.run("cliptune", "build", "pairs.csv", "--out", "walk", *columns, "--test", 0.3)
    assert "192 rows = 192 records + 0 rejects" in said
    schedule = [
        "--epochs",
        30,
        "--global-batch-size",
        32,
        "--micro-batch-size",
        32,
        "--same-group",
        "negative",
    ]
    installed.run("cliptune", "train", "demo", "--data", "walk", "--run", "runs/walk", *schedule)
    installed.run("cliptune", "retrieval", "runs/walk", "--data", "walk", "--json", "walk.json")
    there = hub.environment(tmp_path / "hf")
    installed.run("cliptune", "export", "runs/walk", "--out", "exported", "--data", "walk", "--onnx")
    publish = ["exported", "--repo", REPO, "--results", "walk.json", "--license", "mit", "--yes"]
    said = installed.run("cliptune", "publish", *publish, **there)
    assert f"{REPO} v1 (commit" in said

    measured = json.loads((installed.folder / "walk.json").read_text())["metrics"]
    expected = [measured[f"{INSTANCE}{direction}/R@1"] for direction in DIRECTIONS]
    images, texts = test_pairs(installed.folder / "walk", installed.folder)
    assert len(set(texts)) == len(texts) > 30
    table = {}
    with torch.no_grad():
        for name, encode in LIBRARIES.items():
            image_features, text_features = map(np.asarray, encode(images, texts))
            scores = image_features @ text_features.T
            best = [(scores.argmax(axis) == np.arange(len(texts))).mean() for axis in (1, 0)]
            table[name] = [float(share) for share in best]
    print(json.dumps({"cliptune retrieval": expected, **table}, indent=1))
    assert 0.1 < expected[0] < 1
    for name, recalls in table.items():
        assert recalls == pytest.approx(expected), name
