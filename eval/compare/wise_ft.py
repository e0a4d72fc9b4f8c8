"""WiSE-FT: mixtures of two models' weights (Wortsman et al. 2022, arXiv:2109.01903)."""

import copy

from data_prep.errors import UserError
from train.model.clip import Clip
from train.retain.select import copy_state_, wise_ft


def mix(base: Clip, tuned: Clip, alpha: float) -> Clip:
    """A model with weights (1 - alpha) * base + alpha * tuned, computed in fp32; preprocessing and tokenizer
    are those of `tuned`.

    Raises:
        UserError: the two models have different architectures.
    """
    first, second = base.towers.model.state_dict(), tuned.towers.model.state_dict()
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (first, second)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{base.name} and {tuned.name} have different architectures, so they cannot be mixed; leave out"
            " --wise-ft and --save"
        )
    name = f"{1 - alpha:g} * {base.name} + {alpha:g} * {tuned.name}"
    mixed = Clip(name, copy.deepcopy(tuned.towers), tuned.tokenizer, tuned.config)
    copy_state_(mixed.towers.model, wise_ft(first, second, alpha))
    return mixed
