"""Base weights are fetched into the cache or into a folder, and load from there as the hub has them."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from conftest import call, save_tiny
from safetensors.torch import load_file, save

from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.embed import embed
from eval.options import Inference
from train.loop import fit
from train.model.clip import load
from train.model.fetch import fetch
from train.recipe import Recipe
from train.world import World


@pytest.fixture
def tiny_files(tiny_model) -> dict[str, bytes]:
    folder = tiny_model.removeprefix("local-dir:")
    return {
        name: open(f"{folder}/{name}", "rb").read()
        for name in ("open_clip_config.json", "open_clip_model.safetensors")
    }


@pytest.fixture
def offline(monkeypatch):
    return lambda: monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_repository_of_the_hub_is_fetched_once_and_loads_offline(
    hub, offline, tiny_model, tiny_files, icon_shards, capsys
):
    hub.put("me/clip", tiny_files)
    fetch("hf-hub:me/clip")
    assert "HF_HUB_OFFLINE=1 python -m train RECIPE --model hf-hub:me/clip" in capsys.readouterr().out
    offline()
    requests = len(hub.log)
    clip = load("hf-hub:me/clip")
    assert clip.config == load(tiny_model).config
    shards = Shards(icon_shards, "val")
    embedded, expected = (
        embed(model, shards, World(), Inference(16, 0)) for model in (clip, load(tiny_model))
    )
    assert torch.equal(embedded.image_features, expected.image_features)
    assert torch.equal(embedded.text_features, expected.text_features)
    with pytest.raises(
        UserError,
        match=r"hf-hub:me/other: not in the cache.*HF_HUB_OFFLINE=1.*python -m train.fetch hf-hub:me/other$",
    ):
        load("hf-hub:me/other")
    assert len(hub.log) == requests


def test_an_older_version_is_named_by_its_tag(hub, offline, tiny_model, tiny_files, tmp_path):
    first = hub.put("me/clip", tiny_files)
    hub.repos["me/clip"].tags["v1"] = first
    hub.put("me/clip", {name: (save_tiny(tmp_path, embed_dim=24) / name).read_bytes() for name in tiny_files})
    assert load("hf-hub:me/clip@v1").fingerprint() == load(tiny_model).fingerprint()
    assert load("hf-hub:me/clip").fingerprint() == load(f"local-dir:{tmp_path}").fingerprint()
    offline()
    assert load("hf-hub:me/clip@v1").fingerprint() == load(tiny_model).fingerprint()
    with pytest.raises(UserError, match=r"not in the cache.*@v2"):
        load("hf-hub:me/clip@v2")


def test_a_folder_is_written_and_needs_no_network(hub, offline, tiny_model, tiny_files, tmp_path, capsys):
    hub.put("me/clip", tiny_files)
    fetch("hf-hub:me/clip", tmp_path / "base")
    assert f"--model local-dir:{tmp_path / 'base'}" in capsys.readouterr().out
    offline()
    shutil.rmtree(tmp_path / "hf")
    assert load(f"local-dir:{tmp_path / 'base'}").fingerprint() == load(tiny_model).fingerprint()
    with pytest.raises(UserError, match="already exists; pass another --out"):
        fetch("hf-hub:me/clip", tmp_path / "base")


def test_training_from_the_hub_equals_training_from_a_folder(
    hub, tiny_model, tiny_files, icon_shards, tmp_path
):
    hub.put("me/clip", tiny_files)
    options = {
        "epochs": 1,
        "global_batch_size": 48,
        "micro_batch_size": 48,
        "precision": "fp32",
        "activation_checkpointing": "none",
        "workers": 0,
    }
    weights = []
    for model in ("hf-hub:me/clip", tiny_model):
        run = fit(
            Recipe(model, str(icon_shards), str(tmp_path / model[:5]), **options),
            World(),
            lambda clip, world: {},
        )
        weights.append(load_file(run.folder / "checkpoints" / "best" / "open_clip_model.safetensors"))
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_command_line_on_a_node_without_a_network(hub, tiny_files, icon_shards, tmp_path):
    hub.put("me/clip", tiny_files)
    fetch("hf-hub:me/clip")
    here = {**hub.environment(tmp_path / "hf", token=None), "HF_HUB_OFFLINE": "1"}
    call(
        "eval",
        "retrieval",
        "hf-hub:me/clip",
        "--data",
        icon_shards,
        "--workers",
        0,
        "--json",
        tmp_path / "out.json",
        **here,
    )
    assert (
        json.loads((tmp_path / "out.json").read_text())["weights_sha256"]
        == load("hf-hub:me/clip").fingerprint()
    )


def test_a_tag_of_open_clip_comes_from_its_repository(hub, offline, capsys):
    """The smallest architecture that has one, 102 million parameters, in fp16."""
    torch.manual_seed(0)
    model = open_clip.create_model("RN50-quickgelu")
    half = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    hub.put("timm/resnet50_clip.cc12m", {"open_clip_model.safetensors": save(half)})
    with pytest.raises(UserError, match="did you mean 'RN50'"):
        fetch("RN51:cc12m")
    fetch("RN50-quickgelu:cc12m")
    assert "102.0 million parameters" in capsys.readouterr().out
    offline()
    clip = load("RN50-quickgelu:cc12m")
    for name, tensor in clip.towers.model.state_dict().items():
        assert torch.equal(tensor, half[name].float() if tensor.is_floating_point() else half[name]), name
    assert np.allclose(clip.config["preprocess_cfg"]["mean"], (0.48145466, 0.4578275, 0.40821073))
    with pytest.raises(
        UserError,
        match=r"RN50-quickgelu:yfcc15m: not in the cache.*python -m train.fetch RN50-quickgelu:yfcc15m",
    ):
        load("RN50-quickgelu:yfcc15m")


def test_a_name_without_a_scheme_is_explained():
    with pytest.raises(UserError, match="not a model; a MODEL is"):
        fetch("somewhere")
