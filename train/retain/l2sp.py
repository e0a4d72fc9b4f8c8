"""L2-SP: after each step, pull every weight towards its initial value (Li et al. 2018, arXiv:1802.01483)."""

import torch

from train.model.towers import Towers, tower_of


class L2SP:
    """Pairs of a trained weight and its initial value; logit_scale and logit_bias are left free."""

    def __init__(self, towers: Towers, base: Towers, strength: float):
        """Args:
        base: the initial towers, on the same device.
        strength: l2_sp of the recipe.
        """
        self.strength = strength
        initial = dict(base.model.named_parameters())
        self.initial = {
            parameter: initial[name]
            for name, parameter in towers.model.named_parameters()
            if parameter.requires_grad and tower_of(name)
        }

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, found_inf: torch.Tensor) -> None:
        """Move each weight by lr * strength of its distance to the initial value, at most all of it.

        Decoupled from AdamW's moments, as its weight decay is (Loshchilov & Hutter 2019).

        Args:
            found_inf: fp32 [], 1 where the step was skipped; then nothing moves. It stays on the device.
        """
        for group in optimizer.param_groups:
            fraction = min(1.0, group["lr"] * self.strength) * (1 - found_inf)
            pulled = [parameter for parameter in group["params"] if parameter in self.initial]
            if pulled:
                initial = [self.initial[parameter] for parameter in pulled]
                torch._foreach_lerp_(pulled, initial, [fraction] * len(pulled))
