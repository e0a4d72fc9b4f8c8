"""What decays, and a rate that depends on nothing but the step."""

import pytest

from train.model.clip import load
from train.optim import build_optimizer, lr_at, set_lr
from train.recipe import Optim


def test_only_matrices_decay(tiny_model):
    model = load(tiny_model).towers
    decay, keep = build_optimizer(model, Optim(weight_decay=0.3)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in decay["params"]}
    kept = {names[id(parameter)] for parameter in keep["params"]}
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.3, 0.0)
    assert decayed | kept == set(names.values())
    assert {
        "model.logit_scale",
        "model.positional_embedding",
        "model.visual.positional_embedding",
        "model.ln_final.weight",
    } <= kept
    assert {"model.text_projection", "model.visual.conv1.weight", "model.token_embedding.weight"} <= decayed
    assert not any(name.endswith("bias") for name in decayed)


def test_warm_up_then_cosine_to_zero():
    optim = Optim(lr=2.0, warmup_fraction=0.1)
    rates = [lr_at(step, 100, optim) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[99] < 0.001
    assert lr_at(0, 100, Optim(lr=2.0, warmup_fraction=0.0)) == 2.0


def test_without_factors_the_groups_are_those_of_old_checkpoints(tiny_model):
    """Two of them, without a key of ours: an optimizer.pt of before goes on, and is what it was."""
    optimizer = build_optimizer(load(tiny_model).towers, Optim())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert all("lr_scale" not in group for group in optimizer.param_groups)


def test_each_group_has_its_part_of_the_rate(tiny_model):
    towers = load(tiny_model).towers
    optimizer = build_optimizer(towers, Optim(image_lr=0.5, text_lr=2.0))
    set_lr(optimizer, 0.25)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    model = towers.model
    assert [
        rates[id(parameter)] for parameter in (model.visual.proj, model.text_projection, model.logit_scale)
    ] == [0.125, 0.5, 0.25]
