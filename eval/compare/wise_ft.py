"""Weights between two models: often better than either (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903)."""

import copy

from data_prep.errors import UserError
from train.model.clip import Clip
from train.retain.select import copy_state_, wise_ft


def mix(base: Clip, tuned: Clip, alpha: float) -> Clip:
    """A model whose weights are (1 - alpha) * base + alpha * tuned, computed in fp32; it keeps what `tuned`
    says of pictures and texts.

    Raises:
        UserError: the two are not of one architecture.
    """
    first, second = base.towers.model.state_dict(), tuned.towers.model.state_dict()
    if {name: tensor.shape for name, tensor in first.items()} != {
        name: tensor.shape for name, tensor in second.items()
    }:
        raise UserError(
            f"{base.name} and {tuned.name} are of different architectures, and have no mixture; compare them"
            " without --interpolate"
        )
    mixed = Clip(
        f"{1 - alpha:g} * {base.name} + {alpha:g} * {tuned.name}",
        copy.deepcopy(tuned.towers),
        tuned.tokenizer,
        tuned.config,
    )
    copy_state_(mixed.towers.model, wise_ft(first, second, alpha))
    return mixed
