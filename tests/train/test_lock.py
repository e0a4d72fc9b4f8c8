"""A locked tower keeps its weights and statistics, in every family of towers; the rest is trained."""

import json

import open_clip
import pytest
import torch
from conftest import TINY, save_tiny
from runs import WEIGHTS, exported, metrics, newest, recipe, trained
from safetensors.torch import load_file
from torch import nn

import train.step
from benchmarks.memory import saved_bytes
from data_prep.errors import UserError
from train.model.activation_memory import dummy_batch
from train.model.clip import load
from train.model.towers import Towers, tower_of
from train.optim import build_optimizer
from train.recipe import Optim, parse
from train.setup import setup
from train.world import World

VISION, TEXT = TINY["vision_cfg"], TINY["text_cfg"]
RESNET = {"image_size": 32, "layers": [1, 2, 1, 1], "width": 8}
BERT = {"model_type": "bert", "vocab_size": 99, "hidden_size": 16, "intermediate_size": 32}
BERT |= {"num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = ("clip", "custom", "resnet", "hf", "test_vit", "test_convnext", "test_resnet")


def model_of(family: str, folder) -> nn.Module:
    """A tiny open_clip model with random weights; `folder` is for a Hugging Face tower's configuration."""
    vision, text = VISION, TEXT
    if family == "hf":
        (folder / "config.json").write_text(json.dumps(BERT))
        text = {"hf_model_name": str(folder), "hf_model_pretrained": False}
        text |= {"hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"}
    if family == "resnet":
        vision = RESNET
    if family.startswith("test_"):  # of timm
        vision = {"image_size": 160, "timm_model_name": family, "timm_pool": "", "timm_proj": "linear"}
    kind = open_clip.model.CLIP if family in ("clip", "resnet") else open_clip.model.CustomTextCLIP
    return kind(16, vision, text)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_outside_the_locked_tower_is_optimized_once(family, tmp_path):
    for tower in ("none", "image", "text"):
        towers = Towers(model_of(family, tmp_path), (0, 0, 0), (1, 1, 1)).train()
        towers.lock(tower)
        optimizer = build_optimizer(towers, Optim(weight_decay=0.3))
        optimized = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        named = dict(towers.model.named_parameters())
        expected = {id(parameter) for name, parameter in named.items() if tower_of(name) != tower}
        assert len(optimized) == len(set(optimized))
        assert set(optimized) == expected
        assert {tower_of(name) for name in named} == {"image", "text", ""}
        locked = [name for name, module in towers.model.named_modules() if name and not module.training]
        of_tower = [name for name, _ in towers.model.named_modules() if name and tower_of(name) == tower]
        assert locked == of_tower


def test_values_that_do_not_fit_are_errors():
    required = ["--model", "a:none", "--data", "d", "--run", "r"]
    with pytest.raises(UserError, match="--l2-sp -1"):
        parse([*required, "--l2-sp", "-1"])
    with pytest.raises(UserError, match="leave out --patch-dropout"):
        parse([*required, "--lock", "image", "--patch-dropout", "0.5"])


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("micro_batch_size", [24, 9])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_locked_tower_has_no_gradient_and_the_other_has_its_own(
    tiny_model, icon_shards, tower, micro_batch_size, mode
):
    gradients = {}
    for lock in ("none", tower):
        options = {"micro_batch_size": micro_batch_size, "activation_checkpointing": mode, "workers": 0}
        options = {} if lock == "none" else options
        state = setup(recipe(tiny_model, icon_shards, "", lock=lock, **options), None, World())
        state.towers.train()
        train.step.backward(state, next(state.batches))
        gradients[lock] = {
            name: parameter.grad for name, parameter in state.clip.towers.model.named_parameters()
        }
    largest = max(gradient.abs().max().item() for gradient in gradients["none"].values())
    for name, gradient in gradients["none"].items():
        if tower_of(name) == tower:
            assert gradients[tower][name] is None, name
        else:
            torch.testing.assert_close(gradients[tower][name], gradient, rtol=1e-5, atol=1e-6 * largest)


def test_a_locked_tower_keeps_nothing_for_the_backward_pass(tiny_model):
    towers = load(tiny_model).towers
    batch = dummy_batch(towers, 16, torch.device("cpu"))
    before = saved_bytes(towers, batch)
    towers.lock("image")
    assert saved_bytes(towers, batch) < 0.7 * before


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("micro_batch_size", ["auto", 9])
def test_a_run_changes_nothing_in_a_locked_tower(icon_shards, tmp_path, tower, micro_batch_size):
    """Neither weights nor statistics of a BatchNorm, also not after a validation; all else changes."""
    (tmp_path / "base").mkdir()
    model = f"local-dir:{save_tiny(tmp_path / 'base', vision_cfg=RESNET)}"

    def validate(clip, world):
        clip.towers.eval()
        return {}

    options = {"epochs": 2, "lock": tower, "micro_batch_size": micro_batch_size, "workers": 0}
    options |= {"activation_checkpointing": "auto", "save_every_minutes": 9}
    run = trained(recipe(model, icon_shards, tmp_path / "run", **options), validate)
    before, after = load_file(tmp_path / "base" / WEIGHTS), exported(newest(run.folder))
    for name, tensor in before.items():
        if tower_of(name) == tower:
            assert torch.equal(tensor, after[name]), name
        elif tensor.ndim and tensor.any():
            assert not torch.equal(tensor, after[name]), name
    assert before["logit_scale"] != after["logit_scale"]
    assert len(metrics(run.folder)) == 12
