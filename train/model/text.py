"""Padding is trimmed to the longest caption of a batch, which is exact where the text tower is causal.

captions -> tokenizer -> int64 [n, 77] -> trim_padding -> int64 [n, L], L a multiple of 8 -> encode_text

Where a tower attends to padding (SigLIP's, CoCa's, Hugging Face's), nothing is trimmed.
"""

import functools
from collections.abc import Callable

import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer, text_global_pool
from torch import nn

MULTIPLE = 8  # suits tensor cores, and leaves few lengths to compile for


def causal_tower(model: nn.Module) -> nn.Module | None:
    """The text tower of an open_clip model, if trimming is exact: causal, pooled at the end of text."""
    if type(model) not in (CLIP, CustomTextCLIP):
        return None
    tower = getattr(model, "text", model)
    if (
        type(tower) not in (CLIP, TextTransformer)
        or tower.attn_mask is None
        or _pool(tower)[0] not in ("argmax", "eos")
    ):
        return None
    if type(tower) is TextTransformer and (
        tower.use_pad_mask or tower.cls_emb is not None or tower.output_tokens
    ):
        return None
    return tower


def trimmer(model: nn.Module, tokenizer: Callable) -> Callable[[list[str]], torch.Tensor]:
    """`tokenizer` with its padding trimmed where that is exact for `model`; without weights, so it can be
    pickled.
    """
    tower = causal_tower(model)
    return functools.partial(_tokenized, tokenizer, tower and _pool(tower))


def _tokenized(tokenizer: Callable, pool: tuple[str, int | None] | None, captions: list[str]) -> torch.Tensor:
    return trim_padding(tokenizer(captions), pool)


def trim_padding(tokens: torch.Tensor, pool: tuple[str, int | None] | None) -> torch.Tensor:
    """int64 [n, L] up to the end of the longest caption, rounded up to MULTIPLE; whole if `pool` is None."""
    if pool is None:
        return tokens
    kind, eos_id = pool
    ends = (tokens if kind == "argmax" else (tokens == eos_id).int()).argmax(dim=1)
    return tokens[:, : -(-(int(ends.max()) + 1) // MULTIPLE) * MULTIPLE]


def encode_text(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """model.encode_text for tokens that may be trimmed: int64 [n, L] -> [n, d], not normed.

    open_clip 3.3 itself fails on them: it adds the whole positional embedding and mask.
    """
    length, tower = tokens.shape[1], causal_tower(model)
    if tower is None or length == len(tower.positional_embedding):
        return model.encode_text(tokens)
    return encode_causal(tower, tokens)


def encode_causal(tower: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Features of a causal_tower() for int64 [n, L] of any length up to its context: [n, d], not normed."""
    length, dtype = tokens.shape[1], tower.transformer.get_cast_dtype()
    x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)
    x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
    kind, eos_id = _pool(tower)
    x = text_global_pool(tower.ln_final(x), tokens, kind, eos_token_id=eos_id)
    if tower.text_projection is None:
        return x
    if isinstance(tower.text_projection, nn.Linear):
        return tower.text_projection(x)
    return x @ tower.text_projection


def _pool(tower: nn.Module) -> tuple[str, int | None]:
    """How a tower pools its tokens, and the id of the end-of-text token where it pools by that."""
    if type(tower) is CLIP:
        return tower.text_pool_type, getattr(tower, "text_eos_id", None)
    return tower.pool_type, getattr(tower, "eos_id", None)
