"""Image augmentation: cropped by a loader worker, then flipped, coloured and blurred on the device in the
step.

    worker   bytes -> crop(): uint8 [H, W, 3]; Augmentation.draw(): a row of numbers
    step     uint8 [b, 3, H, W] and rows fp32 [b, n] -> Augmentation.apply() -> fp32 [b, 3, H, W] in 0 to 1

All randomness comes from uniform numbers that belong to the sample's position, so no generator state exists.
The distributions are those of torchvision's RandomResizedCrop, ColorJitter, RandomGrayscale and GaussianBlur.

To add an operation: a row in UNIFORMS, an Operation in OPERATIONS, and its probability in
    train.recipe.Augment.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from train.data.decode import decoded, rgb_jpeg_size
from train.recipe import Augment

TRIES, RATIO = 10, (3 / 4, 4 / 3)  # of a crop
# Uniform numbers that each operation gets. Append new ones: the order decides which numbers an operation
# sees.
UNIFORMS = {"crop": 2 * TRIES + 2, "flip": 1, "color_jitter": 9, "grayscale": 1, "blur": 2, "downscale": 2}
N_UNIFORMS = sum(UNIFORMS.values())
_ENDS = dict(zip(UNIFORMS, itertools.accumulate(UNIFORMS.values()), strict=True))
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
SIGMA_PX, BLUR_RADIUS_PX = (0.1, 2.0), 6
SMALLEST, SMALLEST_PX = 1 / 4, 8  # of a downscaled image
CPU_CHUNK = 8  # images; pieces that stay in a CPU's caches take a third of the time

Columns = dict[str, torch.Tensor]  # name -> fp32 [b, 1, 1, 1]


def uniforms_of(operation: str, uniforms: Sequence[float]) -> Sequence[float]:
    """The part of a sample's N_UNIFORMS numbers in [0, 1) that belongs to one operation."""
    return uniforms[_ENDS[operation] - UNIFORMS[operation] : _ENDS[operation]]


# ---- in a loader worker


