"""AdamW, what it decays, and a learning rate that is a function of the samples seen."""

import math

import torch
from torch import nn

from train.recipe import Optim


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW over all trainable parameters; only matrices decay."""
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            undecayed = parameter.ndim < 2 or "positional_embedding" in name or "pos_embed" in name
            (keep if undecayed else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": optim.weight_decay}, {"params": keep, "weight_decay": 0.0}]
    # Fused: the one that can leave a step out without asking the host; see train.bad_steps.
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def lr_at(step: int, steps: int, optim: Optim) -> float:
    """The rate of step `step` (from 0) of `steps`: linear to the peak over the warm-up, then half a cosine to zero."""
    warmup_steps = round(optim.warmup * steps)
    if step < warmup_steps:
        return optim.lr * (step + 1) / warmup_steps
    return optim.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))
