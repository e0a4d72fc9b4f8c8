"""Replay has the gradient that is written down, whole or in chunks, on one rank or two, and goes on where it
was.
"""

import dataclasses
import shutil

import pytest
import torch
from conftest import build_icons, call
from safetensors.torch import load_file
from test_loop import assert_bit_equal, flags, metrics, newest, no_validation, recipe

from data_prep.errors import UserError
from data_prep.shards import Shards
from train.loop import fit
from train.model.clip import load
from train.recipe import Optim
from train.retain.replay import Replay, replay_pairs
from train.world import World


@pytest.fixture(scope="module")
def others(icon_folder, tmp_path_factory):
    """Shards to replay: the same icons in another split and order."""
    folder = tmp_path_factory.mktemp("others") / "shards"
    build_icons(icon_folder, folder, seed=1)
    return folder


def test_the_gradient_by_hand(tiny_model, icon_shards, others, tmp_path):
    """0 for the base itself; for a model that has moved, autograd's of the formula over the same pairs, read
    another way.
    """
    plan = recipe(tiny_model, icon_shards, tmp_path, replay=str(others), replay_weight=3.0, workers=0)
    pairs = replay_pairs(plan, World())
    results = []
    for micro_batch_size in (6, 4, 1):
        clip = load(tiny_model)
        replay = Replay(pairs, clip, plan, World(), 48, 480)
        clip.towers.train()
        batches = [next(Replay(pairs, clip, plan, World(), samples, 480).batches) for samples in (48, 72)]
        assert (
            replay.backward(clip.towers, micro_batch_size) < 1e-12
        )  # torch has another kernel for attention without gradients
        assert clip.towers.training
        clip.towers.zero_grad()
        with torch.no_grad():
            for parameter in clip.towers.parameters():
                parameter += 0.05 * torch.sin(100 * parameter)
        loss = replay.backward(clip.towers, micro_batch_size)
        results.append(
            {"loss": loss, **{name: parameter.grad for name, parameter in clip.towers.named_parameters()}}
        )

    base = load(tiny_model).towers
    clip.towers.zero_grad()
    assert len(batches[1].images) == 6
    assert not torch.equal(batches[0].images, batches[1].images)
    inputs = batches[1].images, batches[1].tokens, batches[1].changes
    expected = sum(
        (a - b).pow(2).sum(1).mean() for a, b in zip(clip.towers(*inputs)[:2], base(*inputs)[:2], strict=True)
    )
    (3 * expected).backward()
    assert expected > 0.01
    largest = max(
        parameter.grad.abs().max().item()
        for parameter in clip.towers.parameters()
        if parameter.grad is not None
    )
    for found in results:
        torch.testing.assert_close(found["loss"], expected.detach(), rtol=1e-5, atol=0)
        assert found["model.logit_scale"] is None
        for name, parameter in clip.towers.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6 * largest)


def everything(others, **more) -> dict:
    """Replay with all that has to do with the base and with rates."""
    # The first step is at the base, where the gradient of words that are only replayed is rounding; a small
    # eps would make it a step.
    optim = Optim(lr=1e-3, warmup_fraction=0.2, eps=1e-4, layer_decay=0.7, image_lr=0.5, text_lr=1.5)
    return {"replay": str(others), "replay_weight": 2.0, "l2_sp": 30.0, "optim": optim, **more}


