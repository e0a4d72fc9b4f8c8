"""What happens to a picture in training is what torchvision's transforms would do: the same distributions, the same pixels."""

import io

import numpy as np
import pytest
import torch
from conftest import png
from PIL import Image, ImageFilter
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from train.augment import BLUR_RADIUS_PX, CROP_DRAWS, DRAWS, SIGMA_PX, change, crop, crop_box, draw_changes
from train.recipe import Augment

ALL = Augment(color_jitter=(0.2, 0.3, 0.4, 0.5), color_jitter_prob=0.8, gray_scale_prob=0.2, flip_prob=0.5, blur_prob=0.5)
NONE = Augment(color_jitter_prob=0, gray_scale_prob=0)
RECIPES = {
    "all": (ALL, 12),
    "seed": (Augment(), 9),
    "hue alone": (Augment(color_jitter=(0, 0, 0, 0.1), gray_scale_prob=0), 11),
    "gray": (Augment(color_jitter_prob=0), 3),
    "flip": (Augment(color_jitter_prob=0, gray_scale_prob=0, flip_prob=0.5), 1),
    "blur": (Augment(color_jitter_prob=0, gray_scale_prob=0, blur_prob=0.5), 2),
    "jitter and blur": (Augment(blur_prob=0.5), 10),
    "none": (NONE, 0),
}


def uniforms(n: int, seed: int = 0) -> list[list[float]]:
    return np.random.default_rng(seed).random((n, DRAWS)).tolist()


def rows(augment: Augment, n: int) -> torch.Tensor:
    return torch.tensor([draw_changes(augment, drawn[CROP_DRAWS:]) for drawn in uniforms(n)])


def by_torchvision(image: torch.Tensor, row: list[float], has_blur: bool) -> torch.Tensor:
    """uint8 [3, H, W] -> fp64, one function after the other."""
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    pixels = TF.to_dtype(image, torch.float64, scale=True)
    if not row:
        return pixels
    flip, *row = row
    sigma = row.pop() if has_blur else 0
    if flip:
        pixels = TF.horizontal_flip(pixels)
    *jitter, _, kept = row or [0, 1]
    for operation, factor in zip(jitter[::2], jitter[1::2], strict=True):
        pixels = operations[int(operation)](pixels, factor)
    if not kept:
        pixels = TF.rgb_to_grayscale(pixels, 3)
    return TF.gaussian_blur(pixels, [2 * BLUR_RADIUS_PX + 1] * 2, [sigma] * 2) if sigma else pixels


