"""One global batch has one gradient: in one process or two, whole or in micro batches, logit_scale included."""

import pytest
import torch
from conftest import call, save_tiny
from ranks_script import LOSSES, global_batch, gradients_of_two_steps

from train.model.clip import Towers, load
from train.step import backward
from train.world import World


def gradients_of(model: str, micro_batch_size: int, tmp_path, ranks: int, *options: str) -> list[dict]:
    out = tmp_path / f"{ranks}-{micro_batch_size}.pt"
    call("tests.ranks_script", model, micro_batch_size, out, *options, ranks=ranks)
    return torch.load(out, weights_only=True)


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert "model.logit_scale" in found
    scale = max(tensor.abs().max() for name, tensor in expected.items() if name != "loss")
    for name, tensor in expected.items():
        assert tensor.abs().max() > 0 or "in_proj_bias" in name, name
        torch.testing.assert_close(
            found[name],
            tensor,
            rtol=1e-5,
            atol=1e-6 * scale.item(),
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("micro_batch_size", [16, 8, 3])
def test_two_ranks_and_micro_batches_equal_one_process(tiny_model, tmp_path, micro_batch_size):
    expected = gradients_of(tiny_model, 16, tmp_path, ranks=0)
    for found, wanted in zip(
        gradients_of(tiny_model, micro_batch_size, tmp_path, ranks=2), expected, strict=True
    ):
        assert_same(found, wanted)


@pytest.fixture(scope="module")
def biased_model(tmp_path_factory) -> str:
    """With a logit_bias, at which a yes is about as likely as a no; so all gradients are of one size."""
    return f"local-dir:{save_tiny(tmp_path_factory.mktemp('biased'), init_logit_bias=-1.0)}"


@pytest.mark.parametrize("micro_batch_size", [8, 3])
def test_every_loss_is_the_same_in_two_ranks_and_micro_batches(biased_model, tmp_path, micro_batch_size):
    expected = [
        each
        for loss, same_group in LOSSES
        for each in gradients_of_two_steps(biased_model, 16, World(), loss=loss, same_group=same_group)
    ]
    assert len({round(one["loss"].item(), 4) for one in expected}) == len(
        LOSSES
    )  # so the two steps of each are equal, and no others
    for found, wanted in zip(
        gradients_of(biased_model, micro_batch_size, tmp_path, 2, "losses"), expected, strict=True
    ):
        assert_same(found, wanted)
    assert ["model.logit_bias" in one for one in expected[::2]] == [loss == "siglip" for loss, _ in LOSSES]


@pytest.mark.parametrize(("loss", "same_group"), LOSSES)
def test_every_loss_is_the_same_in_micro_batches_of_one_process(biased_model, loss, same_group):
    whole, chunked = (
        gradients_of_two_steps(biased_model, size, World(), loss=loss, same_group=same_group)[0]
        for size in (16, 5)
    )
    assert_same(chunked, whole)


def test_gradients_in_bf16_are_near(tiny_model, tmp_path):
    expected = gradients_of(tiny_model, 8, tmp_path, ranks=0)[1]
    for name, found in gradients_of(tiny_model, 8, tmp_path, 2, "compress")[1].items():
        assert (found - expected[name]).norm() <= 0.01 * expected[name].norm(), name
        assert name == "loss" or not torch.equal(found, expected[name]) or not found.any(), name


@pytest.mark.parametrize("micro_batch_size", [1, 5, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_equal_the_whole_in_one_process(tiny_model, micro_batch_size, checkpointing):
    results = []
    for size in (16, micro_batch_size):
        clip = load(tiny_model)
        clip.towers.model.set_grad_checkpointing(checkpointing)
        clip.towers.train()
        loss = backward(clip.towers, global_batch(), size, World(), seed=0, samples=0)
        results.append(
            {"loss": loss, **{name: parameter.grad for name, parameter in clip.towers.named_parameters()}}
        )
    assert_same(results[1], results[0])


def test_dropout_is_replayed_in_chunks_and_follows_samples(tmp_path):
    """With patch dropout the two forwards of a chunk must drop the same patches: then a chunk's features
    repeat.
    """
    vision = {
        "image_size": 16,
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "patch_size": 4,
        "patch_dropout": 0.5,
    }
    clip = load(f"local-dir:{save_tiny(tmp_path, vision_cfg=vision)}")
    clip.towers.train()
    seen = []

    class Spy(Towers):
        def forward(self, *batch):
            seen.append(super().forward(*batch))
            return seen[-1]

    clip.towers.__class__ = Spy
    for samples in (0, 16, 0):
        backward(clip.towers, global_batch(), 8, World(), seed=0, samples=samples)
    image_features = [features[0].detach() for features in seen]
    first, later, again = image_features[:4], image_features[4:8], image_features[8:]
    assert torch.equal(first[0], first[2])  # chunk 0: without a graph, then with one
    assert torch.equal(first[1], first[3])
    assert not torch.equal(first[0], later[0])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
