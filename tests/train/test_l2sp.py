"""L2-SP equals its formula, keeps weights near their initial values, and skips non-finite steps."""

import pytest
import torch
from conftest import save_tiny
from runs import (
    WEIGHTS,
    assert_equal_weights,
    checkpoint,
    exported,
    newest,
    no_validation,
    poison,
    recipe,
    trained,
)

from data_prep.errors import UserError
from train.model.clip import Clip, load
from train.optim import GuardedAdamW, build_optimizer, set_lr
from train.recipe import Optim, Recipe
from train.retain.base import frozen_copy
from train.retain.l2sp import L2SP


def prepared(model: str, strength: float) -> tuple[Clip, L2SP, GuardedAdamW]:
    """A model, its L2-SP and its optimizer, with a learning rate of 1e-3."""
    clip = load(model)
    base = frozen_copy(clip.towers, Recipe(model, "", "", l2_sp=1.0), torch.device("cpu"))
    optimizer = build_optimizer(clip.towers, Optim())
    set_lr(optimizer, 1e-3)
    return clip, L2SP(clip.towers, base, strength), optimizer


def test_a_step_equals_the_formula(tiny_model):
    """After AdamW's own step: weight - lr * strength * (weight - initial), for weights that differ from their
    initial values; logit_scale is left free.
    """
    ends = {}
    for strength in (0.0, 300.0):
        clip, l2_sp, optimizer = prepared(tiny_model, strength)
        initial = {name: tensor.clone() for name, tensor in clip.towers.model.state_dict().items()}
        generator = torch.Generator().manual_seed(0)
        for parameter in clip.towers.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step(found_inf=torch.zeros(()))
        l2_sp.step(optimizer, torch.zeros(()))
        ends[strength] = {
            name: parameter.detach() for name, parameter in clip.towers.model.named_parameters()
        }
    for name, stepped in ends[0.0].items():
        fraction = 0.0 if name == "logit_scale" else 0.3
        expected = stepped - fraction * (stepped - initial[name])
        torch.testing.assert_close(ends[300.0][name], expected, rtol=1e-5, atol=1e-7)


def test_a_nonfinite_step_changes_nothing(tiny_model):
    clip, l2_sp, optimizer = prepared(tiny_model, 300.0)
    for parameter in clip.towers.parameters():
        parameter.data += 0.01
        parameter.grad = torch.full_like(parameter, float("nan"))
    before = {name: tensor.clone() for name, tensor in clip.towers.model.state_dict().items()}
    optimizer.step(found_inf=torch.ones(()))
    l2_sp.step(optimizer, torch.ones(()))
    assert_equal_weights(clip.towers.model.state_dict(), before)


def test_a_nonfinite_step_of_a_run_changes_nothing(tiny_model, icon_shards, tmp_path, monkeypatch):
    poison(monkeypatch, lambda samples: samples == 96)
    options = {"epochs": 1, "l2_sp": 100.0, "workers": 0, "keep_checkpoints": 9}
    run = trained(recipe(tiny_model, icon_shards, tmp_path / "run", **options), no_validation)
    good, before, after = (exported(checkpoint(run.folder, samples)) for samples in (72, 96, 120))
    assert_equal_weights(before, after)
    assert not torch.equal(good["visual.proj"], before["visual.proj"])


def test_the_strength_limits_how_far_weights_move(tiny_model, icon_shards, tmp_path):
    """Not at all for a very large one. AdamW moves a weight by about lr in a step, and L2-SP takes back
    lr * strength of the distance, so it stays below 1 / strength.
    """
    initial, moved = load(tiny_model).towers.model.state_dict(), {}
    for strength in (0.0, 300.0, 1e9):
        options = {"l2_sp": strength, "epochs": 2, "workers": 0, "save_every_minutes": 9}
        plan = recipe(tiny_model, icon_shards, tmp_path / str(strength), **options)
        weights = exported(newest(trained(plan, no_validation).folder))
        moved[strength] = max(
            (weights[name] - initial[name]).abs().max().item() for name in weights if name != "logit_scale"
        )
        assert weights["logit_scale"] != initial["logit_scale"]
    assert moved[1e9] == 0.0
    assert 0 < moved[300.0] <= 1 / 300 < moved[0.0]


def test_a_run_does_not_resume_with_other_initial_weights(tiny_model, icon_shards, tmp_path):
    """The initial weights are loaded at every start, and the same name may have come to mean others."""
    (tmp_path / "base").mkdir()
    save_tiny(tmp_path / "base")
    options = {"epochs": 1, "l2_sp": 1.0, "workers": 0, "save_every_minutes": 9}
    plan = recipe(f"local-dir:{tmp_path / 'base'}", icon_shards, tmp_path / "run", **options)
    trained(plan, no_validation)
    (tmp_path / "run" / "status.json").unlink()
    (tmp_path / "base" / WEIGHTS).write_bytes((newest(tmp_path / "run") / WEIGHTS).read_bytes())
    expected = r"not the weights that .* was started with; pass another --run, or the old --model"
    with pytest.raises(UserError, match=expected):
        trained(plan, no_validation)
