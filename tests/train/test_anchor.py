"""The pull toward the base is the one that is written down, keeps what it shall, and leaves bad steps alone."""

import pytest
import torch
from conftest import save_tiny
from safetensors.torch import load_file
from test_bad_steps import poison
from test_loop import newest, no_validation, recipe

from data_prep.errors import UserError
from train.loop import fit
from train.model.clip import load
from train.optim import build_optimizer, set_lr
from train.recipe import Optim
from train.retain.l2sp import L2SP
from train.world import World


def test_a_step_and_its_pull_by_hand(tiny_model):
    """Against AdamW alone, on weights that have left the base: w - lr * l2_sp * (w - base), with each
    group's own rate.
    """
    ends = {}
    for l2_sp in (0.0, 300.0):
        towers = load(tiny_model).towers
        anchor, base = (
            L2SP(towers, l2_sp),
            {name: tensor.clone() for name, tensor in towers.model.state_dict().items()},
        )
        optimizer = build_optimizer(towers, Optim(image_lr=0.5))
        generator = torch.Generator().manual_seed(0)
        for parameter in towers.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.found_inf = torch.zeros(())
        set_lr(optimizer, 1e-3)
        optimizer.step()
        anchor.pull(optimizer)
        ends[l2_sp] = {name: parameter.detach() for name, parameter in towers.model.named_parameters()}
    for name, stepped in ends[0.0].items():
        part = 0.0 if name == "logit_scale" else 0.15 if name.startswith("visual.") else 0.3
        torch.testing.assert_close(
            ends[300.0][name], stepped - part * (stepped - base[name]), rtol=1e-5, atol=1e-7
        )


def test_a_bad_step_changes_nothing(tiny_model):
    towers = load(tiny_model).towers
    anchor, optimizer = L2SP(towers, 300.0), build_optimizer(towers, Optim())
    set_lr(optimizer, 1e-3)
    for parameter in towers.parameters():
        parameter.data += 0.01
        parameter.grad = torch.full_like(parameter, float("nan"))
    before = [parameter.detach().clone() for parameter in towers.parameters()]
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    anchor.pull(optimizer)
    assert all(
        torch.equal(parameter, old) for parameter, old in zip(towers.parameters(), before, strict=True)
    )


def test_a_bad_step_of_a_run_changes_nothing(tiny_model, icon_shards, tmp_path, monkeypatch):
    poison(monkeypatch, lambda samples: samples == 96)
    run = fit(
        recipe(
            tiny_model, icon_shards, tmp_path / "run", epochs=1, l2_sp=100.0, workers=0, keep_checkpoints=9
        ),
        World(),
        no_validation,
    )
    folders = [run.folder / "checkpoints" / f"samples-{samples:012d}" for samples in (72, 96, 120)]
    good, before, after = (load_file(folder / "open_clip_model.safetensors") for folder in folders)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not torch.equal(good["visual.proj"], before["visual.proj"])


def test_a_huge_pull_stays_at_the_base_and_a_small_one_near(tiny_model, icon_shards, tmp_path):
    moved = {}
    for l2_sp in (0.0, 300.0, 1e9):
        options = {"l2_sp": l2_sp, "epochs": 2, "workers": 0, "save_every_minutes": 9}
        plan = recipe(tiny_model, icon_shards, tmp_path / str(l2_sp), **options)
        weights = load_file(newest(fit(plan, World(), no_validation).folder) / "open_clip_model.safetensors")
        base = load(tiny_model).towers.model.state_dict()
        moved[l2_sp] = max(
            (weights[name] - base[name]).abs().max().item() for name in weights if name != "logit_scale"
        )
        assert weights["logit_scale"] != base["logit_scale"]
    assert moved[1e9] == 0.0
    assert 0 < moved[300.0] <= 1 / 300 < moved[0.0]


def test_another_base_does_not_go_on_with_a_run(tiny_model, icon_shards, tmp_path):
    """The base is loaded at every start, and what a name stands for may have changed."""
    folder = tmp_path / "base"
    folder.mkdir()
    save_tiny(folder)
    plan = recipe(f"local-dir:{folder}", icon_shards, tmp_path / "run", epochs=1, l2_sp=1.0, workers=0)
    fit(plan, World(), no_validation)
    (tmp_path / "run" / "status.json").unlink()
    weights = folder / "open_clip_model.safetensors"
    newer = newest(tmp_path / "run") / "open_clip_model.safetensors"
    weights.write_bytes(newer.read_bytes())
    with pytest.raises(
        UserError, match=r"not the weights that .* began with; pass another --run, or the old --model"
    ):
        fit(plan, World(), no_validation)
