"""Each mode of activation checkpointing has the same gradient, keeps less, and recomputes what it says."""

import dataclasses

import pytest
import torch
from conftest import TINY, save_tiny
from ranks_script import BASIC, global_batch, gradients, train_state
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import count_products, saved_bytes
from data_prep.errors import UserError
from train.model import activation_memory
from train.model.activation_memory import (
    apply_checkpointing,
    blocks,
    dummy_batch,
    fit_micro_batch,
    needed_bytes,
    uncompiled,
)
from train.model.clip import Clip, load
from train.recipe import Recipe, parse
from train.world import World

RECIPE = Recipe("tiny:none", "data", "run", global_batch_size=16, precision="fp32")


@pytest.fixture
def clip(tmp_path) -> Clip:
    """Blocks large enough for what a norm keeps beside its input not to count."""
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    clip = load(
        f"local-dir:{save_tiny(tmp_path, vision_cfg=vision, text_cfg={**TINY['text_cfg'], 'layers': 2})}"
    )
    yield clip
    apply_checkpointing(clip.towers.model, "none", compiled=False)


class Autocast(torch.nn.Module):
    def __init__(self, block: torch.nn.Module, bf16: bool):
        super().__init__()
        self.block, self.bf16 = block, bf16

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self.block(tokens)


@pytest.fixture
def eager_kernels(monkeypatch):
    """Graphs are traced and partitioned as in training, and run by torch's kernels: no C++ is compiled."""
    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compile_in_place(self, backend="aot_eager_decomp_partition")
    )


def gradients_in(clip: Clip, mode: str, compiled: bool = False) -> dict[str, torch.Tensor]:
    apply_checkpointing(clip.towers.model, mode, compiled)
    batch = global_batch()
    return gradients(train_state(clip, BASIC), batch._replace(images=batch.images.repeat(1, 1, 2, 2)))


def test_the_blocks_of_both_towers_are_found(clip):
    assert [type(block).__name__ for block in blocks(clip.towers.model)] == ["PackedAttentionBlock"] * 4


def test_gradients_are_equal(clip, eager_kernels):
    expected = gradients_in(clip, "none")
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for mode, compiled in (("full", False), ("none", True), ("selective", True)):
        for name, gradient in gradients_in(clip, mode, compiled).items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-5, atol=2e-6 * largest, msg=f"{mode}: {name}"
            )


@pytest.mark.parametrize("bf16", [False, True])
def test_selective_keeps_the_outputs_of_products_and_recomputes_none(clip, eager_kernels, bf16):
    """Of the 16 widths of a ViT block, 10 are kept: input, q, k, v, attention, input of the MLP, its four."""
    block, tokens = blocks(clip.towers.model)[0], torch.randn(4, 17, 64, requires_grad=True)
    kept, products = {}, {}
    for mode in ("none", "selective"):
        apply_checkpointing(clip.towers.model, mode, compiled=mode == "selective")
        step = torch.autocast("cpu", torch.bfloat16, enabled=bf16)(lambda: block(tokens).sum().backward())
        step()  # compiles
        kept[mode] = saved_bytes(Autocast(block, bf16), (tokens,))
        products[mode] = count_products(step)
    apply_checkpointing(clip.towers.model, "full", compiled=False)
    assert 0.60 < kept["selective"] / kept["none"] < 0.64
    assert products == {"none": 13, "selective": 13}
    recomputing = count_products(lambda: checkpoint(block, tokens, use_reentrant=False).sum().backward())
    assert recomputing == 18  # a recomputed product is counted


def test_evaluation_compiles_nothing(clip, eager_kernels):
    apply_checkpointing(clip.towers.model, "none", compiled=True)
    before = torch._dynamo.utils.counters["frames"]["total"]
    with uncompiled():
        clip.towers(*dummy_batch(clip.towers, 2, torch.device("cpu")))
    assert torch._dynamo.utils.counters["frames"]["total"] == before
    clip.towers(*dummy_batch(clip.towers, 2, torch.device("cpu")))
    assert torch._dynamo.utils.counters["frames"]["total"] > before


def bytes_for(clip: Clip, mode: str, pairs: int) -> float:
    """The free memory into which `pairs` just fit."""
    apply_checkpointing(clip.towers.model, mode, compiled=False)
    needed = needed_bytes(clip.towers, mode, pairs, torch.device("cpu"))
    weights = sum(parameter.nbytes for parameter in clip.towers.parameters())
    return (needed + 3 * weights) / activation_memory.SPARE + 1000


@pytest.mark.parametrize(
    ("fits", "asked", "expected"),
    [
        (("none", 16), {}, ("none", 16)),
        (("none", 15), {}, ("full", 16)),
        (("none", 6), {"activation_checkpointing": "none"}, ("none", 6)),  # three chunks: 6, 6 and 4
        (("none", 15), {"activation_checkpointing": "none"}, ("none", 8)),  # two even ones, not 15 and 1
        (("full", 5), {}, ("full", 4)),
        (("none", 5), {"micro_batch_size": 4}, ("none", 4)),
        (("full", 3), {"micro_batch_size": 8}, ("full", 8)),  # as asked, in the mode that needs least
        # nothing is measured
        (("full", 3), {"micro_batch_size": 40, "activation_checkpointing": "none"}, ("none", 16)),
    ],
)
def test_auto_takes_the_fastest_that_fits(clip, monkeypatch, fits, asked, expected):
    free = bytes_for(clip, *fits)
    monkeypatch.setattr(activation_memory, "free_bytes", lambda device: free)
    assert fit_micro_batch(clip.towers, dataclasses.replace(RECIPE, **asked), World()) == expected


def test_too_little_memory_for_one_pair_is_an_error(clip, monkeypatch):
    monkeypatch.setattr(activation_memory, "free_bytes", lambda device: 1_000_000)
    with pytest.raises(
        UserError, match=r"activation_checkpointing full, .* one pair do not fit into 0\.0 GB"
    ):
        fit_micro_batch(clip.towers, RECIPE, World())


def test_selective_needs_compiled_blocks():
    arguments = "--model a:none --data d --run r --activation-checkpointing selective --compile never"
    with pytest.raises(UserError, match="pass --compile always"):
        parse(arguments.split())


def test_measuring_does_not_change_statistics(tmp_path):
    vision = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32}
    clip = load(f"local-dir:{save_tiny(tmp_path, vision_cfg=vision)}")
    before = clip.fingerprint()
    fit_micro_batch(clip.towers, dataclasses.replace(RECIPE, activation_checkpointing="none"), World())
    assert clip.fingerprint() == before
    clip.towers(*dummy_batch(clip.towers, 2, torch.device("cpu")))
    assert clip.fingerprint() != before
