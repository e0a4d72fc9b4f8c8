"""A teacher's divergence equals its formula, on one or two ranks, whole or in chunks; runs resume with it."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, save_tiny
from ranks_script import BASIC, N_PAIRS, global_batch, gradients, train_state
from runs import (
    WEIGHTS,
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
from train.loop import fit
from train.model.clip import load
from train.recipe import Optim
from train.retain.teacher import Teacher, load_teacher
from train.world import World


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> str:
    """A MODEL with wider features, other weights and larger images than the tiny one."""
    vision = {**TINY["vision_cfg"], "image_size": 24, "layers": 2}
    folder = save_tiny(tmp_path_factory.mktemp("larger"), embed_dim=24, vision_cfg=vision)
    config = (folder / "open_clip_config.json").read_text()
    (folder / "open_clip_config.json").write_text(config.replace("[0.5, 0.4, 0.3]", "[0.1, 0.2, 0.3]"))
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def biased(tmp_path_factory) -> str:
    return f"local-dir:{save_tiny(tmp_path_factory.mktemp('biased'), init_logit_bias=-1.0)}"


def taught(model: str, teacher: str, micro_batch_size: int, **changes) -> dict[str, torch.Tensor]:
    """Loss and gradients of a batch of noise."""
    plan = replace(BASIC, micro_batch_size=micro_batch_size, teacher=teacher, **changes)
    clip = load(model)
    state = train_state(clip, plan)
    if teacher:
        state.teacher = Teacher(load_teacher(plan, clip, weights=True), plan, World())
    return gradients(state, global_batch())


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_gradient_equals_the_formula(tiny_model, biased, larger, loss):
    """KL(teacher || model) over the rows and the columns of the batch's similarities."""
    model = biased if loss == "siglip" else tiny_model
    plain = taught(model, "", N_PAIRS, loss=loss)
    clip, teacher = load(model), load(larger)
    batch = global_batch()
    images = train_state(load(model)).augmentation.apply(batch.images, batch.augment_rows)
    with torch.no_grad():
        enlarged = F.interpolate(images, (24, 24), mode="bicubic", antialias=True).clamp(0, 1)
        known = [tensor.double() for tensor in teacher.towers.eval()(enlarged, batch.tokens)]
    clip.towers.train()
    now = [tensor.double() for tensor in clip.towers(images, batch.tokens)]
    target, logits = (scale * image @ text.T for image, text, scale, *_ in (known, now))
    divergence = 0.0
    for p, q in ((target.softmax(1), logits.softmax(1)), (target.softmax(0).T, logits.softmax(0).T)):
        divergence = divergence + (p * (p / q).log()).sum(1).mean() / 2
    assert divergence > 0.01
    (3 * divergence).backward()
    own = {name: each.grad for name, each in clip.towers.named_parameters() if each.grad is not None}
    assert own["model.logit_scale"].abs() > 1e-4
    value = plain.pop("loss") + 3 * divergence.detach()
    expected = {name: tensor + own.get(name, 0) for name, tensor in plain.items()}
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    for micro_batch_size in (N_PAIRS, 5):
        actual = taught(model, larger, micro_batch_size, loss=loss, teacher_weight=3.0)
        torch.testing.assert_close(actual.pop("loss").double(), value, rtol=1e-5, atol=0)
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=2e-6 * largest)


def test_the_model_itself_teaches_nothing_new(tiny_model):
    plain = taught(tiny_model, "", N_PAIRS)
    itself = taught(tiny_model, tiny_model, N_PAIRS)
    torch.testing.assert_close(itself, plain, rtol=1e-4, atol=1e-6)


OPTIONS = {"epochs": 1, "workers": 0, "teacher_weight": 2.0, "optim": Optim(lr=1e-3, eps=1e-4)}


def test_two_ranks_and_chunks_have_the_curve_of_one_process(tiny_model, icon_shards, larger, tmp_path):
    options = {**OPTIONS, "save_every_minutes": 9, "teacher": larger, "same_group": "positive"}
    one = recipe(tiny_model, icon_shards, tmp_path / "one", **options, micro_batch_size=24)
    trained(one, no_validation)
    fit_on_ranks(recipe(tiny_model, icon_shards, tmp_path / "two", **options, micro_batch_size=5), 2)
    curves = [
        [line["train/loss"] for line in metrics(tmp_path / name) if "train/loss" in line]
        for name in ("one", "two")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=2e-5)
    weights, others = (exported(newest(tmp_path / name)) for name in ("one", "two"))
    assert all(torch.allclose(tensor, others[name], atol=1e-4) for name, tensor in weights.items())


def test_resumed_equals_uninterrupted(tiny_model, icon_shards, larger, tmp_path):
    options = {**OPTIONS, "keep_checkpoints": 9, "teacher": larger}
    whole = trained(recipe(tiny_model, icon_shards, tmp_path / "whole", **options), no_validation).folder
    parts = shutil.copytree(whole, tmp_path / "parts", symlinks=True)
    for samples in (96, 120, 144):
        shutil.rmtree(checkpoint(parts, samples))
    (parts / "status.json").unlink()
    trained(recipe(tiny_model, icon_shards, parts, **options), no_validation)
    assert_bit_equal(whole, parts)


def test_weight_0_equals_no_teacher(tiny_model, icon_shards, larger, tmp_path):
    ends, losses = {}, {}
    for name, teacher, weight in (("none", "", 1.0), ("0", larger, 0.0)):
        options = {**OPTIONS, "save_every_minutes": 9, "teacher": teacher, "teacher_weight": weight}
        run = trained(recipe(tiny_model, icon_shards, tmp_path / name, **options), no_validation).folder
        ends[name], losses[name] = exported(newest(run)), metrics(run)[-1]["train/loss"]
    assert_equal_weights(ends["none"], ends["0"])
    assert losses["none"] == losses["0"]


def test_mistakes_are_reported(tiny_model, icon_shards, tmp_path):
    (tmp_path / "long").mkdir()
    text = {**TINY["text_cfg"], "context_length": 12}
    longer = f"local-dir:{save_tiny(tmp_path / 'long', text_cfg=text)}"
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", **OPTIONS, teacher=longer)
    with pytest.raises(
        UserError, match=r"--teacher local-dir:.*long: has another tokenizer or context length"
    ):
        fit(plan, World(), no_validation)
    assert not (tmp_path / "run").exists()
    (tmp_path / "teacher").mkdir()
    teacher = f"local-dir:{save_tiny(tmp_path / 'teacher')}"
    options = {**OPTIONS, "save_every_minutes": 9, "teacher": teacher}
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", **options)
    trained(plan, no_validation)
    (tmp_path / "run" / "status.json").unlink()
    shutil.copy(newest(tmp_path / "run") / WEIGHTS, tmp_path / "teacher" / WEIGHTS)
    with pytest.raises(UserError, match=r"teacher: not the weights that .* or the old --teacher$"):
        fit(plan, World(), no_validation)
