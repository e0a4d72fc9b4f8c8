"""Augmentation equals torchvision's transforms: the same distributions, the same pixels.

Reduced images equal what Pillow makes of them.
"""

import io
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
    N_UNIFORMS,
    SIGMA_PX,
    UNIFORMS,
    Augmentation,
    crop,
    crop_box,
    downscaled_shape,
    uniforms_of,
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
JITTER = tuple(f"color_jitter.{what}_{place}" for place in range(3) for what in ("kind", "factor"))
JITTER_AND_HUE = (*JITTER, "color_jitter.kind_3", "color_jitter.factor_3")
GRAYSCALE, FLIP, BLUR = ("grayscale.saturation",), ("flip.on",), ("blur.sigma_px",)
COLUMNS = {
    "all": (ALL, FLIP + JITTER_AND_HUE + GRAYSCALE + BLUR),
    "default": (Augment(), JITTER + GRAYSCALE),
    "hue alone": (Augment(color_jitter=(0, 0, 0, 0.1), gray_scale_prob=0), JITTER_AND_HUE),
    "grayscale": (Augment(color_jitter_prob=0), GRAYSCALE),
    "flip": (replace(NONE, flip_prob=0.5), FLIP),
    "blur": (replace(NONE, blur_prob=0.5), BLUR),
    "jitter and blur": (Augment(gray_scale_prob=0, blur_prob=0.5), JITTER + BLUR),
    "none": (NONE, ()),
    "no strength": (Augment(color_jitter=(0, 0, 0, 0), gray_scale_prob=0, downscale_prob=0.5), ()),
}


def uniforms(n: int, seed: int = 0) -> list[list[float]]:
    return np.random.default_rng(seed).random((n, N_UNIFORMS)).tolist()


def rows(augment: Augment, n: int) -> torch.Tensor:
    augmentation = Augmentation(augment)
    return torch.tensor([augmentation.draw(numbers) for numbers in uniforms(n)])


def by_name(augment: Augment, row: list[float]) -> dict[str, float]:
    return dict(zip(Augmentation(augment).columns, row, strict=True))


def random_images(n: int, height: int = 16, width: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=generator).permute(
        0, 3, 1, 2
    )


def by_torchvision(image: torch.Tensor, numbers: dict[str, float]) -> torch.Tensor:
    """uint8 [3, H, W] -> fp64, one of torchvision's functions after the other."""
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    pixels = TF.to_dtype(image, torch.float64, scale=True)
    if numbers.get("flip.on"):
        pixels = TF.horizontal_flip(pixels)
    for place in range(4):
        if f"color_jitter.kind_{place}" in numbers:
            operation = operations[int(numbers[f"color_jitter.kind_{place}"])]
            pixels = operation(pixels, numbers[f"color_jitter.factor_{place}"])
    if numbers.get("grayscale.saturation") == 0:
        pixels = TF.rgb_to_grayscale(pixels, 3)
    if sigma := numbers.get("blur.sigma_px"):
        pixels = TF.gaussian_blur(pixels, [2 * BLUR_RADIUS_PX + 1] * 2, [sigma] * 2)
    return pixels


@pytest.mark.parametrize("name", COLUMNS)
def test_pixels_equal_torchvisions(name):
    augment, columns = COLUMNS[name]
    augmentation, numbers = Augmentation(augment), rows(augment, 64)
    assert augmentation.columns == columns
    images = random_images(64, 20, 24)
    images[:4, :, :, :9] = 255  # the hue of white, black, gray and red is a convention
    images[4:8, :, :, :9] = 0
    images[8:12, :, :, :9] = 77
    images[12:16, 1:] = 0
    augmented = augmentation.apply(images, numbers)
    assert (augmented.dtype, augmented.is_contiguous()) == (torch.float32, True)
    expected = torch.stack(
        [
            by_torchvision(image, by_name(augment, row))
            for image, row in zip(images, numbers.tolist(), strict=True)
        ]
    )
    # Hue is computed in six sectors of the circle, which rounds more.
    tolerance = 2e-6 if augment.color_jitter_prob and augment.color_jitter[3] else 1e-6
    torch.testing.assert_close(augmented.double(), expected, rtol=0, atol=tolerance)


