"""Which parameters decay, the learning rate by step, and a step that is skipped."""

import copy

import pytest
import torch

from train.model.clip import load
from train.optim import build_optimizer, lr_at, set_lr
from train.recipe import Optim


def test_only_matrices_decay(tiny_model):
    """In two groups, which stored optimizers have too."""
    model = load(tiny_model).towers
    decaying, others = build_optimizer(model, Optim(weight_decay=0.3)).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {parameter: name.removeprefix("model.") for name, parameter in model.named_parameters()}
    decayed = {names[parameter] for parameter in decaying["params"]}
    kept = {names[parameter] for parameter in others["params"]}
    assert decayed | kept == set(names.values())
    vectors = {"logit_scale", "positional_embedding", "visual.positional_embedding", "ln_final.weight"}
    assert vectors <= kept
    assert {"text_projection", "visual.conv1.weight", "token_embedding.weight"} <= decayed
    assert not any(name.endswith("bias") for name in decayed)


def test_warmup_then_cosine_to_zero():
    optim = Optim(lr=2.0, warmup_fraction=0.1)
    rates = [lr_at(step, 100, optim) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[99] < 0.001
    assert lr_at(0, 100, Optim(lr=2.0, warmup_fraction=0.0)) == 2.0


def test_every_group_has_the_same_learning_rate(tiny_model):
    optimizer = build_optimizer(load(tiny_model).towers, Optim())
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_a_skipped_step_changes_nothing(tiny_model):
    towers = load(tiny_model).towers
    optimizer = build_optimizer(towers, Optim(lr=1e-3))

    def step(found_inf: float) -> tuple[dict, dict]:
        for parameter in towers.parameters():
            parameter.grad = torch.full_like(parameter, float("nan") if found_inf else 0.1)
        optimizer.step(found_inf=torch.tensor(found_inf))
        return copy.deepcopy(towers.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])

    weights, moments = step(0.0)
    same_weights, same_moments = step(1.0)
    assert all(torch.equal(tensor, same_weights[name]) for name, tensor in weights.items())
    for number, values in moments.items():
        assert all(torch.equal(value, same_moments[number][name]) for name, value in values.items())
    assert not torch.equal(step(0.0)[0]["model.text_projection"], weights["model.text_projection"])
