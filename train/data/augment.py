"""From an encoded picture to what the model is trained on: cropped by a worker, then flipped, colored and
blurred on the device.

    worker   bytes -> box -> decoded, resized, perhaps placed on a ground: uint8 [H, W, 3]; and a row of `changes`, drawn
    device   uint8 [b, 3, H, W] and changes fp32 [b, n] -> change() -> fp32 [b, 3, H, W]

Everything is drawn from uniform numbers that belong to the sample's position, so it depends on no generator's
state. The distributions are those of torchvision's RandomResizedCrop, ColorJitter, RandomGrayscale and
GaussianBlur; thumbnails, themes and places are for queries that were cut from a screen, while training
pictures come large, on white and in the middle."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from train.data.decode import decoded, rgb_jpeg_size
from train.recipe import Augment

TRIES, RATIO = 10, (3 / 4, 4 / 3)  # of a crop
CROP_DRAWS = 2 * TRIES + 2
CHANGE_DRAWS, VIEW_DRAWS = 13 + 6, 6
DRAWS = (
    CROP_DRAWS + CHANGE_DRAWS + VIEW_DRAWS
)  # whoever needs more appends them, or runs that exist go on with others
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
SIGMA_PX, BLUR_RADIUS_PX = (0.1, 2.0), 6
SMALLEST, SMALLEST_PX, PLACE_SCALE = 1 / 4, 8, (0.4, 1.0)
DARK, LIGHT, TINT = (0.0, 0.3), (0.8, 1.0), 0.1  # of themes
THEME_COLUMNS = 4


def crop(data: bytes, size: tuple[int, int], augment: Augment, uniforms: Sequence[float]) -> torch.Tensor:
    """A random part of a picture at the size that the model wants, uint8 [H, W, 3]: bicubic, antialiased;
    then seen as draw_view says.

    A JPEG of which the part is at least four times that size in both directions is decoded to a half, a
    quarter or an eighth of its size, still at least twice what is wanted. The box is then rounded to the
    reduced pixels, and its values differ from those of the whole picture by one or two of 255 on average
    (tests/test_augment.py).

    Args:
        uniforms: DRAWS numbers in [0, 1), of which those of the changes are not used.
    """
    scale, view = augment.scale, draw_view(augment, size, uniforms[CROP_DRAWS + CHANGE_DRAWS :])
    if jpeg := rgb_jpeg_size(data):
        top, left, height, width = crop_box(*jpeg, scale, uniforms)
        fits = min(height // (2 * size[0]), width // (2 * size[1]), 8)
        reduce = 1 << max(0, fits.bit_length() - 1)
        picture = decoded(data, reduce)
        if reduce > 1 and picture.shape[:2] != jpeg:
            top, left, height, width = (round(side / reduce) for side in (top, left, height, width))
    else:
        picture = decoded(data)
        top, left, height, width = crop_box(*picture.shape[:2], scale, uniforms)
    # Strides as of a batch whose channels lie together: then the resize takes them as they lie, in half of
    # the time. Those of a None of numpy are not.
    part = torch.from_numpy(picture)[None, top : top + height, left : left + width].permute(0, 3, 1, 2)
    for shape in (view.small, view.shape):
        if shape:
            part = F.interpolate(part, shape, mode="bicubic", antialias=True)
    image = part[0].permute(1, 2, 0)
    return image if view.shape == size else placed(image, size, view.corner)


class View(NamedTuple):
    """How large a crop is seen, in pixels: reduced to `small` first, if at all; then of this shape, at this
    corner of the canvas.
    """

    small: tuple[int, int] | None
    shape: tuple[int, int]
    corner: tuple[int, int]


def draw_view(augment: Augment, size: tuple[int, int], uniforms: Sequence[float]) -> View:
    """A sample's view: its shape a part of `size`, drawn evenly; `small` a part of that, evenly on a
    logarithmic scale.

    Args:
        size: height and width of the canvas.
        uniforms: VIEW_DRAWS numbers in [0, 1).
    """
    small_coin, small_part, place_coin, place_part, *place = uniforms[:VIEW_DRAWS]
    shape, corner, small = size, (0, 0), None
    if place_coin < augment.place_prob:
        part = PLACE_SCALE[0] + (PLACE_SCALE[1] - PLACE_SCALE[0]) * place_part
        shape = tuple(max(1, round(part * side)) for side in size)
        corner = tuple(
            int((side - inner + 1) * at) for side, inner, at in zip(size, shape, place, strict=True)
        )
    if small_coin < augment.downscale_prob:
        part = SMALLEST ** (1 - small_part)
        small = tuple(min(side, max(SMALLEST_PX, round(part * side))) for side in shape)
    return View(small, shape, corner)


def placed(image: torch.Tensor, size: tuple[int, int], corner: tuple[int, int]) -> torch.Tensor:
    """uint8 [h, w, 3] -> [H, W, 3]: the picture on a ground that goes on with it: the median of its border,
    per channel.

    The median, and not the mean, so that ink which touches the border leaves the paper its color.
    """
    height, width, _ = image.shape
    border = torch.cat([image[0], image[-1], image[:, 0], image[:, -1]])
    row = border.median(0).values.repeat(
        size[1], 1
    )  # first, since whole rows are copied in a sixth of the time
    canvas = row.expand(size[0], -1, -1).clone(memory_format=torch.contiguous_format)
    canvas[corner[0] : corner[0] + height, corner[1] : corner[1] + width] = image
    return canvas


def crop_box(
    height: int, width: int, scale: tuple[float, float], uniforms: Sequence[float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random part, as torchvision's RandomResizedCrop.get_params draws them.

    Written here because that takes 0.12 ms for a square icon, of which few parts fit, and all else that is
    done to an icon takes 0.5."""
    area, low, high = height * width, math.log(RATIO[0]), math.log(RATIO[1])
    for attempt in range(TRIES):
        part = area * (scale[0] + (scale[1] - scale[0]) * uniforms[2 * attempt])
        ratio = math.exp(low + (high - low) * uniforms[2 * attempt + 1])
        w, h = round(math.sqrt(part * ratio)), round(math.sqrt(part / ratio))
        if 0 < w <= width and 0 < h <= height:
            return (
                int((height - h + 1) * uniforms[2 * TRIES]),
                int((width - w + 1) * uniforms[2 * TRIES + 1]),
                h,
                w,
            )
    # No part fitted: the middle, as wide or as high as the ratios allow.
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def draw_changes(augment: Augment, uniforms: Sequence[float]) -> list[float]:
    """A sample's row of `changes`: what `change` does to it. Its length is the recipe's; empty where that
    asks for nothing.

    - flip: 1 or 0;
    - ink, paper, hue and strength of the theme, only where the recipe has themes: see `_themed`; 0, 1, 0, 0
      changes nothing;
    - pairs (operation, factor), in the order in which they are applied: the jitter's three, or four if it has
      a hue, then the saturation that the grayscale coin sets to 0; a factor of 1 changes nothing, nor does a
      hue of 0;
    - the blur's sigma in pixels, 0 for none: only where the recipe has a blur.

    Args:
        uniforms: CHANGE_DRAWS numbers in [0, 1).
    """
    flip, jitter, gray_scale, blur, sigma, *uniforms = uniforms
    has_jitter, pairs = augment.color_jitter_prob and any(augment.color_jitter), []
    if has_jitter:
        operations = range(4 if augment.color_jitter[HUE] else 3)
        for operation in sorted(operations, key=uniforms[:4].__getitem__):
            strength, neutral = augment.color_jitter[operation], 0.0 if operation == HUE else 1.0
            low = -strength if operation == HUE else max(0.0, 1 - strength)
            factor = low + (neutral + strength - low) * uniforms[4 + operation]
            pairs += [float(operation), factor if jitter < augment.color_jitter_prob else neutral]
    if has_jitter or augment.gray_scale_prob:
        pairs += [float(SATURATION), float(gray_scale >= augment.gray_scale_prob)]
    theme = _draw_theme(augment.theme_prob, uniforms[8:]) if augment.theme_prob else []
    if not pairs and not theme and not augment.flip_prob and not augment.blur_prob:
        return []
    row = [float(flip < augment.flip_prob), *theme, *pairs]
    if augment.blur_prob:
        row.append(SIGMA_PX[0] + (SIGMA_PX[1] - SIGMA_PX[0]) * sigma if blur < augment.blur_prob else 0.0)
    return row


