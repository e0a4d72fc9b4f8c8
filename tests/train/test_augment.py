"""What happens to a picture in training is what torchvision's transforms would do: the same distributions,
the same pixels.

Thumbnails, themes and places are what their recipe says, done by hand.
"""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import png
from PIL import Image, ImageFilter
from scipy import stats
from torch.nn.functional import interpolate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from data_prep.shards import Shards
from train.data.augment import (
    BLUR_RADIUS_PX,
    CHANGE_DRAWS,
    CROP_DRAWS,
    DRAWS,
    SIGMA_PX,
    change,
    crop,
    crop_box,
    draw_changes,
    draw_view,
)
from train.data.decode import decoded
from train.data.loader import TrainPairs, train_loader
from train.data.order import Order
from train.recipe import Augment, Captions
from train.world import World

ALL = Augment(
    color_jitter=(0.2, 0.3, 0.4, 0.5),
    color_jitter_prob=0.8,
    gray_scale_prob=0.2,
    flip_prob=0.5,
    blur_prob=0.5,
)
NONE = Augment(color_jitter_prob=0, gray_scale_prob=0)
SCREEN = Augment(downscale_prob=0.4, theme_prob=0.4, place_prob=0.4)
RECIPES = {
    "all": (ALL, 12),
    "seed": (Augment(), 9),
    "hue alone": (Augment(color_jitter=(0, 0, 0, 0.1), gray_scale_prob=0), 11),
    "gray": (Augment(color_jitter_prob=0), 3),
    "flip": (Augment(color_jitter_prob=0, gray_scale_prob=0, flip_prob=0.5), 1),
    "blur": (Augment(color_jitter_prob=0, gray_scale_prob=0, blur_prob=0.5), 2),
    "jitter and blur": (Augment(blur_prob=0.5), 10),
    "none": (NONE, 0),
    "all and theme": (replace(ALL, theme_prob=0.5), 16),
    "seed and theme": (replace(Augment(), theme_prob=0.5), 13),
    "gray and theme": (Augment(color_jitter_prob=0, theme_prob=0.5), 7),
    "blur and theme": (replace(NONE, theme_prob=0.5, blur_prob=0.5), 6),
    "theme": (replace(NONE, theme_prob=1), 5),
}


def uniforms(n: int, seed: int = 0) -> list[list[float]]:
    return np.random.default_rng(seed).random((n, DRAWS)).tolist()


def rows(augment: Augment, n: int) -> torch.Tensor:
    return torch.tensor([draw_changes(augment, drawn[CROP_DRAWS:]) for drawn in uniforms(n)])


