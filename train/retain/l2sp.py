"""The anchor: what was learned before holds on to each weight, and the new data has to earn every move
(L2-SP, Li et al. 2018).
"""

import torch

from train.model.clip import Towers
from train.model.layers import tower_of


class L2SP:
    """The base's weights on the device, in fp32, and the way back to them; of what is trained of the towers,
    without logit_scale.
    """

    def __init__(self, towers: Towers, l2_sp: float):
        """Args:
        towers: as they were loaded, before a checkpoint is restored.
        l2_sp: as in the recipe.
        """
        self.l2_sp = l2_sp
        self.base = {
            parameter: parameter.detach().clone()
            for name, parameter in towers.model.named_parameters()
            if l2_sp and parameter.requires_grad and tower_of(name)
        }

    @torch.no_grad()
    def pull(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step: each weight goes lr * l2_sp of its way back, but never beyond the base.

        Decoupled from AdamW's moments, as its weight decay is (Loshchilov & Hutter 2019). The way is 0 where
        train.run.nonfinite made the step change nothing; that is known to the device alone, so the host does
        not ask."""
        if not self.base:
            return
        for group in optimizer.param_groups:
            way = min(1.0, group["lr"] * self.l2_sp) * (1 - optimizer.found_inf)
            for parameter in group["params"]:
                if parameter in self.base:
                    parameter.lerp_(self.base[parameter], way)
