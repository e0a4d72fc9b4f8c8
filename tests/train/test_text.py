"""Trimming the padding changes no feature and no gradient, and is not done where it would."""

import copy
import pickle

import open_clip
import pytest
import torch
from conftest import TINY
from open_clip.coca_model import CoCa

from train.model.text import causal_tower, encode_text, trimmer

TOKENIZE = open_clip.get_tokenizer("ViT-B-32")
CAPTIONS = ["a bell", "", "an arrow that points to the left of a small house", "a bell " * 100]
TEXT = {**TINY["text_cfg"], "context_length": 77}
EXACT = {torch.float32: 1e-6, torch.float64: 1e-15}


def build(kind: type, **text) -> torch.nn.Module:
    torch.manual_seed(0)
    return kind(16, TINY["vision_cfg"], {**TEXT, **text})


@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
@pytest.mark.parametrize("pool", ["argmax", "eos"])
@pytest.mark.parametrize("dtype", EXACT)
def test_trimmed_captions_have_the_features_and_gradients_of_whole_ones(kind, pool, dtype):
    model = build(kind, pool_type=pool, eos_id=49407).to(dtype)
    whole = copy.deepcopy(model)
    for captions, length in (CAPTIONS[:1], 8), (CAPTIONS[1:2], 8), (CAPTIONS[:3], 16), (CAPTIONS, 77):
        tokens = trimmer(model, TOKENIZE)(captions)
        assert tokens.shape == (len(captions), length)
        features, expected = encode_text(model, tokens), whole.encode_text(TOKENIZE(captions))
        torch.testing.assert_close(features, expected, rtol=0, atol=EXACT[dtype])
        gradients, expected_gradients = (
            torch.autograd.grad(
                output.pow(3).sum(),
                [p for name, p in tower.named_parameters() if "visual" not in name and "logit" not in name],
            )
            for output, tower in ((features, model), (expected, whole))
        )
        for actual, gradient in zip(gradients, expected_gradients, strict=True):
            atol = 10 * EXACT[dtype] * gradient.abs().max().item()
            torch.testing.assert_close(actual, gradient, rtol=0, atol=atol)


# As in open_clip's configs of SigLIP, of towers with a class token after the caption, and of pooling the last
# token.
@pytest.mark.parametrize(
    "text", [{"no_causal_mask": True, "pool_type": "last"}, {"embed_cls": True}, {"pool_type": "last"}]
)
def test_captions_stay_whole_where_the_tower_sees_padding(text):
    model, tokens = build(open_clip.CustomTextCLIP, **text), TOKENIZE(CAPTIONS[:1])
    assert torch.equal(trimmer(model, TOKENIZE)(CAPTIONS[:1]), tokens)
    assert torch.equal(encode_text(model, tokens), model.encode_text(tokens))


def test_captions_stay_whole_for_an_unknown_class():
    torch.manual_seed(0)
    coca = CoCa(16, {**TEXT, "heads": 2, "layers": 1}, {**TEXT, "embed_cls": True}, TINY["vision_cfg"])
    assert causal_tower(coca) is None


def test_the_pickled_trimmer_holds_no_weights():
    assert len(pickle.dumps(trimmer(build(open_clip.CLIP), len))) < 1000
