"""The map from a new model's text features to an old model's image features, in closed form.

    M = (T'T + a I)^-1 T' Y X (X'X + b I)^-1,    the score of a text t and an image x is t M x

the minimum of |T M X' - Y|^2 + a |M X'|^2 + b |T M|^2 + a b |M|^2, for the features T of all pairs' captions
by the new model, X of the images by the old one, and Y, 1 where a caption is the image's, else 0 (ESZSL,
Romera-Paredes and Torr, ICML 2015). Other maps were measured: benchmarks/align.md.
"""

from typing import NamedTuple

import numpy as np
import torch

from eval.bases.projections import Pairs, Projections, score

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of both sides, times the mean eigenvalue of T'T and of X'X


class Fitted(NamedTuple):
    """Attributes:
    matrix: fp64 [d_new, d_old], on the CPU.
    ridge: the chosen one of RIDGES.
    """

    matrix: torch.Tensor
    ridge: float


def fit_map(train: Pairs, val: Pairs) -> Fitted:
    """The map that is fitted on `train`, with the ridge that is best on `val`.

    Args:
        train, val: image_features of the old model, text_features of the new one.
    """
    eye = torch.eye(val.image_features.shape[1], device=val.image_features.device)
    maps = [Fitted(bilinear_map(train, ridge), ridge) for ridge in RIDGES]
    everyone = np.arange(len(val.texts))
    return max(maps, key=lambda each: score(Projections(eye, each.matrix.to(eye), 0), val, everyone))


def bilinear_map(pairs: Pairs, ridge: float) -> torch.Tensor:
    """M of the module's docstring, fp64 [d_new, d_old] on the CPU.

    Args:
        ridge: a is ridge n / d of the n captions of dimension d, b is that of the images.
    """
    images = pairs.image_features.double().cpu()
    texts = pairs.text_features.double().cpu()[np.concatenate(pairs.texts)]
    image_of = np.repeat(np.arange(len(pairs.texts)), list(map(len, pairs.texts)))
    by_text = torch.linalg.solve(_gram(texts, ridge), texts.T @ images[image_of])
    return torch.linalg.solve(_gram(images, ridge), by_text.T).T


def _gram(features: torch.Tensor, ridge: float) -> torch.Tensor:
    """Features [n, d] of unit length -> features' features + ridge n / d I, [d, d]."""
    n, d = features.shape
    return features.T @ features + ridge * n / d * torch.eye(d, dtype=features.dtype)
