"""Self-attention of open_clip's blocks without copies of queries, keys and values, and without a mask tensor.

nn.MultiheadAttention makes q, k and v contiguous, which copies each of them, and open_clip gives it the
causal mask as a tensor, which rules out flash attention. Here they are views of one projection, and the mask
is scaled_dot_product_attention's own flag. Outputs differ by the order of additions in matrix products, so
that evaluation and export, which are without gradients, keep open_clip's own: their features are open_clip's
bit for bit.
"""

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import nn

from train.model.text import causal_tower


class PackedAttentionBlock(ResidualAttentionBlock):
    """A ResidualAttentionBlock with the same weights, under the same names.

    Attributes:
        causal: whether each token attends to itself and those before it. The mask that the tower passes says
            the same and is not read: a compiled block would be compiled anew for its strides.
    """

    causal = False

    def attention(
        self,
        q_x: torch.Tensor,
        k_x: torch.Tensor | None = None,
        v_x: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[b, L, d] -> [b, L, d]; attn_mask [L, L], [b * heads, L, L] or None."""
        evaluates = not (self.training or torch.is_grad_enabled())
        if evaluates or k_x is not None or v_x is not None:
            return super().attention(q_x, k_x, v_x, attn_mask)
        projected = F.linear(q_x, self.attn.in_proj_weight, self.attn.in_proj_bias)
        heads = projected.unflatten(2, (3, self.attn.num_heads, self.attn.head_dim))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind()  # each [b, heads, L, head_dim]
        mask = None if self.causal or attn_mask is None else attn_mask.to(q_x.dtype)
        if mask is not None and mask.ndim == 3:
            mask = mask.unflatten(0, (-1, self.attn.num_heads))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.attn.out_proj(attended.transpose(1, 2).flatten(2))


def pack_attention(model: nn.Module) -> None:
    """Turn the blocks of an open_clip model into PackedAttentionBlocks, where they compute the same.

    Blocks of another class, or with attention of another kind, stay as they are.
    """
    for block in model.modules():
        if type(block) is ResidualAttentionBlock and _is_plain(block.attn):
            block.__class__ = PackedAttentionBlock
    if (tower := causal_tower(model)) is not None:
        for block in tower.transformer.resblocks:
            if isinstance(block, PackedAttentionBlock):
                block.causal = True


def _is_plain(attention: nn.Module) -> bool:
    """Whether it is nn.MultiheadAttention with one input projection, no dropout and no added keys."""
    return (
        type(attention) is nn.MultiheadAttention
        and attention.batch_first
        and attention._qkv_same_embed_dim
        and attention.dropout == 0
        and attention.bias_k is None
        and not attention.add_zero_attn
    )