def test_numbers_of_an_operation_do_not_depend_on_the_others():
    """Whether they are in the recipe, and with which probability; nor does the order of operations depend on
    the recipe.
    """
    for numbers in uniforms(20):
        everything = by_name(ALL, Augmentation(ALL).draw(numbers))
        for name in ("flip_prob", "blur_prob", "gray_scale_prob"):
            alone = replace(NONE, **{name: getattr(ALL, name)})
            assert len(drawn := by_name(alone, Augmentation(alone).draw(numbers))) == 1
            assert drawn.items() <= everything.items()
        without_jitter = replace(ALL, color_jitter_prob=0)
        drawn = by_name(without_jitter, Augmentation(without_jitter).draw(numbers))
        assert {name: number for name, number in everything.items() if "jitter" not in name} == drawn
        assert [name for name in everything if "jitter" not in name] == list(drawn)


def test_each_operation_has_numbers_of_its_own():
    """Changing those of one operation changes no other."""
    numbers, others = uniforms(1)[0], uniforms(1, seed=1)[0]
    assert [number for name in UNIFORMS for number in uniforms_of(name, numbers)] == numbers
    certain = replace(ALL, color_jitter_prob=1, blur_prob=1, flip_prob=0.999, gray_scale_prob=0.999)
    before, start = by_name(certain, Augmentation(certain).draw(numbers)), 0
    for operation, count in UNIFORMS.items():
        mixed = numbers[:start] + others[start : start + count] + numbers[start + count :]
        start += count
        after = by_name(certain, Augmentation(certain).draw(mixed))
        changed = {name.split(".")[0] for name in after if after[name] != before[name]}
        assert changed <= {operation}
        assert (operation in ("color_jitter", "blur")) == bool(changed)


@pytest.mark.parametrize("shape", [(4, 3), (4, 13), (3, 12), (4, 0)])
def test_a_wrong_number_of_columns_or_rows_is_an_error(shape):
    augmentation = Augmentation(ALL)
    assert len(augmentation.columns) == 11
    with pytest.raises(AssertionError, match=r"flip\.on"):
        augmentation.apply(random_images(4), torch.zeros(shape))
    with pytest.raises(AssertionError):
        Augmentation(NONE).apply(random_images(4), torch.zeros(4, 1))


def test_an_image_that_draws_no_change_keeps_its_pixels():
    """Bit for bit, whatever the images beside it get."""
    images = random_images(9)
    rare = replace(ALL, color_jitter_prob=1e-9, gray_scale_prob=1e-9, flip_prob=1e-9, blur_prob=1e-9)
    certain = replace(ALL, color_jitter_prob=1, gray_scale_prob=1, flip_prob=1, blur_prob=1)
    numbers = torch.cat([rows(rare, 8), rows(certain, 1)])
    augmented = Augmentation(ALL).apply(images, numbers)
    assert torch.equal(augmented[:8], images[:8] / 255)
    assert not torch.equal(augmented[8:], images[8:] / 255)


def test_chunks_change_nothing():
    """Bit for bit: a step may apply it to the batch at once or in parts."""
    images, numbers, augmentation = random_images(13), rows(ALL, 13), Augmentation(ALL)
    whole = augmentation.apply(images, numbers)
    for n in (1, 5):
        parts = zip(images.split(n), numbers.split(n), strict=True)
        assert torch.equal(torch.cat([augmentation.apply(*part) for part in parts]), whole)


def test_no_operation_waits_for_the_device():
    """A meta tensor has no values, so it fails where one is read, as .item() and boolean indices do."""
    images = torch.empty(5, 3, 32, 32, dtype=torch.uint8, device="meta")
    assert Augmentation(ALL).apply(images, rows(ALL, 5).to("meta")).shape == (5, 3, 32, 32)


