"""Two separate coins, with the recipe's probabilities."""

import numpy as np
import torch
from PIL import Image

from train.augment import train_transform
from train.recipe import Augment

COLOR = [200, 100, 50]
FLAT = Image.new("RGB", (9, 9), tuple(COLOR))  # crops of it are equal, so what changes is color


def share_changed(n: int = 400, **augment) -> tuple[float, float]:
    """Of `n` draws: the share that turned gray, and the share that changed color otherwise."""
    transform = train_transform((6, 6), Augment(**augment))
    gray, changed = [], []
    for seed in range(n):
        torch.manual_seed(seed)
        image = transform(FLAT)
        assert image.dtype == torch.uint8
        assert image.shape == (3, 6, 6)
        red, green, blue = image[:, 3, 3].tolist()
        gray.append(red == green == blue)
        changed.append([red, green, blue] != COLOR and not gray[-1])
    return float(np.mean(gray)), float(np.mean(changed))


def test_jitter_and_grayscale_are_separate_coins():
    assert share_changed(color_jitter_prob=0, gray_scale_prob=0) == (0, 0)
    gray, changed = share_changed(color_jitter_prob=0, gray_scale_prob=0.2)
    assert 0.14 < gray < 0.26
    assert changed == 0
    gray, changed = share_changed(color_jitter_prob=0.7, gray_scale_prob=0)
    assert gray == 0
    assert 0.63 < changed < 0.77
    gray, changed = share_changed(color_jitter_prob=0.7, gray_scale_prob=0.2)
    assert 0.14 < gray < 0.26
    assert 0.48 < changed < 0.64  # 0.7 x 0.8: independent


def test_the_crop_keeps_the_part_that_was_asked_for():
    left_black = np.full((100, 100, 3), 255, np.uint8)
    left_black[:, :10] = 0
    torch.manual_seed(0)
    transform = train_transform((50, 50), Augment(scale=(0.25, 0.25), color_jitter_prob=0, gray_scale_prob=0))
    black = [bool((transform(Image.fromarray(left_black)) < 128).any()) for _ in range(60)]
    assert 0 < sum(black) < 60  # a quarter of the area misses the left edge now and then
