"""The replay gradient is that of its formula, whole or in chunks, on one rank or two; a resumed run continues
the replay stream where it was.
"""

import shutil

import pytest
import torch
from conftest import build_icons
from runs import (
    assert_bit_equal,
    assert_equal_weights,
    checkpoint,
    exported,
    fit_on_ranks,
    metrics,
    newest,
    no_validation,
    recipe,
    trained,
)

from data_prep.errors import UserError
from data_prep.shards import Shards
from train.data.augment import Augmentation
from train.loop import fit
from train.model.clip import load
from train.recipe import Optim
from train.retain.base import frozen_copy
from train.retain.replay import Replay, check_replay
from train.world import World


@pytest.fixture(scope="module")
def other_shards(icon_folder, tmp_path_factory):
    """Shards to replay: the same icons in another split and order."""
    folder = tmp_path_factory.mktemp("others") / "shards"
    build_icons(icon_folder, folder, seed=1)
    return folder


def test_gradient_equals_the_formula(tiny_model, icon_shards, other_shards, tmp_path):
    """0 for the initial model itself; for changed weights, autograd's of the formula on the same pairs."""
    plan = recipe(tiny_model, icon_shards, tmp_path, replay=str(other_shards), replay_weight=3.0, workers=0)
    pairs = Shards(other_shards, "train")
    base = frozen_copy(load(tiny_model).towers, plan, torch.device("cpu"))
    results = []
    for micro_batch_size in (6, 4, 1):
        clip = load(tiny_model)
        replay = Replay(pairs, [], base, clip, plan, World(), 48, 480)
        clip.towers.train()
        # not exactly 0: torch uses another attention kernel where no gradient is needed
        assert replay.backward(clip.towers, micro_batch_size) < 1e-12
        assert clip.towers.training
        clip.towers.zero_grad()
        with torch.no_grad():
            for parameter in clip.towers.parameters():
                parameter += 0.05 * torch.sin(100 * parameter)
        loss = replay.backward(clip.towers, micro_batch_size)
        gradients = {name: parameter.grad for name, parameter in clip.towers.named_parameters()}
        results.append({"loss": loss, **gradients})

    first, second = (
        next(Replay(pairs, [], base, clip, plan, World(), samples, 480).batches) for samples in (48, 72)
    )
    assert len(second.images) == 6
    assert not torch.equal(first.images, second.images)
    images = Augmentation(plan.augment).apply(second.images, second.augment_rows)
    clip.towers.zero_grad()
    now, before = clip.towers(images, second.tokens)[:2], base(images, second.tokens)[:2]
    expected = sum((a - b).pow(2).sum(1).mean() for a, b in zip(now, before, strict=True))
    (3 * expected).backward()
    assert expected > 0.01
    gradients = {name: parameter.grad for name, parameter in clip.towers.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in gradients.values() if gradient is not None)
    for result in results:
        torch.testing.assert_close(result["loss"], expected.detach(), rtol=1e-5, atol=0)
        assert result["model.logit_scale"] is None
        for name, gradient in gradients.items():
            if gradient is not None:
                torch.testing.assert_close(result[name], gradient, rtol=1e-4, atol=1e-6 * largest)


# The first step is at the initial model, where the replay gradient of unseen words is rounding noise; a small
# eps would make it a step.
TOGETHER = {
    "replay_weight": 2.0,
    "l2_sp": 30.0,
    "optim": Optim(lr=1e-3, warmup_fraction=0.2, eps=1e-4),
    "workers": 0,
}


