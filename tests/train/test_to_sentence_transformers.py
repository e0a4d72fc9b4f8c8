"""SentenceTransformer opens an exported folder, its features have length 1 and are open_clip's."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import noise_image, save_tiny

from data_prep.errors import UserError
from train.export import folder as exporting
from train.export import to_sentence_transformers
from train.export.folder import export, table
from train.model.clip import load

CAPTIONS = ["a red brick", "it's 2x4, isn't it?", "日本語 ½ 👍", "word " * 100, "x"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_text_and_images_have_length_1_and_cosine_1(quick, dtype, tmp_path):
    from sentence_transformers import SentenceTransformer

    name, out, _ = quick
    if dtype != "fp32":
        out = tmp_path / "out"
        export(load(name), out, dtype)
    clip = load(name)
    clip.towers.eval()
    model = SentenceTransformer(str(out), device="cpu")
    images = [noise_image(32, 32), noise_image(32, 32).rotate(180)]  # the model's size: nothing is resized
    with torch.no_grad():
        image_features = clip.towers.model.encode_image(torch.stack([clip.preprocess(x) for x in images]))
        text_features = clip.towers.model.encode_text(clip.tokenizer(CAPTIONS))
    for inputs, expected in ((images, image_features), (CAPTIONS, text_features)):
        features = model.encode(inputs)
        tolerance = 1e-6 if dtype == "fp32" else 2e-3
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=tolerance)
        expected = F.normalize(expected, dim=-1).numpy()
        np.testing.assert_allclose((features * expected).sum(1), 1, atol=tolerance)
    assert model.max_seq_length == 77
    assert model.similarity_fn_name == "cosine"


def test_the_files_are_recorded_and_compared(quick):
    _, out, record = quick
    names = {name for name, file in record["files"].items() if file["format"] == "sentence_transformers"}
    assert names == set(to_sentence_transformers.FILES)
    assert json.loads((out / "1_Normalize" / "config.json").read_text()) == {}
    assert max(record["differences"]["sentence_transformers"].values()) <= 1e-6


def test_features_that_are_not_normed_are_noticed(quick, tmp_path, monkeypatch):
    only_clip = {"modules.json": to_sentence_transformers.FILES["modules.json"][:1]}
    monkeypatch.setattr(to_sentence_transformers, "FILES", to_sentence_transformers.FILES | only_clip)
    with pytest.raises(UserError, match=r"sentence_transformers .*norm by"):
        export(load(quick[0]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_without_the_library_its_files_are_not_written(tiny_model, tmp_path, monkeypatch):
    real = exporting._version
    monkeypatch.setattr(exporting, "_version", lambda name: None if "sentence" in name else real(name))
    record = export(load(tiny_model), tmp_path / "out")
    assert not (tmp_path / "out" / "modules.json").exists()
    assert 'pip install "sentence-transformers' in table(record)


def test_other_towers_have_none(tmp_path):
    save_tiny(tmp_path, vision_cfg={"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160})
    export(load(f"local-dir:{tmp_path}"), tmp_path / "out")
    assert not (tmp_path / "out" / "modules.json").exists()
