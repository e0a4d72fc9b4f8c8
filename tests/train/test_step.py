"""A global batch has one gradient, logit_scale included: on one or two ranks, whole or in chunks."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, call, save_tiny
from ranks_script import (
    BASIC,
    CASES,
    MICRO_BATCH_SIZES,
    global_batch,
    gradients,
    gradients_of_two_steps,
    train_state,
)

from train.model.clip import load
from train.model.towers import Towers
from train.step import backward
from train.world import World


@pytest.fixture(scope="module")
def biased_model(tmp_path_factory) -> str:
    """With 16 patches and a logit_bias at which positives and negatives have gradients of the same size."""
    vision = {**TINY["vision_cfg"], "patch_size": 4}
    return (
        f"local-dir:{save_tiny(tmp_path_factory.mktemp('biased'), vision_cfg=vision, init_logit_bias=-1.0)}"
    )


@pytest.fixture(scope="module")
def of_two_ranks(tiny_model, biased_model, tmp_path_factory) -> dict[tuple[str, int], list[dict]]:
    """The gradients of all CASES and MICRO_BATCH_SIZES on two ranks, by one start of torchrun."""
    out = tmp_path_factory.mktemp("ranks") / "gradients.pt"
    call("tests.ranks_script", out, tiny_model, biased_model, ranks=2)
    return torch.load(out, weights_only=True)


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    assert "model.logit_scale" in actual
    largest = max(tensor.abs().max().item() for name, tensor in expected.items() if name != "loss")
    for name, tensor in expected.items():
        assert tensor.abs().max() > 0 or "in_proj_bias" in name, name
        torch.testing.assert_close(
            actual[name],
            tensor,
            rtol=1e-5,
            atol=1e-6 * largest,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_and_chunks_equal_one_process(of_two_ranks, tiny_model, biased_model, case):
    model = tiny_model if case == "clip" else biased_model
    expected = gradients_of_two_steps(model, 16, World(), **CASES[case])
    for micro_batch_size in MICRO_BATCH_SIZES:
        for actual, step in zip(of_two_ranks[case, micro_batch_size], expected, strict=True):
            assert_same(actual, step)
    assert ("model.logit_bias" in expected[0]) == case.startswith("siglip")
    chunked = gradients_of_two_steps(model, 5, World(), **CASES[case])
    assert_same(chunked[0], expected[0])


def test_each_case_has_a_loss_different_from_the_others(of_two_ranks):
    losses = {round(of_two_ranks[case, 8][0]["loss"].item(), 4) for case in CASES}
    assert len(losses) == len(CASES)


@pytest.mark.parametrize("micro_batch_size", [1, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_chunks_equal_the_whole_batch(tiny_model, micro_batch_size, checkpointing):
    results = []
    for size in (16, micro_batch_size):
        state = train_state(load(tiny_model), replace(BASIC, micro_batch_size=size))
        state.clip.towers.model.set_grad_checkpointing(checkpointing)
        results.append(gradients(state, global_batch()))
    assert_same(results[1], results[0])


def test_random_forwards_repeat_in_the_second_pass_over_chunks(tmp_path):
    """Both forwards of a chunk use one seed, which follows from the samples seen; shown with open_clip's own
    patch dropout, which draws from torch's generator.
    """
    vision = {**TINY["vision_cfg"], "patch_size": 4, "patch_dropout": 0.5}
    clip = load(f"local-dir:{save_tiny(tmp_path, vision_cfg=vision)}")
    seen = []

    class Spy(Towers):
        def forward(self, *batch):
            outputs = super().forward(*batch)
            seen.append(outputs[0].detach())
            return outputs

    clip.towers.__class__ = Spy
    state = train_state(clip, replace(BASIC, micro_batch_size=8))
    for samples in (0, 16, 0):
        state.samples = samples
        backward(state, global_batch())
    first, later, again = seen[:4], seen[4:8], seen[8:]
    assert torch.equal(first[0], first[2])  # chunk 0: without a graph, then with one
    assert torch.equal(first[1], first[3])
    assert not torch.equal(first[0], later[0])
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
