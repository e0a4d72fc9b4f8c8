"""optim.moments_fraction: AdamW's moments are those of a mean gradient at the initial weights, which stay."""

import shutil

import torch
from runs import (
    assert_bit_equal,
    assert_equal_weights,
    checkpoint,
    exported,
    metrics,
    no_validation,
    recipe,
    trained,
)

from train.model.clip import load
from train.optim import lr_at
from train.recipe import Optim

OPTIONS = {"workers": 0, "keep_checkpoints": 20, "l2_sp": 30.0}


def optim(fraction: float) -> Optim:
    return Optim(lr=1e-3, warmup_fraction=0.2, moments_fraction=fraction)


def test_the_schedule_of_the_rest_follows():
    plain = [lr_at(step, 30, optim(0.0)) for step in range(30)]
    assert [lr_at(step, 40, optim(0.25)) for step in range(40)] == [0.0] * 10 + plain
    assert [lr_at(step, 4, optim(0.99)) for step in range(4)] == [0.0] * 4


def test_weights_stay_and_moments_fill(tiny_model, icon_shards, tmp_path):
    """4 of 12 steps: the weights are the initial ones bit for bit; moments are those of four
    batches. A run that resumes among these steps equals one that was not interrupted.
    """
    options = {"epochs": 2, "optim": optim(0.3), **OPTIONS}
    whole = trained(recipe(tiny_model, icon_shards, tmp_path / "whole", **options), no_validation).folder
    initial = load(tiny_model).towers.model.state_dict()
    rates = [line["train/lr"] for line in metrics(whole) if "train/lr" in line]
    assert len(rates) == 12
    assert rates[:4] == [0.0] * 4
    assert min(rates[4:]) > 0
    assert_equal_weights(exported(checkpoint(whole, 4 * 24)), initial)
    assert not torch.equal(exported(checkpoint(whole, 5 * 24))["visual.proj"], initial["visual.proj"])
    moments = torch.load(checkpoint(whole, 4 * 24) / "optimizer.pt", weights_only=True)["state"]
    assert all(values["step"] == 4 for values in moments.values())
    assert any(values["exp_avg_sq"].max() > 0 for values in moments.values())
    parts = shutil.copytree(whole, tmp_path / "parts", symlinks=True)
    for step in range(3, 13):
        shutil.rmtree(checkpoint(parts, 24 * step))
    (parts / "status.json").unlink()
    trained(recipe(tiny_model, icon_shards, parts, **options), no_validation)
    assert_bit_equal(whole, parts)
