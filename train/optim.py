"""AdamW, what it decays, and a learning rate that is a function of the samples seen."""

import math

import torch
from torch import nn

from train.model.towers import Towers
from train.recipe import Optim


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW whose step can be skipped without asking the host."""

    def step(self, closure: None = None, *, found_inf: torch.Tensor | None = None) -> None:
        """Update the weights, or nothing where `found_inf` is 1.

        Args:
            found_inf: fp32 [] on the device. The fused kernel reads it from the attribute of this name, as
                torch.amp.GradScaler has set it since torch 2.0; then neither weights, moments nor step count
                change.
        """
        self.found_inf = found_inf
        super().step(closure)


def build_optimizer(towers: Towers, optim: Optim) -> GuardedAdamW:
    """AdamW over all trainable parameters, in two groups: matrices, which decay, and all others, which do
    not.
    """
    decayed, others = [], []
    for name, parameter in towers.model.named_parameters():
        if parameter.requires_grad:
            (decayed if decays(name, parameter) else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return GuardedAdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter of an open_clip model."""
    return parameter.ndim >= 2 and "positional_embedding" not in name and "pos_embed" not in name


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def lr_at(step: int, steps: int, optim: Optim) -> float:
    """The learning rate of step `step` (from 0) of `steps`: linear warm-up to the peak, then half a cosine to
    zero.
    """
    warmup_steps = round(optim.warmup_fraction * steps)
    if step < warmup_steps:
        return optim.lr * (step + 1) / warmup_steps
    return optim.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))
