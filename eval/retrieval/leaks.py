"""Leaks: images of val and test that a model cannot tell from a training image; finds more than a hash of
pixels.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from data_prep.shards import Shards
from data_prep.sheets import write_csv

HEADER = ["image", "split", "train_image", "cosine"]


def nearest(
    image_features: torch.Tensor, train_features: torch.Tensor, chunk: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most similar training image of each image.

    Args:
        image_features: [n, d], L2-normed.
        train_features: [m, d], L2-normed.
        chunk: rows compared at once; memory is chunk * m floats.

    Returns:
        Cosines [n], and numbers of training images [n].
    """
    best = [(part @ train_features.T).max(1) for part in image_features.split(chunk)]
    return torch.cat([part.values for part in best]), torch.cat([part.indices for part in best])


def leaks(
    shards: Shards, train: Shards, cosines: torch.Tensor, numbers: torch.Tensor, threshold: float
) -> Iterator[list]:
    """Rows of HEADER for images with a training image of at least this cosine, the most similar first.

    Args:
        shards: val or test.
        cosines, numbers: of nearest().
    """
    for number in cosines.argsort(descending=True, stable=True).tolist():
        if cosines[number] < threshold:
            return
        image, train_image = shards.read(number), train.read(int(numbers[number]))
        paths = image.path or image.key, train_image.path or train_image.key
        yield [paths[0], shards.split, paths[1], f"{cosines[number]:.4f}"]


def write_leaks(path: Path, rows: list[list]) -> None:
    write_csv(path, HEADER, rows)