def crop(data: bytes, size: tuple[int, int], augment: Augment, uniforms: Sequence[float]) -> torch.Tensor:
    """A random crop of an encoded image, resized to the model's size: uint8 [H, W, 3]; bicubic, antialiased.

    A JPEG whose crop is at least four times that size in both directions is decoded at a half, a quarter or
    an eighth of its size, still at least twice what is needed. The crop is then rounded to the reduced
    pixels, and its values differ by one or two of 255 on average from a full decode
    (tests/train/test_augment.py).

    Args:
        size: height and width.
        uniforms: N_UNIFORMS numbers in [0, 1).
    """
    crop_uniforms = uniforms_of("crop", uniforms)
    if jpeg := rgb_jpeg_size(data):
        top, left, height, width = crop_box(*jpeg, augment.scale, crop_uniforms)
        fits = min(height // (2 * size[0]), width // (2 * size[1]), 8)
        reduce = 1 << max(0, fits.bit_length() - 1)
        pixels = decoded(data, reduce)
        if reduce > 1 and pixels.shape[:2] != jpeg:
            top, left, height, width = (round(side / reduce) for side in (top, left, height, width))
    else:
        pixels = decoded(data)
        top, left, height, width = crop_box(*pixels.shape[:2], augment.scale, crop_uniforms)
    # A channels-last view: the resize then takes half of the time. Indexing with None in numpy would lose
    # that.
    part = torch.from_numpy(pixels)[None, top : top + height, left : left + width].permute(0, 3, 1, 2)
    for shape in (downscaled_shape(augment, size, uniforms), size):
        if shape:
            part = F.interpolate(part, shape, mode="bicubic", antialias=True)
    return part[0].permute(1, 2, 0)


def downscaled_shape(
    augment: Augment, size: tuple[int, int], uniforms: Sequence[float]
) -> tuple[int, int] | None:
    """The shape to which a crop is reduced before it is enlarged to `size`, or None for no reduction.

    The factor is drawn from SMALLEST to 1, uniformly on a logarithmic scale.
    """
    coin, exponent = uniforms_of("downscale", uniforms)
    if coin >= augment.downscale_prob:
        return None
    factor = SMALLEST ** (1 - exponent)
    return tuple(min(side, max(SMALLEST_PX, round(factor * side))) for side in size)


def crop_box(
    height: int, width: int, scale: tuple[float, float], uniforms: Sequence[float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop, as torchvision's RandomResizedCrop.get_params draws it.

    Not torchvision's own: that takes 0.12 ms for a square icon, for which most tries fail, beside 0.5 ms for
    everything else that is done to an icon.
    """
    area, low, high = height * width, math.log(RATIO[0]), math.log(RATIO[1])
    for attempt in range(TRIES):
        part = area * (scale[0] + (scale[1] - scale[0]) * uniforms[2 * attempt])
        ratio = math.exp(low + (high - low) * uniforms[2 * attempt + 1])
        w, h = round(math.sqrt(part * ratio)), round(math.sqrt(part / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int((height - h + 1) * uniforms[2 * TRIES])
            left = int((width - w + 1) * uniforms[2 * TRIES + 1])
            return top, left, h, w
    # No try fitted: a centre crop, as wide or as high as the ratios allow.
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


# ---- in the step


class Operation(NamedTuple):
    """One augmentation that runs on the device.

    Attributes:
        columns: names of the numbers that a sample needs, () where the recipe does not use the operation.
        draw: those numbers from the operation's uniforms.
        apply: fp32 [b, 3, H, W] in 0 to 1 -> the same; every row changes as its own columns say.
    """

    columns: Callable[[Augment], tuple[str, ...]]
    draw: Callable[[Augment, Sequence[float]], list[float]]
    apply: Callable[[torch.Tensor, Columns], torch.Tensor]


class Augmentation:
    """The operations that a recipe uses, in the order in which they are applied.

    Attributes:
        columns: the name of each number in a row of draw().
    """

    def __init__(self, augment: Augment):
        self.augment = augment
        self.used = {name: operation for name, operation in OPERATIONS.items() if operation.columns(augment)}
        self.columns = tuple(
            f"{name}.{column}"
            for name, operation in self.used.items()
            for column in operation.columns(augment)
        )

    def __reduce__(self):
        return Augmentation, (self.augment,)  # OPERATIONS stay where they are when a worker starts

    def draw(self, uniforms: Sequence[float]) -> list[float]:
        """A sample's row, one number for each of `columns`, from its N_UNIFORMS uniform numbers."""
        return [
            number
            for name, operation in self.used.items()
            for number in operation.draw(self.augment, uniforms_of(name, uniforms))
        ]

    def apply(self, images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The augmented images, fp32 [b, 3, H, W] in 0 to 1, on their device and without waiting for it.

        Args:
            images: uint8 [b, 3, H, W].
            rows: fp32 [b, len(columns)], of draw().
        """
        assert rows.shape == (len(images), len(self.columns)), (rows.shape, len(images), self.columns)
        if self.columns and images.device.type == "cpu" and len(images) > CPU_CHUNK:
            parts = zip(images.split(CPU_CHUNK), rows.split(CPU_CHUNK), strict=True)
            return torch.cat([self.apply(*part) for part in parts])
        pixels = to_pixels(images)
        numbers = dict(zip(self.columns, rows[:, :, None, None, None].unbind(1), strict=True))
        for name, operation in self.used.items():
            own = {column: numbers[f"{name}.{column}"] for column in operation.columns(self.augment)}
            pixels = operation.apply(pixels, own)
        return pixels


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 [b, 3, H, W] -> fp32 in 0 to 1, contiguous."""
    return images.to(torch.float32, memory_format=torch.contiguous_format) / 255


def _flip(pixels: torch.Tensor, columns: Columns) -> torch.Tensor:
    return torch.where(columns["on"] > 0, pixels.flip(-1), pixels)


def _jitter_columns(augment: Augment) -> tuple[str, ...]:
    """Pairs (kind, factor), in the order in which they are applied; hue only where the recipe has some."""
    if not augment.color_jitter_prob or not any(augment.color_jitter):
        return ()
    n = 4 if augment.color_jitter[HUE] else 3
    return tuple(f"{what}_{place}" for place in range(n) for what in ("kind", "factor"))


def _draw_jitter(augment: Augment, uniforms: Sequence[float]) -> list[float]:
    coin, order, amounts = uniforms[0], uniforms[1:5], uniforms[5:9]
    numbers = []
    for kind in sorted(range(4 if augment.color_jitter[HUE] else 3), key=order.__getitem__):
        strength, neutral = augment.color_jitter[kind], 0.0 if kind == HUE else 1.0
        low = -strength if kind == HUE else max(0.0, 1 - strength)
        factor = low + (neutral + strength - low) * amounts[kind]
        numbers += [float(kind), factor if coin < augment.color_jitter_prob else neutral]
    return numbers


def _jitter(pixels: torch.Tensor, columns: Columns) -> torch.Tensor:
    n = len(columns) // 2
    for place in range(n):
        kind, factor = columns[f"kind_{place}"], columns[f"factor_{place}"]
        blended = _blended(pixels, kind, factor)
        pixels = torch.where(kind == HUE, _rotated_hue(pixels, factor), blended) if n == 4 else blended
    return pixels


def _grayscale(pixels: torch.Tensor, columns: Columns) -> torch.Tensor:
    saturation = columns["saturation"]  # 0 or 1
    return _blended(pixels, torch.full_like(saturation, SATURATION), saturation)


def _draw_blur(augment: Augment, uniforms: Sequence[float]) -> list[float]:
    coin, part = uniforms
    return [SIGMA_PX[0] + (SIGMA_PX[1] - SIGMA_PX[0]) * part if coin < augment.blur_prob else 0.0]


def _blur(pixels: torch.Tensor, columns: Columns) -> torch.Tensor:
    b, channels, *_ = pixels.shape
    distance = torch.arange(-BLUR_RADIUS_PX, BLUR_RADIUS_PX + 1, device=pixels.device)
    distance = distance / columns["sigma_px"].view(b, 1).clamp(min=0.01)
    weights = (-distance.square() / 2).softmax(1).repeat_interleave(channels, 0)
    planes = F.pad(pixels, [BLUR_RADIUS_PX] * 4, mode="reflect").flatten(0, 1)[None]
    for shape in ((-1, 1, 1, weights.shape[1]), (-1, 1, weights.shape[1], 1)):
        planes = F.conv2d(planes, weights.view(shape), groups=b * channels)
    return planes.view(pixels.shape)


def _blended(pixels: torch.Tensor, kind: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and saturation: blends with black, with the gray image's mean, with the gray
    image.
    """
    red, green, blue = pixels.split(1, dim=1)
    gray = (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)
    mean = gray.mean((1, 2, 3), keepdim=True)
    target = (gray * (kind == SATURATION)).add_(mean * (kind == CONTRAST)).mul_(1 - factor)
    return (pixels * factor).add_(target).clamp_(0, 1)


def _rotated_hue(pixels: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Rotate HSV's hue by a fraction of the circle; value and saturation, so the extreme channels, stay."""
    low, high = torch.aminmax(pixels, dim=1, keepdim=True)
    red, green, blue = pixels.split(1, dim=1)
    spread = high - low
    divisor = torch.where(spread > 0, spread, 1)
    sixths = torch.where(green == high, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    sixths = (torch.where(red == high, (green - blue) / divisor, sixths) + 6 * turn) % 6
    channels = [(sixths - 3).abs() - 1, 2 - (sixths - 2).abs(), 2 - (sixths - 4).abs()]
    return torch.where(turn != 0, low + spread * torch.cat(channels, dim=1).clamp_(0, 1), pixels)


OPERATIONS = {
    "flip": Operation(
        lambda augment: ("on",) if augment.flip_prob else (),
        lambda augment, uniforms: [float(uniforms[0] < augment.flip_prob)],
        _flip,
    ),
    "color_jitter": Operation(_jitter_columns, _draw_jitter, _jitter),
    "grayscale": Operation(
        lambda augment: ("saturation",) if augment.gray_scale_prob else (),
        lambda augment, uniforms: [float(uniforms[0] >= augment.gray_scale_prob)],
        _grayscale,
    ),
    "blur": Operation(lambda augment: ("sigma_px",) if augment.blur_prob else (), _draw_blur, _blur),
}
