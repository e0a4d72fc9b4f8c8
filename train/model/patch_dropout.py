"""Patch dropout: steps on a part of each picture's patches, the blank ones left out first, and on all of them
at the end.

An icon is half background, and a patch of one color says little. From FLIP (Li et al. 2022, "Scaling
Language-Image Pre-training via Masking"), which drops at random and ends with a short training on whole
pictures."""

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import nn

from data_prep.errors import UserError

WHOLE_FROM = 0.9  # of the run: from there on no patch is dropped, as in evaluation


class PatchDropout(nn.Module):
    """Takes the place of open_clip's, which drops at random: between the embedding of the patches and the
    blocks.

    Attributes:
        part: of the patches that is dropped in training, 0 for none.
    """

    def __init__(self):
        super().__init__()
        self.part, self.pixels = 0.0, None

    def look(self, visual: VisionTransformer, inputs: tuple[torch.Tensor]) -> None:
        """Before the tower's forward: remember its pictures, [b, 3, H, W]."""
        self.patch_size, self.pixels = visual.patch_size, inputs[0]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[b, 1 + n, d], a class token and n patches -> [b, 1 + kept, d]."""
        if not self.training or not self.part:
            return tokens
        first, patches = tokens[:, :1], tokens[:, 1:]
        n = patches.shape[1]
        shown = torch.rand(len(patches), n, device=tokens.device) + self._has_content()
        kept = shown.topk(n - int(n * self.part), dim=1).indices
        return torch.cat([first, patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[2]))], dim=1)

    def _has_content(self) -> torch.Tensor:
        """bool [b, n]: whether a patch has more than one color."""
        pixels, self.pixels = self.pixels, None
        spread = F.max_pool2d(pixels, self.patch_size) + F.max_pool2d(
            -pixels, self.patch_size
        )  # largest less least
        return (spread.amax(1) > 0).flatten(1)


def drop(visual: nn.Module, part: float, progress: float) -> None:
    """Let a tower that install() was given drop `part` of the patches, or none after `progress`, from 0 to 1,
    of the run.
    """
    visual.patch_dropout.part = part if progress < WHOLE_FROM else 0.0


def install(visual: nn.Module) -> None:
    """Patch dropout in an open_clip image tower, switched off.

    Raises:
        UserError: the tower has no place for it.
    """
    if type(visual) is not VisionTransformer:
        raise UserError(
            f"patch_dropout: a {type(visual).__name__} has no patches to drop; leave the key out, or take a"
            " ViT of open_clip's"
        )
    visual.patch_dropout = PatchDropout()
    visual.register_forward_pre_hook(visual.patch_dropout.look)
