"""The initial model, kept frozen beside the one in training: one copy serves replay, L2-SP and WiSE-FT."""

import copy

import torch

from train.model.towers import Towers
from train.recipe import Recipe


def frozen_copy(towers: Towers, recipe: Recipe, device: torch.device) -> Towers | None:
    """A frozen copy of `towers` in evaluation mode, or None where the recipe does not need one.

    It is on the device where a step uses it (replay, L2-SP), and on the CPU where only validation does
    (WiSE-FT).

    Args:
        towers: on `device`, before a checkpoint is restored and before blocks are compiled.
    """
    used_by_steps = bool(recipe.replay or recipe.l2_sp)
    if not used_by_steps and not recipe.wise_ft:
        return None
    base = copy.deepcopy(towers).requires_grad_(False).eval()
    return base.to(device if used_by_steps else "cpu")
