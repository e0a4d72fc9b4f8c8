"""Layers are counted as timm counts them, in every family of towers; what is locked stays, and the rest has
its gradients.
"""

import json

import open_clip
import pytest
import torch
from conftest import TINY, save_tiny
from ranks_script import global_batch
from safetensors.torch import load_file
from test_loop import metrics, newest, recipe
from timm.optim import param_groups_layer_decay
from torch import nn

from data_prep.errors import UserError
from train.loop import fit
from train.model.activation_memory import arrange, saved_bytes
from train.model.clip import Clip, Towers, load
from train.model.layers import depths, lock, tower_of
from train.optim import build_optimizer
from train.recipe import Optim, parse
from train.step import backward
from train.world import World

TWO_BLOCKS = {
    **TINY,
    "vision_cfg": {**TINY["vision_cfg"], "layers": 2},
    "text_cfg": {**TINY["text_cfg"], "layers": 3},
}
RESNET = {"image_size": 32, "layers": [1, 2, 1, 1], "width": 8}
BERT = {"model_type": "bert", "vocab_size": 99, "hidden_size": 16, "intermediate_size": 32}
BERT |= {"num_hidden_layers": 2, "num_attention_heads": 2}


def made(family: str, folder) -> nn.Module:
    """A tiny model of open_clip's, with random weights."""
    vision, text = TWO_BLOCKS["vision_cfg"], TWO_BLOCKS["text_cfg"]
    if family == "hf":
        (folder / "config.json").write_text(json.dumps(BERT))
        text = {
            "hf_model_name": str(folder),
            "hf_model_pretrained": False,
            "hf_proj_type": "mlp",
            "hf_pooler_type": "mean_pooler",
        }
    if family == "resnet":
        vision = RESNET
    if family.startswith("test_"):
        vision = {"image_size": 160, "timm_model_name": family, "timm_pool": "", "timm_proj": "linear"}
    kind = open_clip.model.CLIP if family in ("clip", "resnet") else open_clip.model.CustomTextCLIP
    return kind(16, vision, text)


FAMILIES = ("clip", "custom", "resnet", "hf", "test_vit", "test_convnext", "test_resnet")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_one_group_and_rates_fall_from_the_output_down(family, tmp_path):
    towers = Towers(made(family, tmp_path), (0, 0, 0), (1, 1, 1))
    optimizer = build_optimizer(
        towers, Optim(lr=1.0, weight_decay=0.3, layer_decay=0.5, image_lr=0.25, text_lr=2.0)
    )
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    assert (
        sum(len(group["params"]) for group in optimizer.param_groups)
        == len(groups)
        == len(list(towers.parameters()))
    )
    found = {name: groups[id(parameter)] for name, parameter in towers.model.named_parameters()}
    depth = depths(towers.model)
    assert set(found) - set(depth) == {"logit_scale"}
    for name, group in found.items():
        expected = {"image": 0.25, "text": 2.0, "": 1.0}[tower_of(name)] * 0.5 ** depth.get(name, 0)
        assert group.get("lr_scale", 1.0) == expected, name
        assert group["weight_decay"] in (0.0, 0.3)
    for tower in ("image", "text"):
        of_tower = {number for name, number in depth.items() if tower_of(name) == tower}
        assert of_tower == set(range(max(of_tower) + 1))
        assert max(of_tower) >= 3


@pytest.mark.parametrize("prefix", ["", "text."])
def test_the_layers_of_open_clips_transformers(prefix, tmp_path):
    depth = depths(made("custom" if prefix else "clip", tmp_path))
    text = {
        "token_embedding.weight": 4,
        "positional_embedding": 4,
        "ln_final.weight": 0,
        "text_projection": 0,
    }
    text |= {f"transformer.resblocks.{block}.mlp.c_fc.weight": 3 - block for block in range(3)}
    image = {
        "conv1.weight": 3,
        "class_embedding": 3,
        "positional_embedding": 3,
        "ln_pre.bias": 3,
        "ln_post.weight": 0,
        "proj": 0,
    }
    image |= {"transformer.resblocks.0.attn.in_proj_weight": 2, "transformer.resblocks.1.ln_1.weight": 1}
    for name, expected in {
        **{prefix + name: n for name, n in text.items()},
        **{f"visual.{name}": n for name, n in image.items()},
    }.items():
        assert depth[name] == expected, name


