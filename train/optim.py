"""AdamW, what it decays, the rate of each tower and layer, and a rate of the run that is a function of the
samples seen.
"""

import math

import torch
from torch import nn

from train.model.clip import Towers
from train.model.layers import depths, tower_of
from train.recipe import Optim


def build_optimizer(towers: Towers, optim: Optim) -> torch.optim.AdamW:
    """AdamW over all trainable parameters; only matrices decay. A group's `lr_scale`, where it is not 1, is
    for set_lr().

    Raises:
        UserError: layer_decay, and a tower whose layers are not known.
    """
    scales, groups = lr_scales(towers.model, optim), {}
    for name, parameter in towers.model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and "positional_embedding" not in name and "pos_embed" not in name
            groups.setdefault((scales[name], decays), []).append(parameter)
    options = [
        {"params": groups[scale, decays], "weight_decay": optim.weight_decay * decays}
        | ({"lr_scale": scale} if scale != 1 else {})
        for scale, decays in sorted(groups, reverse=True)
    ]
    # Fused: the one that can leave a step out without asking the host; see train.run.nonfinite.
    return torch.optim.AdamW(
        options, lr=optim.lr, betas=(*optim.betas), eps=optim.eps, fused=True
    )


def lr_scales(model: nn.Module, optim: Optim) -> dict[str, float]:
    """The rate of each parameter of an open_clip model, as a factor of the run's: its tower's, and its
    layer's.

    Layer-wise decay as in BEiT (Bao et al. 2021, its fine-tuning), with timm's layers; logit_scale has the
    run's rate."""
    of_tower = {"image": optim.image_lr, "text": optim.text_lr, "": 1.0}
    depth = depths(model) if optim.layer_decay != 1 else {}
    return {
        name: of_tower[tower_of(name)] * optim.layer_decay ** depth.get(name, 0)
        for name, _ in model.named_parameters()
    }


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let the next step have the rate `lr`, and each group its part of that."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def lr_at(step: int, steps: int, optim: Optim) -> float:
    """The rate of step `step` (from 0) of `steps`: linear to the peak over the warm-up, then half a cosine to
    zero.
    """
    warmup_steps = round(optim.warmup_fraction * steps)
    if step < warmup_steps:
        return optim.lr * (step + 1) / warmup_steps
    return optim.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))