@pytest.mark.parametrize("name", RECIPES)
def test_pixels_are_those_of_torchvision(name):
    augment, columns = RECIPES[name]
    changes = rows(augment, 64)
    assert changes.shape == (64, columns)
    images = torch.randint(0, 256, (64, 20, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).permute(0, 3, 1, 2)
    images[:4, :, :, :9] = 255  # white, black, gray and red have a hue by convention alone
    images[4:8, :, :, :9] = 0
    images[8:12, :, :, :9] = 77
    images[12:16, 1:] = 0
    changed = change(images, changes)
    assert (changed.dtype, changed.is_contiguous()) == (torch.float32, True)
    expected = torch.stack([by_torchvision(image, row, augment.blur_prob > 0) for image, row in zip(images, changes.tolist(), strict=True)])
    has_hue = augment.color_jitter_prob and augment.color_jitter[3]
    torch.testing.assert_close(changed.double(), expected, rtol=0, atol=2e-6 if has_hue else 1e-6)  # six parts of a circle round more
    assert torch.equal(change(images), images / 255)


def test_a_sample_that_is_left_alone_is_left_alone():
    """Whatever its neighbors get, bit for bit."""
    images = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rarely = Augment(color_jitter=(0.4, 0.4, 0.4, 0.1), color_jitter_prob=1e-9, gray_scale_prob=1e-9, flip_prob=1e-9, blur_prob=1e-9)
    changes = torch.cat([rows(rarely, 8), rows(ALL, 1)])
    assert torch.equal(change(images, changes)[:8], images[:8] / 255)


def test_the_device_is_not_waited_for():
    """A meta tensor has no values, so what asks for one, as .item() and boolean indices do, fails on it."""
    images, changes = torch.empty(5, 3, 32, 32, dtype=torch.uint8, device="meta"), rows(ALL, 5).to("meta")
    assert change(images, changes).shape == (5, 3, 32, 32)


def test_factors_orders_and_coins_are_drawn_as_by_torchvision():
    n, strengths = 4000, (0.4, 1.5, 0.2, 0.3)
    always = Augment(color_jitter=strengths, color_jitter_prob=1, gray_scale_prob=0.2, flip_prob=0.3, blur_prob=0.4)
    drawn, jitter = rows(always, n).numpy(), v2.ColorJitter(*strengths)
    operations, factors = drawn[:, 1:9:2].astype(int), drawn[:, 2:9:2]
    by_operation = np.take_along_axis(factors, operations.argsort(1), 1)
    torch.manual_seed(0)
    theirs = [jitter.make_params([]) for _ in range(n)]
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        assert stats.ks_2samp(by_operation[:, column], [params[f"{name}_factor"] for params in theirs]).pvalue > 0.001, name
    orders, counts = np.unique(operations, axis=0, return_counts=True)
    assert len(orders) == 24
    assert stats.chisquare(counts).pvalue > 0.001
    sigma = drawn[:, -1]
    assert stats.kstest(sigma[sigma > 0], "uniform", (SIGMA_PX[0], SIGMA_PX[1] - SIGMA_PX[0])).pvalue > 0.001
    for hits, share in ((drawn[:, 0], 0.3), (drawn[:, 10] == 0, 0.2), (sigma > 0, 0.4)):
        assert stats.binomtest(int(hits.sum()), n, share).pvalue > 0.001
    # Separate coins: of three samples in ten no jitter, whatever the grayscale's.
    drawn = rows(Augment(color_jitter_prob=0.7), n).numpy()
    jittered, gray = (drawn[:, 2:7:2] != 1).any(1), drawn[:, 8] == 0
    for hits, share in ((jittered, 0.7), (gray, 0.2), (jittered & gray, 0.14)):
        assert stats.binomtest(int(hits.sum()), n, share).pvalue > 0.001


@pytest.mark.parametrize(
    ("size", "scale"), [((200, 200), (0.9, 1.0)), ((120, 300), (0.08, 1.0)), ((60, 300), (0.9, 1.0)), ((90, 20), (0.3, 0.4))]
)
def test_boxes_are_drawn_as_by_torchvision(size, scale):
    torch.manual_seed(0)
    theirs = v2.RandomResizedCrop(8, scale=scale)
    expected = np.array([list(theirs.make_params([torch.empty(3, *size)]).values()) for _ in range(1500)])
    found = np.array([crop_box(*size, scale, drawn[:CROP_DRAWS]) for drawn in uniforms(1500)])
    for column in range(4):
        assert stats.ks_2samp(found[:, column], expected[:, column]).pvalue > 0.001
    assert (found[:, :2] + found[:, 2:] <= size).all()


def smooth(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height // 3, width // 3, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.BICUBIC).filter(ImageFilter.GaussianBlur(1))


@pytest.mark.parametrize(("format", "reduce"), [("PNG", 1), ("WEBP", 1), ("JPEG", 1), ("JPEG", 2), ("JPEG", 4), ("JPEG", 8)])
def test_a_crop_is_pillows(format, reduce):
    """To one level of 255; where a JPEG is decoded to a part of its size, to two on average."""
    size, side = (33, 24), {1: 90, 2: 240, 4: 480, 8: 960}[reduce]
    data = png(smooth(side, side + 30), format, quality=95)
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    for drawn in uniforms(20):
        found = crop(data, size, (0.6, 0.8), drawn)
        box = crop_box(side + 30, side, (0.6, 0.8), drawn[:CROP_DRAWS])
        top, left, height, width = (reduce * round(value / reduce) for value in box)
        expected = np.asarray(picture.crop((left, top, left + width, top + height)).resize(size[::-1], Image.BICUBIC))
        assert (found.dtype, found.shape, found.is_contiguous()) == (torch.uint8, (*size, 3), True)
        difference = np.abs(found.numpy() - expected.astype(int))
        assert difference.mean() < (0.02 if reduce == 1 else 2)
        assert reduce > 1 or difference.max() <= 1
