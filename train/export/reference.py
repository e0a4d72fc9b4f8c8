"""What a model gives for a few pictures and captions: the measure that every export of it is held to."""

import io
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

from data_prep.shards import Shards, read_manifest

PICTURES = 16  # as many as say something, and few enough for ViT-L/14 on a CPU
SENTENCES = [  # are always asked too, because a set's captions may all be short and plain
    "a red brick",
    "A  Photo, of the CAT's 2x4 (blue)!",
    "schräg, l'été, 日本語 ½ 👍",
    "one line that is longer than what the model reads " * 12,
]


@dataclass(frozen=True)
class Samples:
    """Pictures (RGB, of any size), captions, and a sentence on where they are from."""

    pictures: list[Image.Image]
    captions: list[str]
    source: str


@dataclass(frozen=True)
class Outputs:
    """L2-normed image_features [n, d] and text_features [m, d], and logits [n, m] with the model's own
    temperature.
    """

    image_features: torch.Tensor
    text_features: torch.Tensor
    logits: torch.Tensor

    def differences(self, other: "Outputs") -> dict[str, float]:
        """The largest absolute difference of each."""
        return {
            name: max_difference(getattr(self, name), getattr(other, name))
            for name in ("image_features", "text_features", "logits")
        }


def max_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest absolute difference of two tensors; infinite where either is not finite, so that no bound
    lets it pass.
    """
    difference = (one.double() - other.double()).abs().max().item()
    return difference if math.isfinite(difference) else math.inf


def samples(data: Path | None) -> Samples:
    """Pictures and captions from the first split of val, test, train that `data` has; without data, drawn
    ones.
    """
    if data is None:
        pictures = [_drawing(number) for number in range(PICTURES)]
        return Samples(
            pictures,
            list(SENTENCES),
            f"{PICTURES} drawn pictures and {len(SENTENCES)} sentences: there is no data at hand",
        )
    splits = read_manifest(data)["splits"]
    split = next((name for name in ("val", "test", "train") if splits.get(name, {}).get("samples")), "val")
    shards = Shards(data, split)
    step = max(1, len(shards) // PICTURES)
    read = [shards.read(number) for number in range(0, len(shards), step)][:PICTURES]
    pictures = [Image.open(io.BytesIO(sample.image)).convert("RGB") for sample in read]
    captions = [sample.captions[0] for sample in read] + SENTENCES
    source = (
        f"{len(pictures)} pictures and captions of the {split} split of {data.resolve().name}"
        f" ({shards.fingerprint[:12]})"
    )
    return Samples(pictures, captions, f"{source}, and {len(SENTENCES)} sentences")


@torch.no_grad()
def outputs(model: nn.Module, pixels: torch.Tensor, tokens: torch.Tensor) -> Outputs:
    """What an open_clip model gives for normalised pixels [n, 3, H, W] and tokens [m, L]."""
    image_features = F.normalize(model.encode_image(pixels), dim=-1)
    text_features = F.normalize(model.encode_text(tokens), dim=-1)
    return Outputs(image_features, text_features, model.logit_scale.exp() * image_features @ text_features.T)


def _drawing(number: int) -> Image.Image:
    """A disc and a bar on a gradient, in sizes and colors that follow the number."""
    width, height = 200 + 30 * (number % 4), 200 + 40 * (number // 4)
    image = Image.merge(
        "RGB",
        [Image.linear_gradient("L").rotate(90 * turn).resize((width, height)) for turn in (0, number % 4, 2)],
    )
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 30, 60 + 7 * number, 70 + 7 * number), fill=(240 - 9 * number, 16 * number % 256, 90))
    draw.rectangle((90, 12 + 9 * number, 180, 30 + 9 * number), fill=(10 * number, 40, 250 - 12 * number))
    return image
