"""Parameters that no loss reaches are frozen and named, in every family; DDP then waits for none of them."""

import pytest
import torch
from conftest import save_tiny
from runs import exported, fit_on_ranks, newest, recipe
from starting_points import save_model

from train.model.clip import load
from train.model.unused import freeze_unused
from train.setup import setup
from train.world import World

FEW = {"epochs": 1, "workers": 0, "log_every_steps": 99, "save_every_minutes": 99.0}


@pytest.mark.parametrize("family", ["siglip", "bert", "roberta", "timm", "plain"])
def test_all_of_a_tower_is_reached(family, tmp_path, capsys):
    model = f"local-dir:{save_tiny(tmp_path)}" if family == "plain" else save_model(tmp_path / "m", family)
    assert freeze_unused(load(model), World()) == []
    assert "no loss reaches" not in capsys.readouterr().err


def test_cocas_decoder_is_frozen_and_named(icon_shards, tmp_path, capsys):
    model = save_model(tmp_path / "coca", "coca")
    state = setup(recipe(model, icon_shards, "", lock="image", **FEW), None, World())
    frozen = {name for name, p in state.clip.towers.model.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"visual", "text_decoder"}
    printed = capsys.readouterr().err
    assert "no loss reaches text_decoder (" in printed
    assert "CoCa's caption loss is not trained" in printed


def test_a_pooling_that_is_not_used_is_named(tmp_path, capsys):
    """Of any architecture; here a layer is added that its tower does not call."""
    clip = load(f"local-dir:{save_tiny(tmp_path)}")
    clip.towers.model.visual.spare = torch.nn.Linear(2, 2)
    clip.towers.model.visual.spare_scale = torch.nn.Parameter(torch.ones(3))
    trained = sum(p.requires_grad for p in clip.towers.parameters())
    names = freeze_unused(clip, World())
    assert set(names) == {"visual.spare.weight", "visual.spare.bias", "visual.spare_scale"}
    assert sum(p.requires_grad for p in clip.towers.parameters()) == trained - 3
    printed = capsys.readouterr().err
    assert "visual.spare_scale, visual.spare (3 of " in printed
    assert "CoCa" not in printed
    assert all(parameter.grad is None for parameter in clip.towers.parameters())


@pytest.mark.parametrize("family", ["coca", "roberta"])
def test_two_ranks_in_chunks_equal_one_process(family, icon_shards, tmp_path):
    """Without dropout, which depends on the chunk."""
    model = save_model(tmp_path / "base", family)
    if family == "roberta":
        tower = tmp_path / "base-roberta" / "config.json"
        tower.write_text(tower.read_text().replace('_prob": 0.1', '_prob": 0.0'))
    weights = []
    for ranks, micro_batch_size in ((1, 24), (2, 4)):
        plan = recipe(model, icon_shards, tmp_path / f"run{ranks}", micro_batch_size=micro_batch_size, **FEW)
        fit_on_ranks(plan, ranks)
        weights.append(exported(newest(tmp_path / f"run{ranks}")))
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-4, msg=name)