def test_the_layers_of_a_resnet_and_of_bert(tmp_path):
    depth = depths(made("resnet", tmp_path))
    layers = {"conv1": 6, "bn3": 6, "layer1.0.conv1": 5, "layer2.0.downsample.0": 4, "layer2.1.bn2": 3}
    layers |= {"layer3.0.bn1": 2, "layer4.0.conv3": 1}
    assert {name: depth[f"visual.{name}.weight"] for name in layers} == layers
    assert depth["visual.attnpool.c_proj.weight"] == 0
    depth = depths(made("hf", tmp_path))
    bert = {"embeddings.word_embeddings": 3, "embeddings.LayerNorm": 3}
    bert |= {"encoder.layer.0.output.dense": 2, "encoder.layer.1.output.LayerNorm": 1}
    assert {name: depth[f"text.transformer.{name}.weight"] for name in bert} == bert
    assert depth["text.proj.0.weight"] == 0


@pytest.mark.parametrize("family", ["test_vit", "test_convnext", "test_resnet"])
def test_rates_of_a_trunk_are_timms(family, tmp_path):
    """One layer further from the output than timm's own, whose classifier's place the projection takes."""
    model = made(family, tmp_path)
    depth = depths(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    timms = param_groups_layer_decay(model.visual.trunk, layer_decay=0.5)
    scales = {names[id(parameter)]: group["lr_scale"] for group in timms for parameter in group["params"]}
    assert len(scales) == len(list(model.visual.trunk.parameters()))
    assert {name: 2 * 0.5 ** depth[name] for name in scales} == scales
    assert depth["visual.head.proj.weight"] == 0


def test_towers_of_unknown_order_are_refused(tmp_path):
    model = made("clip", tmp_path)
    model.visual = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 16))
    with pytest.raises(
        UserError, match=r"--optim\.layer_decay: in which order a Sequential has its layers is not known"
    ):
        build_optimizer(Towers(model, (0, 0, 0), (1, 1, 1)), Optim(layer_decay=0.9))
    build_optimizer(Towers(model, (0, 0, 0), (1, 1, 1)), Optim(image_lr=0.1))


def test_rates_that_are_none_are_refused():
    base = ["--model", "a:none", "--data", "d", "--run", "r"]
    for words in (
        ["--optim.layer_decay", "0"],
        ["--optim.layer_decay", "1.1"],
        ["--optim.text_lr", "0"],
        ["--l2_sp", "-1"],
    ):
        with pytest.raises(UserError, match=words[0]):
            parse([*base, *words])
    with pytest.raises(UserError, match="leave out --patch_dropout"):
        parse([*base, "--lock", "image", "--patch_dropout", "0.5"])


def gradients(clip: Clip, micro_batch_size: int) -> dict[str, torch.Tensor | None]:
    clip.towers.train()
    clip.towers.zero_grad()
    backward(clip.towers, global_batch(), micro_batch_size, World(), seed=0, samples=0)
    return {name: parameter.grad for name, parameter in clip.towers.model.named_parameters()}


@pytest.mark.parametrize("memory", ["none", "full"])
@pytest.mark.parametrize("micro_batch_size", [16, 5])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_locked_tower_has_no_gradient_and_the_other_has_its_own(
    tiny_model, tower, micro_batch_size, memory
):
    free, locked = load(tiny_model), load(tiny_model)
    lock(locked.towers, tower)
    arrange(locked.towers.model, memory, compiled=False)
    expected, found = gradients(free, 16), gradients(locked, micro_batch_size)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        if tower_of(name) == tower:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * largest)


def test_a_locked_tower_keeps_nothing_for_the_backward_pass(tiny_model):
    clip = load(tiny_model)
    images, tokens, *_ = global_batch()
    before = saved_bytes(clip.towers, (images, tokens))
    lock(clip.towers, "image")
    assert saved_bytes(clip.towers, (images, tokens)) < 0.7 * before


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("micro_batch_size", ["auto", 9])
def test_a_run_leaves_a_locked_tower_as_it_is(icon_shards, tmp_path, tower, micro_batch_size):
    """Every number of its state, those of BatchNorm included, and after a validation as well; the rest moves,
    logit_scale too.
    """
    (tmp_path / "base").mkdir()
    model = f"local-dir:{save_tiny(tmp_path / 'base', vision_cfg=RESNET)}"

    def validate(clip, world):
        clip.towers.eval()
        return {}

    plan = recipe(
        model,
        icon_shards,
        tmp_path / "run",
        epochs=2,
        lock=tower,
        micro_batch_size=micro_batch_size,
        workers=0,
        activation_checkpointing="auto",
        save_every_minutes=9,
    )
    run = fit(plan, World(), validate)
    before, after = (
        load_file(folder / "open_clip_model.safetensors")
        for folder in (tmp_path / "base", newest(run.folder))
    )
    for name, tensor in before.items():
        if tower_of(name) == tower:
            assert torch.equal(tensor, after[name]), name
        elif tensor.ndim and tensor.any():
            assert not torch.equal(tensor, after[name]), name
    assert before["logit_scale"] != after["logit_scale"]
    assert len(metrics(run.folder)) == 12