def test_factors_orders_and_probabilities_equal_torchvisions():
    n, strengths = 4000, (0.4, 1.5, 0.2, 0.3)
    always = Augment(
        color_jitter=strengths, color_jitter_prob=1, gray_scale_prob=0.2, flip_prob=0.3, blur_prob=0.4
    )
    drawn = dict(zip(Augmentation(always).columns, rows(always, n).numpy().T, strict=True))
    kinds, factors = (
        np.stack([drawn[f"color_jitter.{what}_{place}"] for place in range(4)], 1)
        for what in ("kind", "factor")
    )
    by_kind = np.take_along_axis(factors, kinds.astype(int).argsort(1), 1)
    torch.manual_seed(0)
    jitter = v2.ColorJitter(*strengths)
    expected = [jitter.make_params([]) for _ in range(n)]
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        theirs = [params[f"{name}_factor"] for params in expected]
        assert stats.ks_2samp(by_kind[:, column], theirs).pvalue > 0.001, name
    orders, counts = np.unique(kinds, axis=0, return_counts=True)
    assert len(orders) == 24
    assert stats.chisquare(counts).pvalue > 0.001
    sigma, flip, saturation = (drawn[name] for name in ("blur.sigma_px", "flip.on", "grayscale.saturation"))
    assert stats.kstest(sigma[sigma > 0], "uniform", (SIGMA_PX[0], SIGMA_PX[1] - SIGMA_PX[0])).pvalue > 0.001
    for hits, share in ((flip, 0.3), (saturation == 0, 0.2), (sigma > 0, 0.4)):
        assert stats.binomtest(int(hits.sum()), n, share).pvalue > 0.001


def test_jitter_and_grayscale_are_drawn_independently():
    n = 4000
    drawn = dict(zip(Augmentation(Augment()).columns, rows(Augment(), n).numpy().T, strict=True))
    jittered = np.any([drawn[f"color_jitter.factor_{place}"] != 1 for place in range(3)], axis=0)
    gray = drawn["grayscale.saturation"] == 0
    for hits, share in ((jittered, 0.7), (gray, 0.2), (jittered & gray, 0.14)):
        assert stats.binomtest(int(hits.sum()), n, share).pvalue > 0.001


@pytest.mark.parametrize(
    ("size", "scale"),
    [((200, 200), (0.9, 1.0)), ((120, 300), (0.08, 1.0)), ((60, 300), (0.9, 1.0)), ((90, 20), (0.3, 0.4))],
)
def test_crop_boxes_are_distributed_as_torchvisions(size, scale):
    torch.manual_seed(0)
    theirs = v2.RandomResizedCrop(8, scale=scale)
    expected = np.array([list(theirs.make_params([torch.empty(3, *size)]).values()) for _ in range(1500)])
    boxes = np.array([crop_box(*size, scale, uniforms_of("crop", numbers)) for numbers in uniforms(1500)])
    for column in range(4):
        assert stats.ks_2samp(boxes[:, column], expected[:, column]).pvalue > 0.001
    assert (boxes[:, :2] + boxes[:, 2:] <= size).all()


