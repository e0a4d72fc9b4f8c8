"""Adapters that are merged give the features of those that are not, resume bit for bit, and are alive in
towers of every kind.
"""

import shutil

import open_clip
import pytest
import torch
from conftest import TINY, save_tiny
from safetensors.torch import load_file
from test_choice import WISHES, trained
from test_loop import assert_bit_equal, newest, recipe

from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.embed import embed
from eval.options import INFERENCE
from train.model.clip import Towers, load
from train.model.lora import adapt, merged
from train.world import World


@pytest.fixture
def unequal_model(tmp_path) -> str:
    """Two layers, so that there are blocks to compile and to checkpoint."""
    (tmp_path / "two").mkdir()
    changes = {kind: {**TINY[kind], "layers": 2} for kind in ("vision_cfg", "text_cfg")}
    return f"local-dir:{save_tiny(tmp_path / 'two', **changes)}"


@pytest.mark.parametrize(
    "options",
    [{}, {"activation_checkpointing": "full", "micro_batch_size": 12}, {"ema": 0.9, "wise_ft": (0.4,)}],
    ids=str,
)
def test_what_lora_gives_away_is_a_plain_model_with_the_features_of_the_adapted_one(
    unequal_model, icon_shards, tmp_path, options
):
    plan = recipe(
        unequal_model,
        icon_shards,
        tmp_path / "run",
        epochs=1,
        workers=0,
        lora_rank=3,
        save_every_minutes=9,
        **options,
    )
    place = (
        len(options) - 1 if "ema" in options else 0
    )  # of the trained weights, the average, the mixture: the last
    finds = [0.0, 0.0, 0.0]
    finds[2 if place else 0] = 0.5
    seen = {}

    def validate(clip, world):
        embedded = embed(clip, Shards(icon_shards, "val"), world, INFERENCE)
        value = 0.0 if not seen else finds[len(seen) - 1]
        seen[len(seen)] = embedded.image_features, embedded.text_features
        return {"val/mean/R@1": value}

    run = trained(plan, validate=validate)
    adapted = seen[len(seen) - 1]
    given, base = load(str(run.folder)), load(unequal_model)
    assert given.towers.model.state_dict().keys() == base.towers.model.state_dict().keys()
    plain = embed(given, Shards(icon_shards, "val"), World(), INFERENCE)
    for one, two, before in zip(adapted, (plain.image_features, plain.text_features), seen[0], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
        assert (two - before).abs().max() > 1e-3
    before = base.towers.model.state_dict()
    changed = {
        name
        for name, tensor in given.towers.model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    matrices = {
        name
        for name in changed
        if name.endswith(("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight"))
    }
    assert len(matrices) == 2 * 2 * 4
    assert changed - matrices == {"logit_scale"}


def test_lora_resumes_bit_for_bit(unequal_model, icon_shards, tmp_path, one_thread):
    runs = []
    for name in ("whole", "parts"):
        plan = recipe(
            unequal_model,
            icon_shards,
            tmp_path / name,
            epochs=2,
            workers=0,
            keep_checkpoints=99,
            lora_rank=2,
            **WISHES,
        )
        runs.append(trained(plan).folder)
    for checkpoint in (runs[1] / "checkpoints").glob("samples-*"):
        if int(checkpoint.name[8:]) > 192:
            shutil.rmtree(checkpoint)
    (runs[1] / "status.json").unlink()
    trained(plan)
    assert_bit_equal(*runs)
    for file in ("training.safetensors", "ema.safetensors"):
        one, two = (load_file(newest(run) / file) for run in runs)
        assert all(torch.equal(one[name], two[name]) for name in one)


TEXT = {**TINY["text_cfg"], "vocab_size": 100, "layers": 2}
SIGLIP = {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
KINDS = {
    "timm": (
        {
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_pool": "map",
            "timm_proj": "none",
            "image_size": 224,
        },
        SIGLIP,
        192,
    ),
    "ResNet": ({"layers": [1, 1, 1, 1], "width": 16, "image_size": 32}, TEXT, 16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_alive_in_towers_of_every_kind(kind):
    vision, text, width = KINDS[kind]
    torch.manual_seed(0)
    towers = Towers(open_clip.CustomTextCLIP(width, vision, text), (0.5,) * 3, (0.5,) * 3)
    before = {name: tensor.clone() for name, tensor in towers.model.state_dict().items()}
    adapt(towers, 2, 0)
    after = merged(towers.model.state_dict())
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    adapted = {name for name in towers.state_dict() if name.endswith(".0.A")}
    assert {name.split(".")[1] for name in adapted} == {"visual", "text"}


def test_a_matrix_that_features_do_not_depend_on_is_named(tiny_model):
    clip = load(tiny_model)
    clip.towers.model.visual.unused = torch.nn.Linear(4, 4)
    with pytest.raises(
        UserError,
        match=r"--lora_rank 2: features do not depend on visual\.unused\.parametrizations\.weight\.0\.A",
    ):
        adapt(clip.towers, 2, 0)
