"""LoRA: merged weights give the adapted model's features, a resumed run is the same bit for bit, and every
adapter of every kind of tower receives a gradient.
"""

import shutil

import open_clip
import pytest
import torch
from conftest import TINY, save_tiny
from runs import CANDIDATES, assert_bit_equal, assert_equal_weights, newest, recipe, trained
from safetensors.torch import load_file

from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.embed import embed
from eval.options import INFERENCE
from train.model.clip import load
from train.model.lora import adapt, merged
from train.model.towers import Towers
from train.world import World


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory) -> str:
    """Two layers in each tower, so that there are blocks to compile and to checkpoint."""
    changes = {tower: {**TINY[tower], "layers": 2} for tower in ("vision_cfg", "text_cfg")}
    return f"local-dir:{save_tiny(tmp_path_factory.mktemp('two'), **changes)}"


@pytest.mark.parametrize(
    "options",
    [{}, {"activation_checkpointing": "full", "micro_batch_size": 12}, {"ema": 0.9, "wise_ft": (0.4,)}],
    ids=str,
)
def test_the_export_is_a_plain_model_with_the_adapted_features(two_layers, icon_shards, tmp_path, options):
    plan = {"epochs": 1, "workers": 0, "lora_rank": 3, "save_every_minutes": 9, **options}
    validated = []  # features of the initial model, then of each candidate; the last one is the best

    def validate(clip, world):
        embedded = embed(clip, Shards(icon_shards, "val"), world, INFERENCE)
        validated.append((embedded.image_features, embedded.text_features))
        return {"val/mean/R@1": 0.1 * len(validated)}

    run = trained(recipe(two_layers, icon_shards, tmp_path / "run", **plan), validate)
    exported, initial = load(str(run.folder)), load(two_layers)
    embedded = embed(exported, Shards(icon_shards, "val"), World(), INFERENCE)
    features = embedded.image_features, embedded.text_features
    assert len(validated) == (4 if "ema" in options else 2)
    for adapted, plain, before in zip(validated[-1], features, validated[0], strict=True):
        torch.testing.assert_close(adapted, plain, rtol=0, atol=1e-5)
        assert (plain - before).abs().max() > 1e-3
    before, after = initial.towers.model.state_dict(), exported.towers.model.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    adapted = ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")
    matrices = {name for name in changed if name.endswith(adapted)}
    assert len(matrices) == 2 * 2 * 4
    assert changed - matrices == {"logit_scale"}


def test_resumed_equals_uninterrupted(two_layers, icon_shards, tmp_path, one_thread):
    options = {"epochs": 2, "workers": 0, "keep_checkpoints": 99, "lora_rank": 2, **CANDIDATES}
    whole = trained(recipe(two_layers, icon_shards, tmp_path / "whole", **options)).folder
    parts = shutil.copytree(whole, tmp_path / "parts", symlinks=True)
    for checkpoint in (parts / "checkpoints").glob("samples-*"):
        if int(checkpoint.name.removeprefix("samples-")) > 192:
            shutil.rmtree(checkpoint)
    (parts / "status.json").unlink()
    trained(recipe(two_layers, icon_shards, parts, **options))
    assert_bit_equal(whole, parts)
    for file in ("training.safetensors", "ema.safetensors"):
        assert_equal_weights(*(load_file(newest(run) / file) for run in (whole, parts)))


TEXT = {**TINY["text_cfg"], "vocab_size": 100, "layers": 2}
SIGLIP = {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
TIMM = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map", "timm_proj": "none", "image_size": 224}
RESNET = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32}
TOWERS = {"timm": (TIMM, SIGLIP, 192), "ResNet": (RESNET, TEXT, 16)}  # vision, text, width


@pytest.mark.parametrize("name", TOWERS)
def test_every_adapter_receives_a_gradient(name):
    """Otherwise adapt() raises."""
    vision, text, width = TOWERS[name]
    torch.manual_seed(0)
    towers = Towers(open_clip.CustomTextCLIP(width, vision, text), (0.5,) * 3, (0.5,) * 3)
    before = {name: tensor.clone() for name, tensor in towers.model.state_dict().items()}
    adapt(towers, 2, 0)
    assert_equal_weights(merged(towers.model.state_dict()), before)
    adapted = {name for name in towers.state_dict() if name.endswith(".0.A")}
    assert {name.split(".")[1] for name in adapted} == {"visual", "text"}


def test_a_matrix_without_influence_on_features_is_an_error(tiny_model):
    clip = load(tiny_model)
    clip.towers.model.visual.unused = torch.nn.Linear(4, 4)
    with pytest.raises(
        UserError, match=r"--lora-rank 2: features do not depend on visual\.unused\.param.*\.weight\.0\.A"
    ):
        adapt(clip.towers, 2, 0)
