"""The map from a new model's text features to an old model's image features, in closed form.

    M = argmin sum |t M - x|^2 + ridge n / d |M|^2

over n pairs of a caption's text features t [d] by the new model and its image's features x by the old one.

Ridge regression (Hoerl and Kennard 1970) with the strength of a short list that is best on a tenth of the
groups, which are not fitted on.
"""

from typing import NamedTuple

import numpy as np
import torch

from data_prep.errors import UserError
from eval.bases.projections import HELD_OUT, MAX_HELD_OUT, Pairs, Projections, score

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the mean eigenvalue of the features' second moments


class Fitted(NamedTuple):
    """Attributes:
    matrix: fp64 [d_new, d_old], on the CPU.
    ridge: the chosen one of RIDGES.
    """

    matrix: torch.Tensor
    ridge: float


def fit_map(pairs: Pairs, seed: int = 0) -> Fitted:
    """The map, fitted on all pairs with the ridge that is best on held-out groups.

    Args:
        pairs: image_features of the old model, text_features of the new one.

    Raises:
        UserError: there are fewer than two groups.
    """
    groups = np.random.default_rng(seed).permutation(np.unique(pairs.groups))
    if len(groups) < 2:
        raise UserError("align: the training split has one group only; it needs two or more to fit a map on")
    held_out = np.isin(pairs.groups, groups[: max(1, round(HELD_OUT * len(groups)))])
    scored = np.flatnonzero(held_out)[:MAX_HELD_OUT]
    eye = torch.eye(pairs.image_features.shape[1], device=pairs.image_features.device)

    def held_out_score(ridge: float) -> float:
        matrix = ridge_map(pairs, np.flatnonzero(~held_out), ridge).to(eye)
        return score(Projections(eye, matrix, 0), pairs, scored)

    best = max(RIDGES, key=held_out_score)
    return Fitted(ridge_map(pairs, np.arange(len(held_out)), best), best)


def ridge_map(pairs: Pairs, images: np.ndarray, ridge: float) -> torch.Tensor:
    """M of the module's docstring, fp64 [d_new, d_old] on the CPU, by the normal equations.

    Args:
        images: int64 [n], the images whose pairs are fitted on.
    """
    image_of = np.repeat(images, [len(pairs.texts[image]) for image in images])
    text_of = np.concatenate([pairs.texts[image] for image in images])
    inputs, targets = (
        pairs.text_features[text_of].double().cpu(),
        pairs.image_features[image_of].double().cpu(),
    )
    n, d = inputs.shape
    penalty = ridge * n / d * torch.eye(d, dtype=torch.float64)
    return torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ targets)
