"""LoRA: each matrix of the towers is W + B A, of which W is frozen, and B and A have few rows (Hu et al.
2021, arXiv:2106.09685).

By torch's parametrizations, which whoever reads a weight meets. Adapters around a layer are passed by where
torch's attention reads out_proj's weight itself; and those that add to W before each forward and subtract
after it (peft 0.21 in attention) wear W away."""

import math
import re

import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from data_prep.errors import UserError
from train.model.activation_memory import dummy_batch, dummy_loss
from train.model.towers import Towers

PART = re.compile(r"(.*?)parametrizations\.(\w+)\.(original|0\.A|0\.B)")
ROWS, COLUMNS = ".0.A", ".0.B"  # how the names of A and B end


class LowRank(nn.Module):
    """W -> W + B A; B is 0 at first, so that nothing changes."""

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.B @ self.A


def adapt(towers: Towers, rank: int, seed: int) -> None:
    """Freeze all but logit_scale and logit_bias, and give every matrix of a linear layer or an attention an
    adapter.

    Raises:
        UserError: there is no such matrix, or one that features do not depend on.
    """
    towers.requires_grad_(False).eval()  # in which a forward changes no statistics
    layers = [
        layer for layer in towers.model.modules() if isinstance(layer, (nn.Linear, nn.MultiheadAttention))
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            for name in [
                name for name, parameter in layer.named_parameters(recurse=False) if parameter.ndim == 2
            ]:
                register_parametrization(layer, name, LowRank(getattr(layer, name), rank))
        for name, parameter in towers.model.named_parameters():
            parameter.requires_grad_(name in ("logit_scale", "logit_bias") or name.endswith((ROWS, COLUMNS)))
        dummy_loss(towers(*dummy_batch(towers, 2, torch.device("cpu")))).backward()
    adapters = [
        (name, parameter)
        for name, parameter in towers.model.named_parameters()
        if name.endswith((ROWS, COLUMNS))
    ]
    dead = [name for name, parameter in adapters if parameter.grad is None]
    towers.zero_grad()
    if dead or not adapters:
        which = (
            f"features do not depend on {', '.join(dead[:5])}"
            if dead
            else "this model has no matrix to adapt"
        )
        raise UserError(f"--lora_rank {rank}: {which}; leave the key out, which trains the model whole")


def merged(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state_dict of a model with adapters as that of one without, in which each is part of its matrix;
    others as they are.
    """
    whole = {}
    for name, tensor in state.items():
        if not (found := PART.fullmatch(name)):
            whole[name] = tensor
        elif found[3] == "original":
            adapter = name.removesuffix("original")
            whole[found[1] + found[2]] = tensor + state[f"{adapter}0.B"] @ state[f"{adapter}0.A"]
    return whole
