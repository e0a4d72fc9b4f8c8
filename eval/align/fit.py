"""The map from a new model's text features to an old model's image features, in closed form.

    M = (T'T + a I)^-1 T' Y X (X'X + b I)^-1,    the score of a text t and an image x is t M x

the minimum of |T M X' - Y|^2 + a |M X'|^2 + b |T M|^2 + a b |M|^2, for the features T of all pairs' captions
by the new model, X of the images by the old one, and Y, 1 where a caption is the image's, else 0 (ESZSL,
Romera-Paredes and Torr, ICML 2015). Other maps were measured: benchmarks/align.md.
"""

from collections.abc import Sequence
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
    maps = [Fitted(*each) for each in zip(bilinear_maps(train, RIDGES), RIDGES, strict=True)]
    eye = torch.eye(val.image_features.shape[1], device=val.image_features.device)
    everyone = np.arange(len(val.texts))
    return max(maps, key=lambda each: score(Projections(eye, each.matrix.to(eye), 0), val, everyone))


def bilinear_maps(pairs: Pairs, ridges: Sequence[float]) -> list[torch.Tensor]:
    """M of the module's docstring for each ridge, fp64 [d_new, d_old] on the CPU.

    Args:
        ridges: a is ridge n / d of the n captions of dimension d, b is that of the images.
    """
    images = pairs.image_features.double().cpu()
    texts = pairs.text_features.double().cpu()[np.concatenate(pairs.texts)]
    image_of = np.repeat(np.arange(len(pairs.texts)), list(map(len, pairs.texts)))
    of_texts, both, of_images = texts.T @ texts, texts.T @ images[image_of], images.T @ images
    maps = []
    for ridge in ridges:
        a, b = (ridge * len(features) / features.shape[1] for features in (texts, images))
        by_text = torch.linalg.solve(of_texts + a * torch.eye(len(of_texts)), both)
        maps.append(torch.linalg.solve(of_images + b * torch.eye(len(of_images)), by_text.T).T)
    return maps
