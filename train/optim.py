"""AdamW, what it decays, and a learning rate that is a function of the samples seen."""

import math
import re

import torch
from torch import nn

from train.model.towers import Towers
from train.recipe import Optim

NO_DECAY = re.compile(
    r"positional_embedding|position_embeddings|pos_embed|relative_(position|attention)_bias|cls_token|class_embedding|cls_emb"
)


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
    """AdamW over all trainable parameters, in two groups: with weight decay and without."""
    decayed, others, exempt = [], [], undecayed_names(towers.model)
    for name, parameter in towers.model.named_parameters():
        if parameter.requires_grad:
            (others if name in exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return GuardedAdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def undecayed_names(model: nn.Module) -> set[str]:
    """Names of parameters without weight decay: scalars, biases, norms, embeddings of positions and classes.

    Modules say so themselves where they have timm's no_weight_decay(); Hugging Face's towers are known by
    names.
    """
    exempt = {
        name for name, parameter in model.named_parameters() if parameter.ndim < 2 or NO_DECAY.search(name)
    }
    for prefix, module in model.named_modules():
        if callable(getattr(module, "no_weight_decay", None)):
            exempt |= {f"{prefix}.{name}" if prefix else name for name in module.no_weight_decay()}
    return exempt


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