def _draw_theme(prob: float, uniforms: Sequence[float]) -> list[float]:
    """Ink, paper, hue and strength: one level light, one dark; at least half of the range apart in each
    channel, tint and all.
    """
    coin, dark_coin, dark, light, hue, strength = uniforms[:6]
    if coin >= prob:
        return [0.0, 1.0, 0.0, 0.0]
    levels = [DARK[0] + (DARK[1] - DARK[0]) * dark, LIGHT[0] + (LIGHT[1] - LIGHT[0]) * light]
    return [*(levels[::-1] if dark_coin < 0.5 else levels), hue, TINT * strength]


def change(images: torch.Tensor, changes: torch.Tensor | None = None) -> torch.Tensor:
    """The pictures changed as their rows say, fp32 [b, 3, H, W] in 0 to 1: on their device, without waiting
    for it.

    The theme comes first, since it is the picture's own. The rest equals torchvision's functions on floats,
    picture by picture, in the same order with the same factors. What no sample of the recipe can need has no
    column, and costs nothing.

    Args:
        images: uint8 [b, 3, H, W].
        changes: fp32 [b, n], rows of `draw_changes`; without it, or its columns, 0 to 255 become 0 to 1 and
            no more.
    """
    if changes is None or not changes.shape[1]:
        return _pixels(images)
    if (
        images.device.type == "cpu" and len(images) > 8
    ):  # pieces that stay in the caches take a third of the time
        return torch.cat([change(*part) for part in zip(images.split(8), changes.split(8), strict=True)])
    flip, *columns = changes[:, :, None, None, None].unbind(1)
    sigma = columns.pop() if len(columns) % 2 else None
    # There are 0, 1, 4 or 5 pairs, that is 0, 2, 8 or 10 columns; so 4, 6, 12 or 14 begin with a theme.
    theme, columns = (
        (columns[:THEME_COLUMNS], columns[THEME_COLUMNS:])
        if len(columns) & THEME_COLUMNS
        else (None, columns)
    )
    pairs = list(zip(columns[::2], columns[1::2], strict=True))
    pixels = _pixels(torch.where(flip > 0, images.flip(-1), images))
    if theme:
        pixels = _themed(pixels, *theme)
    for operation, factor in pairs:
        blended = _blended(pixels, operation, factor)
        pixels = (
            torch.where(operation == HUE, _turned(pixels, factor), blended) if len(pairs) == 5 else blended
        )
    return pixels if sigma is None else _blurred(pixels, sigma)