def smooth(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height // 3, width // 3, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.BICUBIC).filter(ImageFilter.GaussianBlur(1))


@pytest.mark.parametrize(
    ("format", "reduce"), [("PNG", 1), ("WEBP", 1), ("JPEG", 1), ("JPEG", 2), ("JPEG", 4), ("JPEG", 8)]
)
def test_a_crop_equals_pillows(format, reduce):
    """To one level of 255; where a JPEG is decoded at a fraction of its size, to two on average."""
    size, side = (33, 24), {1: 90, 2: 200, 4: 480, 8: 960}[reduce]
    data = png(smooth(side, side + 30), format, quality=95)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    for numbers in uniforms(20 if reduce < 8 else 8):
        cropped = crop(data, size, Augment(scale=(0.6, 0.8)), numbers)
        box = crop_box(side + 30, side, (0.6, 0.8), uniforms_of("crop", numbers))
        top, left, height, width = (reduce * round(value / reduce) for value in box)
        # Rounded up twice, it may end a pixel below the image.
        part = image.crop((left, top, min(left + width, image.width), min(top + height, image.height)))
        expected = np.asarray(part.resize(size[::-1], Image.BICUBIC))
        assert (cropped.dtype, cropped.shape, cropped.is_contiguous()) == (torch.uint8, (*size, 3), True)
        difference = np.abs(cropped.numpy() - expected.astype(int))
        assert difference.mean() < (0.02 if reduce == 1 else 2)
        assert reduce > 1 or difference.max() <= 1


def test_without_downscaling_an_image_is_its_crop_at_the_models_size():
    """Bit for bit, whatever the uniform numbers of other operations are."""
    data = png(smooth(60, 60))
    pixels = torch.from_numpy(decoded(data))
    for numbers, others in zip(uniforms(10), uniforms(10, seed=1), strict=True):
        top, left, height, width = crop_box(60, 60, (0.9, 1.0), uniforms_of("crop", numbers))
        part = pixels[top : top + height, left : left + width].permute(2, 0, 1)[None]
        expected = interpolate(part, (24, 33), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
        mixed = numbers[: UNIFORMS["crop"]] + others[UNIFORMS["crop"] :]
        for drawn in (numbers, mixed):
            assert torch.equal(crop(data, (24, 33), Augment(), drawn), expected)


def test_downscaling_is_as_frequent_and_as_strong_as_the_recipe_says():
    n, size, augment = 4000, (224, 448), replace(NONE, downscale_prob=0.4)
    shapes = [downscaled_shape(augment, size, numbers) for numbers in uniforms(n)]
    used = [shape for shape in shapes if shape]
    assert stats.binomtest(len(used), n, 0.4).pvalue > 0.001
    factors = np.array([width / size[1] for _, width in used])
    assert stats.kstest(np.log(factors) / np.log(4), "uniform", (-1, 1)).pvalue > 0.001
    assert all(abs(height / size[0] - width / size[1]) < 1 / size[0] for height, width in used)
    # No side is below 8 pixels, unless the model's own is.
    small = [downscaled_shape(augment, (16, 6), numbers) for numbers in uniforms(n)]
    assert {shape[0] for shape in small if shape} == set(range(8, 17))
    assert {shape[1] for shape in small if shape} == {6}


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_downscaled_image_is_the_crop_reduced_and_enlarged(format):
    size, augment = (40, 32), replace(NONE, downscale_prob=1)
    data = png(smooth(90, 120), format)
    for numbers in uniforms(20):
        top, left, height, width = crop_box(120, 90, augment.scale, uniforms_of("crop", numbers))
        small = downscaled_shape(augment, size, numbers)
        part = Image.fromarray(decoded(data)).crop((left, top, left + width, top + height))
        expected = np.asarray(part.resize(small[::-1], Image.BICUBIC).resize(size[::-1], Image.BICUBIC))
        cropped = crop(data, size, augment, numbers)
        assert (cropped.dtype, cropped.shape) == (torch.uint8, (*size, 3))
        assert np.abs(cropped.numpy() - expected.astype(int)).max() <= 3  # one level of Pillow's, twice


def test_workers_and_a_second_reading_change_nothing(icon_shards):
    shards = Shards(icon_shards, "train")
    captions = Captions(tag_dropout=0.5, templates=("an icon of {}", "{}"))
    augment = replace(ALL, downscale_prob=0.5)
    pairs = TrainPairs(shards, Order(shards.shard_sizes, 16, 0), (32, 32), augment, captions)
    batches = {workers: list(train_loader(pairs, lengths, 32, 96, World(), workers)) for workers in (0, 2)}
    assert len(batches[0]) == 4
    for batch, other in zip(*batches.values(), strict=True):
        assert batch._fields == other._fields
        assert batch.weights is None
        assert other.weights is None
        assert all(torch.equal(tensor, its) for tensor, its in zip(batch[:-1], other[:-1], strict=True))
    once, again = pairs[40], pairs[40]
    assert torch.equal(once.image, again.image)
    assert once[1:] == again[1:]


def lengths(captions: list[str]) -> torch.Tensor:
    """A tokenizer that tells captions apart."""
    return torch.tensor([list(caption.encode()[:40].ljust(40)) for caption in captions])