@pytest.mark.parametrize(("chunk", "locked"), [(12, "none"), (5, "text")])
def test_two_ranks_and_chunks_have_the_curves_of_one(
    tiny_model, icon_shards, others, tmp_path, chunk, locked
):
    curves, weights = [], []
    for ranks, micro_batch_size in ((0, 24), (2, chunk)):
        run = tmp_path / str(ranks)
        plan = recipe(
            tiny_model,
            icon_shards,
            run,
            micro_batch_size=micro_batch_size,
            epochs=1,
            lock=locked,
            save_every_minutes=9,
            workers=0,
        )
        plan = dataclasses.replace(plan, **everything(others))
        if ranks:
            call(*flags(plan, tmp_path / "recipe.yaml"), ranks=ranks)
        else:
            fit(plan, World(), no_validation)
        curves.append(
            [
                {name: value for name, value in line.items() if name.startswith("train/")}
                for line in metrics(run)
            ]
        )
        weights.append(load_file(newest(run) / "open_clip_model.safetensors"))
    curves = [[line for line in curve if line] for curve in curves]  # without validations
    replayed = [line["train/replay_loss"] for line in curves[0]]
    assert replayed[0] < 1e-12 < 1e-6 < min(replayed[1:])
    for one, two in zip(*curves, strict=True):
        assert one == pytest.approx(two, rel=2e-5, abs=1e-9)
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])


@pytest.mark.parametrize("options", [{}, {"lock": "image", "workers": 2}])
def test_resumed_equals_uninterrupted(tiny_model, icon_shards, others, tmp_path, options):
    """All anew at the start of the second part: base, stream and rates."""
    for name in ("whole", "parts"):
        plan = recipe(tiny_model, icon_shards, tmp_path / name, epochs=2, keep_checkpoints=20, workers=0)
        fit(dataclasses.replace(plan, **everything(others, **options)), World(), no_validation)
    run = tmp_path / "parts"
    for _ in range(5):
        shutil.rmtree(newest(run))
    (run / "status.json").unlink()
    (run / "metrics.jsonl").write_text(
        "".join((run / "metrics.jsonl").read_text().splitlines(keepends=True)[:7])
    )
    moved = shutil.copytree(others, tmp_path / "moved")
    fit(dataclasses.replace(plan, **everything(moved, **options)), World(), no_validation)
    assert_bit_equal(tmp_path / "whole", run)


def test_a_weight_of_nothing_equals_no_replay_and_a_large_one_forgets_less(
    tiny_model, icon_shards, others, tmp_path
):
    runs, apart = {}, {}
    for weight in (None, 0.0, 10.0):
        options = {} if weight is None else {"replay": str(others), "replay_weight": weight}
        plan = recipe(
            tiny_model,
            icon_shards,
            tmp_path / str(weight),
            epochs=2,
            workers=0,
            save_every_minutes=9,
            **options,
        )
        runs[weight] = load_file(
            newest(fit(plan, World(), no_validation).folder) / "open_clip_model.safetensors"
        )
        apart[weight] = metrics(tmp_path / str(weight))[-1].get("train/replay_loss")
    assert all(torch.equal(tensor, runs[0.0][name]) for name, tensor in runs[None].items())
    assert apart[10.0] < 0.5 * apart[0.0]


def test_what_cannot_be_replayed_is_refused_before_anything_is_written(
    tiny_model, icon_shards, others, tmp_path
):
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", replay=str(others))
    n = len(Shards(others, "train"))
    with pytest.raises(UserError, match=rf"{n} pairs to replay are fewer than the 1250 of one step"):
        replay_pairs(dataclasses.replace(plan, global_batch_size=5000), World())
    with pytest.raises(
        UserError,
        match=r"--global_batch_size 12 that cannot be shared evenly by 2 ranks; pass --global_batch_size 8",
    ):
        replay_pairs(dataclasses.replace(plan, global_batch_size=12), World(1, 2))
    with pytest.raises(UserError, match=r"nowhere: no manifest\.json"):
        fit(dataclasses.replace(plan, replay=str(tmp_path / "nowhere")), World(), no_validation)
    assert not (tmp_path / "run").exists()


def test_another_replay_does_not_go_on_with_a_run(tiny_model, icon_shards, others, tmp_path):
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", epochs=1, replay=str(others), workers=0)
    fit(plan, World(), no_validation)
    (tmp_path / "run" / "status.json").unlink()
    for other, said in ((str(icon_shards), str(icon_shards)), ("", "no --replay")):
        with pytest.raises(
            UserError,
            match=rf"{said}: not the shards that .* began with; pass another --run, or the old --replay",
        ):
            fit(dataclasses.replace(plan, replay=other), World(), no_validation)
