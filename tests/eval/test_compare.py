"""Two models side by side, and WiSE-FT between them."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import build_icons, save_tiny
from labelled_formats import CLASSES, as_folder, labelled_images
from PIL import Image
from safetensors.torch import load_file, save_file

from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.bases.command import bases
from eval.classify.labelled import read_labelled
from eval.classify.templates import read_templates
from eval.classify.zeroshot import evaluate
from eval.compare.command import compare, confusion
from eval.compare.compare import calibration_error
from eval.compare.wise_ft import mix
from eval.embed import Captions, Embedded, embed
from eval.options import Inference
from eval.retrieval.ranking import Relevance
from train.model.clip import load
from train.world import World


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_model) -> tuple[str, str]:
    """The tiny model, and the same a step away."""
    folder = tmp_path_factory.mktemp("tuned")
    shutil.copytree(tiny_model.removeprefix("local-dir:"), folder, dirs_exist_ok=True)
    weights = load_file(folder / "open_clip_model.safetensors")
    generator = torch.Generator().manual_seed(3)
    save_file(
        {
            name: each + 0.02 * torch.randn(each.shape, generator=generator) if each.dim() else each
            for name, each in weights.items()
        },
        folder / "open_clip_model.safetensors",
    )
    return tiny_model, f"local-dir:{folder}"


def test_wise_ft_ends_in_the_two_models(pair, icon_shards, tmp_path):
    base, tuned = (load(name) for name in pair)
    shards = Shards(icon_shards, "val")
    for share, end in ((0.0, base), (1.0, tuned)):
        mixed = mix(base, tuned, share)
        assert mixed.fingerprint() == end.fingerprint()
        found, expected = (embed(clip, shards, World(), Inference(16, 0)) for clip in (mixed, end))
        assert torch.equal(found.image_features, expected.image_features)
    half = mix(base, tuned, 0.5)
    for name, tensor in half.towers.model.state_dict().items():
        if tensor.is_floating_point():
            ends = (clip.towers.model.state_dict()[name] for clip in (base, tuned))
            torch.testing.assert_close(tensor, sum(ends) / 2)
    (tmp_path / "wide").mkdir()
    wide = load(f"local-dir:{save_tiny(tmp_path / 'wide', embed_dim=24)}")
    with pytest.raises(UserError, match="different architectures"):
        mix(base, wide, 0.5)


def test_calibration_error_by_hand():
    """Four images, two texts: sure of the right one by 0.9 and 0.6, of the wrong one by 0.6, and torn."""
    sure = np.array([0.9, 0.6, 0.6, 0.5])
    margin = np.log(sure / (1 - sure))
    images = torch.tensor(np.stack([margin, np.zeros(4)], 1), dtype=torch.float32)
    captions = Captions(["a", "b"], np.zeros(4, int), np.array([0, 1]), np.array([7, 8]), np.array([0, 2]))
    relevance = Relevance(np.array([7, 7, 8, 7]), captions.text_of, captions.group_of)
    found = calibration_error(Embedded(images, torch.eye(2), captions), relevance, 1.0)
    assert found == pytest.approx((abs(0.9 - 1) + abs(0.6 + 0.6 - 1) + abs(0.5 - 0.5)) / 4, abs=1e-6)


def test_the_command_writes_a_page_a_table_and_a_mixture(pair, icon_folder, icon_shards, tmp_path, capsys):
    build_icons(icon_folder, tmp_path / "retention", val=0.1, test=0.3, seed=5)
    as_folder(tmp_path / "labelled", labelled_images())
    more = {
        "retention_set": tmp_path / "retention",
        "labelled": tmp_path / "labelled",
        "wise_ft": (0.0, 0.5, 1.0),
        "save": 0.5,
    }
    compare(pair, icon_shards, "val", out=tmp_path / "out", inference=Inference(workers=0), **more)
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    base, tuned = result["models"]
    assert "differences" not in base
    value, low, high, p = tuned["differences"]["text_to_image/R@1"]
    assert value == pytest.approx(
        tuned["metrics"]["text_to_image/R@1"] - base["metrics"]["text_to_image/R@1"]
    )
    assert low <= value <= high
    assert 0 < p <= 1
    assert 0 < tuned["drift"]["image_cosine"] < 1
    assert 0 <= base["metrics"]["calibration_error"] <= 1
    for place, found in (("", result), ("retention/", result["retention"])):
        for share, model in ((0, found["models"][0]), (2, found["models"][1])):
            assert result["wise_ft"][share][f"{place}mean/R@1"] == model["metrics"]["mean/R@1"]
    for model in (base, tuned):
        classified = evaluate(
            load(model["model"]),
            read_labelled(tmp_path / "labelled"),
            CLASSES,
            read_templates("simple"),
            World(),
        )
        assert model["zeroshot"]["metrics"] == classified.result["metrics"]
        row = next(line for line in printed.splitlines() if line.startswith("| zero-shot, top-1 "))
        assert f"{100 * model['zeroshot']['metrics']['top1']:.1f} %" in row
    change = tuned["zeroshot"]["metrics"]["top1"] - base["zeroshot"]["metrics"]["top1"]
    assert tuned["zeroshot"]["difference"][0] == pytest.approx(change)
    confusion(pair, icon_shards, "val", json=tmp_path / "confusion.json", inference=Inference(workers=0))
    alone = json.loads((tmp_path / "confusion.json").read_text())
    assert alone.pop("models")[1]["heatmap"] == result["confusion"]["models"][1]["heatmap"]
    assert alone == {name: result["confusion"][name] for name in alone}
    assert load(result["saved"]).fingerprint() == mix(load(pair[0]), load(pair[1]), 0.5).fingerprint()
    assert (tmp_path / "out" / "compare.md").read_text() in printed
    page = (tmp_path / "out" / "compare.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)|url\((?!#)|@import|<script", page)
    assert page.count("<figure") % 3 == 0
    assert page.count("<figure") > 3
    assert page.count("<svg") == 4  # three directions and WiSE-FT
    for name in ("compare.png", "heatmaps.png", "wise_ft.png"):
        assert min(Image.open(tmp_path / "out" / name).size) > 300


def test_mistakes_are_sentences(pair, icon_shards):
    with pytest.raises(UserError, match="two models or more"):
        compare(pair[:1], icon_shards)
    with pytest.raises(UserError, match="--wise-ft 2: must be from 0"):
        compare(pair, icon_shards, wise_ft=(0.5, 2))
    with pytest.raises(UserError, match=r"--save 1\.5: must be from 0"):
        compare(pair, icon_shards, save=1.5)


def test_names_are_checked_before_models_are_evaluated(pair, icon_shards, tmp_path, monkeypatch):
    def evaluated(*_):
        raise AssertionError("a model was evaluated")

    monkeypatch.setattr("eval.compare.compare.evaluate_all", evaluated)
    monkeypatch.setattr("eval.compare.confusion.ask", evaluated)
    monkeypatch.setattr("eval.bases.rank.evaluate_base", evaluated)
    for name, found in (("ViT-B-23:none", "did you mean"), (f"local-dir:{tmp_path / 'x'}", "no folder")):
        for command in (compare, confusion, bases):
            with pytest.raises(UserError, match=found):
                command((pair[0], name), icon_shards, "val")


def test_a_mixture_of_an_earlier_comparison_is_said(pair, icon_shards, tmp_path, capsys):
    for save, is_said in ((0.5, False), (None, True)):
        compare(pair, icon_shards, "val", out=tmp_path, save=save, inference=Inference(workers=0))
        assert ("mixture of an earlier comparison" in capsys.readouterr().err) == is_said
        assert json.loads((tmp_path / "compare.json").read_text()).get("saved_alpha") == save
