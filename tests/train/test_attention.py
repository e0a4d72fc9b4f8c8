"""Packed attention is open_clip's own: outputs, gradients, names of weights; without its copies and mask."""

import copy
from collections import Counter

import open_clip
import pytest
import torch
from conftest import TINY, save_tiny
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from open_clip.coca_model import CoCa
from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock
from runs import assert_equal_weights
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from train.model.activation_memory import blocks
from train.model.attention import PackedAttentionBlock, pack_attention
from train.model.clip import load
from train.model.text import encode_text

VISION = {**TINY["vision_cfg"], "patch_size": 4, "layers": 2}
TEXT = {**TINY["text_cfg"], "vocab_size": 100, "context_length": 16, "layers": 2}
WIDE = {**VISION, "width": 256, "head_width": 64}, {**TEXT, "width": 256, "heads": 4}
MODELS = {
    "CLIP": lambda: open_clip.CLIP(16, VISION, TEXT),
    "CustomTextCLIP": lambda: open_clip.CustomTextCLIP(16, VISION, TEXT),
    "wide": lambda: open_clip.CLIP(16, *WIDE),
    "text that sees padding": lambda: open_clip.CustomTextCLIP(
        16, VISION, {**TEXT, "no_causal_mask": True, "pool_type": "last"}
    ),
    "CoCa": lambda: CoCa(
        16,
        {**TEXT, "attn_pooler_heads": 2},
        {**TEXT, "embed_cls": True, "output_tokens": True},
        {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    ),
}
# The largest difference, relative to the largest value or to 0.01, from the order of additions.
DIFFERENCE = {torch.float64: 1e-14, torch.float32: 5e-6, torch.bfloat16: 5e-2}


def features_and_gradients(model: nn.Module, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(5, 3, 16, 16, generator=generator)
    tokens = torch.randint(1, 98, (5, 16), generator=generator)
    tokens[:, 7:] = 0
    tokens[:, 7] = 99  # the end of a text
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        pixels = pixels.double() if dtype == torch.float64 else pixels
        features = [model.encode_image(pixels), encode_text(model, tokens[:, :length])]
    model.zero_grad()
    sum(feature.pow(3).sum() for feature in features).backward()
    return features + [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DIFFERENCE)
def test_features_and_gradients_are_equal(name, dtype):
    torch.manual_seed(0)
    model = MODELS[name]().to(torch.float64 if dtype == torch.float64 else torch.float32)
    for parameter in model.parameters():  # biases begin as 0, and CoCa leaves a parameter uninitialised
        if parameter.ndim == 1 or not parameter.isfinite().all() or parameter.abs().max() > 100:
            nn.init.normal_(parameter, std=0.1)
    packed = copy.deepcopy(model)
    pack_attention(packed)
    assert {type(block) for block in blocks(packed)} == {PackedAttentionBlock}
    assert_equal_weights(packed.state_dict(), model.state_dict())
    for length in (8, 16) if name in ("CLIP", "CustomTextCLIP", "wide") else (16,):
        pairs = zip(*(features_and_gradients(each, length, dtype) for each in (packed, model)), strict=True)
        for actual, expected in pairs:
            atol = DIFFERENCE[dtype] * max(expected.abs().max().item(), 1e-2)
            torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_evaluation_is_open_clips_bit_for_bit(tmp_path):
    clip = load(
        f"local-dir:{save_tiny(tmp_path, vision_cfg=WIDE[0], text_cfg={**WIDE[1], 'vocab_size': 49408})}"
    )
    original = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    clip.towers.eval()
    pixels, tokens = torch.randn(3, 3, 16, 16), torch.randint(1, 99, (3, 16))
    with torch.no_grad():
        assert torch.equal(clip.towers.model.encode_image(pixels), original.encode_image(pixels))
        assert torch.equal(clip.towers.model.encode_text(tokens), original.encode_text(tokens))


def test_other_blocks_and_other_attention_stay():
    custom = open_clip.CLIP(16, {**VISION, "qk_norm": True}, TEXT)
    dropping, by_sequence = (open_clip.CLIP(16, VISION, TEXT) for _ in range(2))
    for block in dropping.visual.transformer.resblocks:
        block.attn.dropout = 0.1
    by_sequence.visual.transformer.resblocks[0] = ResidualAttentionBlock(32, 2, batch_first=False)
    for model, kind in (
        (custom, CustomResidualAttentionBlock),
        (dropping, ResidualAttentionBlock),
        (by_sequence, ResidualAttentionBlock),
    ):
        pack_attention(model)
        assert type(model.visual.transformer.resblocks[0]) is kind
        assert type(model.transformer.resblocks[0]) is PackedAttentionBlock


def copies(block: nn.Module, mask: torch.Tensor | None) -> list[Counter]:
    """Of a compiled block's forward and backward: how often each operation is called."""
    found = []

    def count(graph: torch.fx.GraphModule, _):
        found.append(Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition
    )
    tokens = torch.randn(4, 16, block.attn.embed_dim, requires_grad=True)
    torch.compile(block, backend=backend)(tokens, attn_mask=mask).sum().backward()
    return found


@pytest.mark.parametrize("tower", ["image", "text"])
def test_nothing_is_copied_in_a_compiled_block(tower):
    clones = {}
    for packed in (False, True):
        model = open_clip.CLIP(16, VISION, TEXT)
        if packed:
            pack_attention(model)
        mask = model.attn_mask if tower == "text" else None
        block = (model if tower == "text" else model.visual).transformer.resblocks[0]
        forward, backward = copies(block, mask)
        clones[packed] = forward["aten.clone.default"], backward["aten.clone.default"]
    torch.compiler.reset()
    assert clones == {False: (2, 8), True: (0, 1)}  # one puts the gradients of q, k and v side by side
