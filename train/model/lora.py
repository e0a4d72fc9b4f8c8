"""LoRA: each matrix W becomes W + B A, with W frozen and B, A of low rank (Hu et al. 2021, arXiv:2106.09685).

torch's parametrizations do this wherever a weight is read. Adapters around a layer are bypassed where torch's
attention reads the weight of out_proj itself; adapters that are added to W before each forward and subtracted
after it (peft 0.21 in attention) change W by rounding.
"""

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
    """Freeze all but logit_scale and logit_bias, and adapt every matrix of linear layers and attention.

    Raises:
        UserError: there is no such matrix, or features do not depend on one.
    """
    towers.requires_grad_(False).eval()  # so that the forward below changes no statistics
    layers = [
        layer for layer in towers.model.modules() if isinstance(layer, (nn.Linear, nn.MultiheadAttention))
    ]
    shared: dict[tuple[type, tuple[str, ...]], type] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            kind, names = type(layer), _matrices(layer)
            for name in names:
                register_parametrization(layer, name, LowRank(getattr(layer, name), rank))
            # torch makes a class for each layer, and compiled code belongs to one class.
            layer.__class__ = shared.setdefault((kind, names), type(layer))
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
        unused = f"features do not depend on {', '.join(dead[:5])}"
        which = unused if dead else "this model has no matrix to adapt"
        raise UserError(f"--lora-rank {rank}: {which}; leave it out, to train all weights")


def _matrices(layer: nn.Module) -> tuple[str, ...]:
    """The names of a layer's own matrices."""
    return tuple(name for name, parameter in layer.named_parameters(recurse=False) if parameter.ndim == 2)


def merged(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state_dict with the adapters merged into their matrices, as of a model without LoRA."""
    whole = {}
    for name, tensor in state.items():
        if not (found := PART.fullmatch(name)):
            whole[name] = tensor
        elif found[3] == "original":
            adapter = name.removesuffix("original")
            whole[found[1] + found[2]] = tensor + state[f"{adapter}0.B"] @ state[f"{adapter}0.A"]
    return whole