def _pixels(images: torch.Tensor) -> torch.Tensor:
    return images.to(torch.float32, memory_format=torch.contiguous_format) / 255


def _themed(
    pixels: torch.Tensor, ink: torch.Tensor, paper: torch.Tensor, hue: torch.Tensor, strength: torch.Tensor
) -> torch.Tensor:
    """Black becomes the level `ink` and white `paper`, in every channel; then all of it leans to a hue, a
    part of the circle.
    """
    thirds = torch.arange(3, device=pixels.device).view(3, 1, 1) / 3
    tint = strength * torch.cos(2 * math.pi * (hue - thirds))
    return (pixels * (paper - ink)).add_(ink + tint).clamp_(0, 1)


def _blended(pixels: torch.Tensor, operation: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and saturation are blends with black, with the mean of the gray picture, with the
    gray picture.
    """
    red, green, blue = pixels.split(1, dim=1)
    gray = (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)
    mean = gray.mean((1, 2, 3), keepdim=True)
    other = (gray * (operation == SATURATION)).add_(mean * (operation == CONTRAST)).mul_(1 - factor)
    return (pixels * factor).add_(other).clamp_(0, 1)


def _turned(pixels: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """The hue of HSV turned by a part of the circle; value and saturation stay, so the least and the largest
    channel do.
    """
    (low, high), (red, green, blue) = torch.aminmax(pixels, dim=1, keepdim=True), pixels.split(1, dim=1)
    spread = high - low
    divisor = torch.where(spread > 0, spread, 1)
    sixths = torch.where(green == high, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    sixths = (torch.where(red == high, (green - blue) / divisor, sixths) + 6 * turn) % 6
    channels = torch.cat([(sixths - 3).abs() - 1, 2 - (sixths - 2).abs(), 2 - (sixths - 4).abs()], dim=1)
    return torch.where(turn != 0, low + spread * channels.clamp_(0, 1), pixels)


def _blurred(pixels: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    b, channels, *_ = pixels.shape
    distance = torch.arange(-BLUR_RADIUS_PX, BLUR_RADIUS_PX + 1, device=pixels.device) / sigma.view(
        b, 1
    ).clamp(min=0.01)
    weights = (-distance.square() / 2).softmax(1).repeat_interleave(channels, 0)
    planes = F.pad(pixels, [BLUR_RADIUS_PX] * 4, mode="reflect").flatten(0, 1)[None]
    for shape in ((-1, 1, 1, weights.shape[1]), (-1, 1, weights.shape[1], 1)):
        planes = F.conv2d(planes, weights.view(shape), groups=b * channels)
    return planes.view(pixels.shape)
