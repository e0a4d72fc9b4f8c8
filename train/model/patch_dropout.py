"""Patch dropout: train on a part of each image's patches, blank ones dropped first, and on all at the end of
the run.

An icon is half background, and a patch of one colour carries little. From FLIP (Li et al. 2022, "Scaling
Language-Image Pre-training via Masking"), which drops at random and ends with a short training on whole
images.
"""

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import nn

from data_prep.errors import UserError

WHOLE_FROM = 0.9  # of the run; from there on no patch is dropped, as in evaluation
MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # of splitmix64, as signed 64-bit integers
INCREMENT = -0x61C8864680B583EB


class PatchDropout(nn.Module):
    """Replaces open_clip's module of that name, which drops at random, between patch embedding and blocks.

    Each image's mask is a function of its seed and its own patches, so it is the same in any chunk and on any
    rank.
    """

    def __init__(self, patch_size: tuple[int, int]):
        super().__init__()
        self.patch_size, self.rate = patch_size, 0.0
        self._inputs: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def install(cls, visual: nn.Module) -> "PatchDropout":
        """Put a PatchDropout, at a rate of 0, into an open_clip image tower.

        Raises:
            UserError: the tower is not a ViT of open_clip's.
        """
        if type(visual) is not VisionTransformer:
            raise UserError(
                f"--patch-dropout: a {type(visual).__name__} has no patches to drop; leave it out, or use a"
                " ViT of open_clip's"
            )
        visual.patch_dropout = cls(visual.patch_size)
        return visual.patch_dropout

    def set_rate(self, rate: float, progress: float) -> None:
        """Drop a fraction `rate` of the patches, or none once `progress`, from 0 to 1, has reached
        WHOLE_FROM.
        """
        self.rate = rate if progress < WHOLE_FROM else 0.0

    def remember(self, pixels: torch.Tensor, seeds: torch.Tensor) -> None:
        """Keep what the next forward needs: the tower hands this module tokens alone.

        Args:
            pixels: [b, 3, H, W].
            seeds: int64 [b].
        """
        self._inputs = pixels, seeds

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[b, 1 + n, d], a class token and n patches -> [b, 1 + kept, d]."""
        inputs, self._inputs = self._inputs, None
        if not self.training or not self.rate:
            return tokens
        assert inputs is not None, "remember() comes before each forward in training"
        pixels, seeds = inputs
        class_token, patches = tokens[:, :1], tokens[:, 1:]
        n = patches.shape[1]
        priority = uniforms(seeds, n) + self._has_content(pixels)
        kept = priority.topk(n - int(n * self.rate), dim=1).indices
        kept_patches = patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[2]))
        return torch.cat([class_token, kept_patches], dim=1)

    def _has_content(self, pixels: torch.Tensor) -> torch.Tensor:
        """bool [b, n]: whether a patch has more than one colour."""
        largest, negated_smallest = (F.max_pool2d(values, self.patch_size) for values in (pixels, -pixels))
        return ((largest + negated_smallest).amax(1) > 0).flatten(1)


def uniforms(seeds: torch.Tensor, n: int) -> torch.Tensor:
    """fp32 [b, n] in [0, 1): n numbers of each seed, int64 [b], by splitmix64 (Steele et al. 2014), on any
    device.
    """
    x = seeds[:, None] + INCREMENT * torch.arange(1, n + 1, device=seeds.device)
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
        x = (x ^ _shifted(x, shift)) * multiplier
    x = x ^ _shifted(x, 31)
    return _shifted(x, 40).float() * 2.0**-24


def _shifted(x: torch.Tensor, n: int) -> torch.Tensor:
    """x >> n of the unsigned number with x's bits; torch's own shift copies the sign."""
    return (x >> n) & ((1 << (64 - n)) - 1)