@pytest.mark.parametrize(("micro_batch_size", "lock"), [(12, "none"), (5, "text")])
def test_two_ranks_and_chunks_have_the_curve_of_one_process(
    tiny_model, icon_shards, other_shards, tmp_path, micro_batch_size, lock
):
    """Whole shares, and chunks of 5 of 12 pairs with a locked tower."""
    options = {"epochs": 1, "save_every_minutes": 9, "lock": lock, "replay": str(other_shards), **TOGETHER}
    one = recipe(tiny_model, icon_shards, tmp_path / "one", micro_batch_size=24, **options)
    two = recipe(tiny_model, icon_shards, tmp_path / "two", micro_batch_size=micro_batch_size, **options)
    trained(one, no_validation)
    fit_on_ranks(two, 2)
    curves = [
        [{name: value for name, value in line.items() if name.startswith("train/")} for line in lines]
        for lines in (metrics(tmp_path / name) for name in ("one", "two"))
    ]
    curves[1] = [line for line in curves[1] if line]  # without those of the validations
    replay_losses = [line["train/replay_loss"] for line in curves[0]]
    assert replay_losses[0] < 1e-12 < 1e-6 < min(replay_losses[1:])
    for line, other in zip(*curves, strict=True):
        assert line == pytest.approx(other, rel=2e-5, abs=1e-9)
    weights, others = (exported(newest(tmp_path / name)) for name in ("one", "two"))
    assert all(torch.allclose(tensor, others[name], atol=1e-4) for name, tensor in weights.items())


@pytest.mark.parametrize("options", [{}, {"lock": "image", "workers": 2}], ids=str)
def test_resumed_equals_uninterrupted(tiny_model, icon_shards, other_shards, tmp_path, options):
    """In the second part the initial model and the replay stream are made anew; the replayed shards moved."""
    options = {**TOGETHER, "epochs": 2, "keep_checkpoints": 20, **options}
    plan = recipe(tiny_model, icon_shards, tmp_path / "whole", replay=str(other_shards), **options)
    whole = trained(plan, no_validation).folder
    parts = shutil.copytree(whole, tmp_path / "parts", symlinks=True)
    samples = int(newest(whole).name.removeprefix("samples-"))
    for step in range(5):
        shutil.rmtree(checkpoint(parts, samples - 24 * step))
    (parts / "status.json").unlink()
    moved = shutil.copytree(other_shards, tmp_path / "moved")
    trained(recipe(tiny_model, icon_shards, parts, replay=str(moved), **options), no_validation)
    assert_bit_equal(whole, parts)


def test_weight_0_equals_no_replay_and_a_large_weight_stays_near(
    tiny_model, icon_shards, other_shards, tmp_path
):
    weights, distances = {}, {}
    for weight in (None, 0.0, 10.0):
        replay = {} if weight is None else {"replay": str(other_shards), "replay_weight": weight}
        options = {"epochs": 2, "workers": 0, "save_every_minutes": 9, **replay}
        run = trained(recipe(tiny_model, icon_shards, tmp_path / str(weight), **options), no_validation)
        weights[weight] = exported(newest(run.folder))
        distances[weight] = metrics(run.folder)[-1].get("train/replay_loss")
    assert_equal_weights(weights[None], weights[0.0])
    assert distances[10.0] < 0.5 * distances[0.0]


def test_mistakes_are_reported_before_anything_is_written(tiny_model, icon_shards, other_shards, tmp_path):
    def plan(**changes):
        return recipe(tiny_model, icon_shards, tmp_path / "run", **{"replay": str(other_shards), **changes})

    with pytest.raises(UserError, match="190 pairs are fewer than the 1250 that one step replays"):
        check_replay(plan(global_batch_size=5000), 190, World())
    with pytest.raises(UserError, match=r"-size 12: .* among 2 ranks; pass --global-batch-size 8$"):
        check_replay(plan(global_batch_size=12), 190, World(1, 2))
    with pytest.raises(UserError, match=r"nowhere: no manifest\.json"):
        fit(plan(replay=str(tmp_path / "nowhere")), World(), no_validation)
    with pytest.raises(UserError, match="--replay adds a quarter of a batch"):
        fit(plan(global_batch_size=18), World(), no_validation)
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_resume_with_other_replay_shards(tiny_model, icon_shards, other_shards, tmp_path):
    plan = {"model": tiny_model, "data": icon_shards, "run": tmp_path / "run", "epochs": 1, "workers": 0}
    trained(recipe(**plan, replay=str(other_shards)), no_validation)
    (tmp_path / "run" / "status.json").unlink()
    for replay, named in ((str(icon_shards), str(icon_shards)), ("", "no --replay")):
        with pytest.raises(UserError, match=rf"{named}: not the shards that .* was started with"):
            fit(recipe(**plan, replay=replay), World(), no_validation)