def by_torchvision(image: torch.Tensor, row: list[float], augment: Augment) -> torch.Tensor:
    """uint8 [3, H, W] -> fp64, one function after the other."""
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    pixels = TF.to_dtype(image, torch.float64, scale=True)
    if not row:
        return pixels
    flip, *row = row
    sigma = row.pop() if augment.blur_prob else 0
    if flip:
        pixels = TF.horizontal_flip(pixels)
    if augment.theme_prob:
        (ink, paper, hue, strength), row = row[:4], row[4:]
        tint = [strength * math.cos(2 * math.pi * (hue - channel / 3)) for channel in range(3)]
        planes = [
            (ink + lean + plane * (paper - ink)).clamp(0, 1) for plane, lean in zip(pixels, tint, strict=True)
        ]
        pixels = torch.stack(planes)
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
    images = torch.randint(
        0, 256, (64, 20, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    ).permute(0, 3, 1, 2)
    images[:4, :, :, :9] = 255  # white, black, gray and red have a hue by convention alone
    images[4:8, :, :, :9] = 0
    images[8:12, :, :, :9] = 77
    images[12:16, 1:] = 0
    changed = change(images, changes)
    assert (changed.dtype, changed.is_contiguous()) == (torch.float32, True)
    expected = torch.stack(
        [by_torchvision(image, row, augment) for image, row in zip(images, changes.tolist(), strict=True)]
    )
    has_hue = augment.color_jitter_prob and augment.color_jitter[3]
    torch.testing.assert_close(
        changed.double(), expected, rtol=0, atol=2e-6 if has_hue else 1e-6
    )  # six parts of a circle round more
    assert torch.equal(change(images), images / 255)


def test_a_sample_that_is_left_alone_is_left_alone():
    """Whatever its neighbors get, bit for bit."""
    images = torch.randint(
        0, 256, (9, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    rarely = Augment(
        (0.9, 1.0),
        (0.4, 0.4, 0.4, 0.1),
        color_jitter_prob=1e-9,
        gray_scale_prob=1e-9,
        flip_prob=1e-9,
        blur_prob=1e-9,
    )
    changes = torch.cat([rows(replace(rarely, theme_prob=1e-9), 8), rows(replace(ALL, theme_prob=1), 1)])
    assert torch.equal(change(images, changes)[:8], images[:8] / 255)


def test_the_device_is_not_waited_for():
    """A meta tensor has no values, so what asks for one, as .item() and boolean indices do, fails on it."""
    images, changes = (
        torch.empty(5, 3, 32, 32, dtype=torch.uint8, device="meta"),
        rows(replace(ALL, theme_prob=1), 5).to("meta"),
    )
    assert change(images, changes).shape == (5, 3, 32, 32)


def test_factors_orders_and_coins_are_drawn_as_by_torchvision():
    n, strengths = 4000, (0.4, 1.5, 0.2, 0.3)
    always = Augment(
        color_jitter=strengths, color_jitter_prob=1, gray_scale_prob=0.2, flip_prob=0.3, blur_prob=0.4
    )
    drawn, jitter = rows(always, n).numpy(), v2.ColorJitter(*strengths)
    operations, factors = drawn[:, 1:9:2].astype(int), drawn[:, 2:9:2]
    by_operation = np.take_along_axis(factors, operations.argsort(1), 1)
    torch.manual_seed(0)
    theirs = [jitter.make_params([]) for _ in range(n)]
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        assert (
            stats.ks_2samp(by_operation[:, column], [params[f"{name}_factor"] for params in theirs]).pvalue
            > 0.001
        ), name
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
    ("size", "scale"),
    [((200, 200), (0.9, 1.0)), ((120, 300), (0.08, 1.0)), ((60, 300), (0.9, 1.0)), ((90, 20), (0.3, 0.4))],
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


@pytest.mark.parametrize(
    ("format", "reduce"), [("PNG", 1), ("WEBP", 1), ("JPEG", 1), ("JPEG", 2), ("JPEG", 4), ("JPEG", 8)]
)
def test_a_crop_is_pillows(format, reduce):
    """To one level of 255; where a JPEG is decoded to a part of its size, to two on average."""
    size, side = (33, 24), {1: 90, 2: 200, 4: 480, 8: 960}[reduce]
    data = png(smooth(side, side + 30), format, quality=95)
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    for drawn in uniforms(20):
        found = crop(data, size, Augment(scale=(0.6, 0.8)), drawn)
        box = crop_box(side + 30, side, (0.6, 0.8), drawn[:CROP_DRAWS])
        top, left, height, width = (reduce * round(value / reduce) for value in box)
        expected = np.asarray(
            picture.crop((left, top, left + width, top + height)).resize(size[::-1], Image.BICUBIC)
        )
        assert (found.dtype, found.shape, found.is_contiguous()) == (torch.uint8, (*size, 3), True)
        difference = np.abs(found.numpy() - expected.astype(int))
        assert difference.mean() < (0.02 if reduce == 1 else 2)
        assert reduce > 1 or difference.max() <= 1


def test_without_them_there_are_no_thumbnails_themes_and_places():
    """Bit for bit: their numbers come after all others, and are not looked at."""
    data = png(smooth(60, 60))
    pixels = torch.from_numpy(decoded(data))
    for drawn, other in zip(uniforms(10), uniforms(10, seed=1), strict=True):
        same = drawn[: CROP_DRAWS + 13] + other[CROP_DRAWS + 13 :]
        top, left, height, width = crop_box(60, 60, (0.9, 1.0), drawn)
        part = pixels[top : top + height, left : left + width].permute(2, 0, 1)[None]
        expected = interpolate(part, (24, 33), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
        for numbers in (drawn, same):
            assert torch.equal(crop(data, (24, 33), Augment(), numbers), expected)
            flip, _ink, _paper, _hue, _strength, *others = draw_changes(SCREEN, drawn[CROP_DRAWS:])
            assert draw_changes(Augment(), numbers[CROP_DRAWS:]) == [flip, *others]


def test_a_view_is_drawn_as_often_as_asked_and_as_large():
    n, size = 4000, (224, 448)
    views = [draw_view(SCREEN, size, drawn[CROP_DRAWS + CHANGE_DRAWS :]) for drawn in uniforms(n)]
    small, placed = (
        np.array([view.small is not None for view in views]),
        np.array([view.shape != size for view in views]),
    )
    for hits, share in ((small, 0.4), (placed, 0.4), (small & placed, 0.16)):
        assert stats.binomtest(int(hits.sum()), n, share).pvalue > 0.001
    parts = np.array([view.shape[1] / size[1] for view in views])[placed]
    assert stats.kstest(parts, "uniform", (0.4, 0.6)).pvalue > 0.001
    assert 0.4 * size[1] - 0.5 <= parts.min() * size[1] < parts.max() * size[1] <= size[1]
    reduced = np.array([view.small[1] / view.shape[1] for view in views if view.small])
    assert stats.kstest(np.log(reduced) / np.log(4), "uniform", (-1, 1)).pvalue > 0.001
    free = np.array(
        [
            (*view.corner, *(side - inner for side, inner in zip(size, view.shape, strict=True)))
            for view in views
        ]
    )[placed]
    assert (free[:, :2] >= 0).all()
    assert (free[:, :2] <= free[:, 2:]).all()
    roomy = free[(free[:, 2:] > 100).all(1)]
    for axis in (0, 1):
        assert stats.kstest((roomy[:, axis] + 0.5) / (roomy[:, 2 + axis] + 1), "uniform").pvalue > 0.001
    # No thumbnail is smaller than 8 pixels, unless the place is.
    least = [draw_view(SCREEN, (16, 16), drawn[CROP_DRAWS + CHANGE_DRAWS :]) for drawn in uniforms(n)]
    assert {view.small[0] for view in least if view.small and view.shape == (16, 16)} == set(range(8, 17))
    assert all(view.small[0] == min(8, view.shape[0]) for view in least if view.small and view.shape[0] <= 8)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_thumbnail_is_the_crop_reduced_and_enlarged_again(format):
    size, augment = (40, 32), replace(NONE, downscale_prob=1)
    data = png(smooth(90, 120), format)
    for drawn in uniforms(20):
        top, left, height, width = crop_box(120, 90, augment.scale, drawn)
        small, *_ = draw_view(augment, size, drawn[CROP_DRAWS + CHANGE_DRAWS :])
        part = Image.fromarray(decoded(data)).crop((left, top, left + width, top + height))
        expected = np.asarray(part.resize(small[::-1], Image.BICUBIC).resize(size[::-1], Image.BICUBIC))
        found = crop(data, size, augment, drawn)
        assert (found.dtype, found.shape) == (torch.uint8, (*size, 3))
        assert np.abs(found.numpy() - expected.astype(int)).max() <= 3  # to a level of Pillow's, twice


def test_a_placed_picture_lies_on_a_ground_of_its_border():
    """The crop at the drawn size is found at the drawn place, and around it is the paper, though ink touches
    the border.
    """
    icon = Image.new("RGB", (60, 60), (250, 240, 230))
    icon.paste((10, 20, 30), (0, 20, 45, 40))
    data, size, augment = png(icon), (48, 40), Augment(scale=(1.0, 1.0), place_prob=1, downscale_prob=0.5)
    for drawn in uniforms(20):
        small, (height, width), (top, left) = draw_view(augment, size, drawn[CROP_DRAWS + CHANGE_DRAWS :])
        box_top, box_left, box_height, box_width = crop_box(60, 60, augment.scale, drawn)
        part = torch.from_numpy(decoded(data))[
            box_top : box_top + box_height, box_left : box_left + box_width
        ].permute(2, 0, 1)[None]
        for shape in (small, (height, width)):
            part = interpolate(part, shape, mode="bicubic", antialias=True) if shape else part
        found = crop(data, size, augment, drawn)
        assert (found.dtype, found.shape, found.is_contiguous()) == (torch.uint8, (*size, 3), True)
        assert torch.equal(found[top : top + height, left : left + width], part[0].permute(1, 2, 0))
        around = torch.ones(size, dtype=torch.bool)
        around[top : top + height, left : left + width] = False
        assert (found[around] == torch.tensor([250, 240, 230])).all()


def test_themes_are_dark_and_light_and_far_apart():
    n, augment = 2000, replace(NONE, theme_prob=0.4)
    images = torch.zeros(n, 3, 1, 2, dtype=torch.uint8)
    images[..., 1] = 255
    changes = rows(augment, n)
    ink, paper = change(images, changes)[:, :, 0].unbind(-1)
    themed = (changes[:, 1:] != torch.tensor([0.0, 1, 0, 0])).any(1)
    assert torch.equal(ink[~themed], torch.zeros(int((~themed).sum()), 3))
    assert torch.equal(paper[~themed], torch.ones(int((~themed).sum()), 3))
    ink, paper, (inks, papers, _, strengths) = ink[themed], paper[themed], changes[themed, 1:].T
    dark = (paper < ink).all(1)
    assert stats.binomtest(len(ink), n, 0.4).pvalue > 0.001
    assert stats.binomtest(int(dark.sum()), len(ink), 0.5).pvalue > 0.001
    assert (dark == (paper < ink).any(1)).all()
    assert ((paper - ink).abs() > 0.5 - 1e-6).all()
    # White and black are what was drawn, leaning to a hue by no more than the strength that was drawn.
    for levels, found in ((inks, ink), (papers, paper)):
        lean = (found - levels[:, None]).abs().amax(1)
        assert (lean <= strengths + 1e-6).all()
        assert (lean > 0.03).any()
    assert strengths.max() <= 0.1


def test_workers_and_a_second_look_change_nothing(icon_shards):
    shards = Shards(icon_shards, "train")
    captions = Captions(tag_dropout=0.5, templates=("an icon of {}", "{}"))
    pairs = TrainPairs(
        shards, Order(shards.shard_sizes, 16, 0), (32, 32), replace(SCREEN, blur_prob=0.5), captions
    )
    tokens = {workers: list(train_loader(pairs, lengths, 32, 96, World(), workers)) for workers in (0, 2)}
    for batch, other in zip(*tokens.values(), strict=True):
        assert all(torch.equal(tensor, its) for tensor, its in zip(batch, other, strict=True))
    one, again = pairs[40], pairs[40]
    assert torch.equal(one[0], again[0])
    assert one[1:] == again[1:]


def lengths(captions: list[str]) -> torch.Tensor:
    """A tokenizer that tells captions apart."""
    return torch.tensor([list(caption.encode()[:40].ljust(40)) for caption in captions])
