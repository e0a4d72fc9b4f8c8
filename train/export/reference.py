"""Reference images, captions and outputs of a model: every format of an export is compared with them."""

import io
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

from data_prep.shards import Shards, read_manifest

N_IMAGES = 16  # few enough for ViT-L/14 on a CPU
# Always compared as well, because the captions of a data set may all be short and plain ASCII.
FIXED_CAPTIONS = [
    "a red brick",
    "A  Photo, of the CAT's 2x4 (blue)!",
    "schräg, l'été, 日本語 ½ 👍",
    "one line that is longer than what the model reads " * 12,
]


@dataclass(frozen=True)
class Samples:
    """Images (RGB, of any size), captions, and where they are from."""

    images: list[Image.Image]
    captions: list[str]
    source: str


@dataclass(frozen=True)
class Outputs:
    """L2-normed image_features [n, d] and text_features [m, d]; logits [n, m] at the model's temperature."""

    image_features: torch.Tensor
    text_features: torch.Tensor
    logits: torch.Tensor

    def differences(self, other: "Outputs") -> dict[str, float]:
        """The largest absolute difference of each."""
        return {
            name: max_difference(getattr(self, name), getattr(other, name))
            for name in ("image_features", "text_features", "logits")
        }


def max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference; infinite if a value is not finite, so that no bound accepts it."""
    difference = (a.double() - b.double()).abs().max().item()
    return difference if math.isfinite(difference) else math.inf


def samples(data: Path | None) -> Samples:
    """Images and captions of the first of val, test, train that `data` has; synthetic ones without data."""
    if data is None:
        return Samples(
            [_drawing(number) for number in range(N_IMAGES)],
            list(FIXED_CAPTIONS),
            f"{N_IMAGES} synthetic images and {len(FIXED_CAPTIONS)} fixed captions (no data was given)",
        )
    splits = read_manifest(data)["splits"]
    split = next((name for name in ("val", "test", "train") if splits.get(name, {}).get("samples")), "val")
    shards = Shards(data, split)
    step = max(1, len(shards) // N_IMAGES)
    read = [shards.read(number) for number in range(0, len(shards), step)][:N_IMAGES]
    images = [Image.open(io.BytesIO(sample.image)).convert("RGB") for sample in read]
    captions = [sample.captions[0] for sample in read] + FIXED_CAPTIONS
    source = (
        f"{len(images)} images and captions of the {split} split of {data.resolve().name}"
        f" ({shards.fingerprint[:12]})"
    )
    return Samples(images, captions, f"{source} and {len(FIXED_CAPTIONS)} fixed captions")


@torch.no_grad()
def outputs(model: nn.Module, pixels: torch.Tensor, tokens: torch.Tensor) -> Outputs:
    """Outputs of an open_clip model for normalised pixels [n, 3, H, W] and tokens [m, L]."""
    image_features = F.normalize(model.encode_image(pixels), dim=-1)
    text_features = F.normalize(model.encode_text(tokens), dim=-1)
    return Outputs(image_features, text_features, model.logit_scale.exp() * image_features @ text_features.T)


def _drawing(number: int) -> Image.Image:
    """A disc and a bar on a gradient; sizes and colors depend on the number."""
    width, height = 200 + 30 * (number % 4), 200 + 40 * (number // 4)
    image = Image.merge(
        "RGB",
        [Image.linear_gradient("L").rotate(90 * turn).resize((width, height)) for turn in (0, number % 4, 2)],
    )
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 30, 60 + 7 * number, 70 + 7 * number), fill=(240 - 9 * number, 16 * number % 256, 90))
    draw.rectangle((90, 12 + 9 * number, 180, 30 + 9 * number), fill=(10 * number, 40, 250 - 12 * number))
    return image
