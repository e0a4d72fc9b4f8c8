"""Degraded images are as documented, and no degradation scores what the images themselves score."""

import json

import numpy as np
import pytest
from PIL import Image

from data_prep.shards import Shards
from eval.embed import embed
from eval.options import Inference
from eval.retrieval.command import retrieval
from eval.retrieval.robustness import LEVELS, center_crop_gain, curves, degrade
from eval.retrieval.score import evaluate_features
from train.model.clip import load
from train.world import World


def test_degradations_of_an_image():
    ramp = Image.fromarray(np.arange(64 * 48 * 3, dtype=np.uint32).reshape(48, 64, 3).astype(np.uint8))
    assert degrade("crop", 0.5)(ramp).tobytes() == ramp.crop((16, 12, 48, 36)).tobytes()
    assert degrade("resample", 1)(ramp).tobytes() == ramp.tobytes()
    assert degrade("blur", 0)(ramp).tobytes() == ramp.tobytes()
    for degradation, levels in LEVELS.items():
        for level in levels:
            changed = degrade(degradation, level)(ramp)
            assert changed.mode == "RGB"
            assert (changed.size == ramp.size) == (degradation != "crop")
    assert degrade("crop", 0.5)(Image.new("RGB", (1, 1))).size == (1, 1)


def test_no_degradation_changes_nothing(tiny_model, icon_shards, monkeypatch):
    monkeypatch.setattr("eval.retrieval.robustness.LEVELS", {"crop": (1.0, 0.5)})
    shards, clip = Shards(icon_shards, "val"), load(tiny_model)
    embedded = embed(clip, shards, World(), Inference(16, 0))
    undegraded, half = curves(clip, shards, embedded, World(), Inference(16, 0))["crop"]
    assert (
        undegraded["image_to_text/R@1"]
        == evaluate_features(embedded, shards.groups, World())["metrics"]["image_to_text/R@1"]
    )
    # itself, except for images that tie
    assert undegraded["image_to_image/R@1"] == pytest.approx(1, abs=0.05)
    assert half["level"] == 0.5


def test_the_gain_of_cropping_is_the_difference_of_the_two_recalls(tiny_model, icon_shards, monkeypatch):
    shards, clip, inference = Shards(icon_shards, "val"), load(tiny_model), Inference(16, 0)
    embedded = embed(clip, shards, World(), inference)
    whole = evaluate_features(embedded, shards.groups, World())["metrics"]["image_to_text/R@1"]
    for kept in (1.0, 0.9, 0.5):
        monkeypatch.setattr("eval.retrieval.robustness.CENTER_CROP", kept)
        monkeypatch.setattr("eval.retrieval.robustness.LEVELS", {"crop": (kept,)})
        (cropped,) = curves(clip, shards, embedded, World(), inference)["crop"]
        gain = center_crop_gain(clip, shards, embedded, World(), inference)
        assert gain.value == pytest.approx(cropped["image_to_text/R@1"] - whole)
        assert gain.low <= gain.value <= gain.high
    monkeypatch.setattr("eval.retrieval.robustness.MAX_CROPPED", 7)
    monkeypatch.setattr("eval.retrieval.robustness.CENTER_CROP", 1.0)
    # Seven images in batches of other sizes: the features differ by rounding.
    assert center_crop_gain(clip, shards, embedded, World(), inference).value == pytest.approx(0, abs=0.15)


def test_the_command_prints_the_curve(tiny_model, icon_shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("eval.retrieval.robustness.LEVELS", {"blur": (0.05,)})
    retrieval(
        tiny_model,
        icon_shards,
        json=tmp_path / "a.json",
        page=tmp_path / "a.html",
        split="val",
        robustness=True,
        inference=Inference(workers=0),
    )
    assert "| blur 0.05 " in capsys.readouterr().out
    assert (tmp_path / "a.html").read_text().count("<svg") == 4  # three directions and blur
    assert min(Image.open(tmp_path / "a.png").size) > 300
    assert json.loads((tmp_path / "a.json").read_text())["robustness"]["blur"][0]["level"] == 0.05
