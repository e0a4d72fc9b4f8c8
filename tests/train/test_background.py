"""The background of transparent images is part of the model: of the shards that trained it, in its config."""

import json

import numpy as np
import open_clip
import torch
from conftest import ICONS, noise_image, png, save_tiny
from PIL import Image
from runs import recipe, trained

from data_prep.build.pipeline import Checking, Parallelism, Splitting, build
from data_prep.shards import Shards
from eval.search.query import image_query
from train.model.clip import load


def see_through(side: int = 24) -> Image.Image:
    """Opaque on the left; on the right transparent, over a color that must not be seen."""
    image = noise_image(side, side).convert("RGBA")
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (side // 2, 0, side, side))
    image.putalpha(alpha)
    return image


def test_a_run_takes_the_background_of_its_shards(tiny_model, icon_folder, tmp_path, monkeypatch):
    rows = (icon_folder / "icons.csv").read_text().splitlines()[:61]
    (tmp_path / "few.csv").write_text("\n".join(rows) + "\n")
    reading = ICONS.__class__(**{**ICONS.__dict__, "images": str(icon_folder)})
    build([str(tmp_path / "few.csv")], tmp_path / "shards", reading, Checking(background="navy"),
          Splitting(val=0.1, test=0.0), Parallelism(1), min_shards=1)  # fmt: skip
    assert Shards(tmp_path / "shards", "train").background == "#000080"
    plan = recipe(tiny_model, tmp_path / "shards", tmp_path / "run", epochs=1, workers=0)
    trained(plan)
    best = tmp_path / "run" / "checkpoints" / "best"
    config = json.loads((best / "open_clip_config.json").read_text())
    assert config["preprocess_cfg"]["background"] == "#000080"
    assert load(str(tmp_path / "run")).background == (0, 0, 128)
    open_clip.create_model_and_transforms(f"local-dir:{best}")  # ignores it


def test_queries_are_composited_on_it(tmp_path):
    save_tiny(tmp_path)
    file = tmp_path / "open_clip_config.json"
    white = (255, 255, 255)
    for color, rgb in (("#ff0000", (255, 0, 0)), ("red; import os", white), (None, white)):
        config = json.loads(file.read_text())
        config["preprocess_cfg"]["background"] = color
        file.write_text(json.dumps(config))
        clip = load(f"local-dir:{tmp_path}")
        assert clip.background == rgb
        image = see_through()
        expected = np.array(image.convert("RGB"))
        expected[:, 12:] = rgb
        with torch.inference_mode():
            pixels = clip.eval_transform(Image.fromarray(expected))[None]
            features = clip.towers.eval().image_features(pixels)
        assert torch.equal(image_query(clip, png(image), "the query"), features)
