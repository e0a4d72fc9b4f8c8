"""Images, captions, files and a model's outputs, with which every format of an export is compared."""

import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageOps
from torch import nn

from data_prep.images import EXIF_ORIENTATION, LARGE_TEXT, BadImage, Rules, check
from data_prep.inputs.locations import ImageLocation, read_local
from data_prep.inputs.storage import is_url
from data_prep.shards import Shards, read_manifest
from data_prep.signatures import HEAD_BYTES, kind_of
from train.data.decode import decode

N_IMAGES = 16  # few enough for ViT-L/14 on a CPU
N_FILES = 4  # of the user's own; each runs through every snippet
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # that Pillow opens as the build does
MOST_SEARCHED = 200  # samples whose original files are looked at, to find transparent ones
# Always compared as well, because the captions of a data set may all be short and plain ASCII.
FIXED_CAPTIONS = [
    "a red brick",
    "A  Photo, of the CAT's 2x4 (blue)!",
    "schräg, l'été, 日本語 ½ 👍",
    "one line that is longer than what the model reads " * 12,
]


@dataclass(frozen=True)
class File:
    """An image file as people have it, and what training makes of it: RGB, upright, without transparency.

    Attributes:
        kind: "original", or "transparent" and "rotated" for files made of a sample.
        fixes: what training had to change, see data_prep.images.CheckedImage.
    """

    kind: str
    data: bytes
    image: Image.Image
    fixes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Samples:
    """Images (RGB, of any size), captions, files, and where they are from."""

    images: list[Image.Image]
    captions: list[str]
    files: list[File]
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


def samples(data: Path | None, background: tuple[int, int, int]) -> Samples:
    """Images and captions of the first of val, test, train that `data` has; synthetic ones without data.

    Args:
        background: of transparent files.
    """
    if data is None:
        images = [_drawing(number) for number in range(N_IMAGES)]
        source = f"{N_IMAGES} synthetic images and {len(FIXED_CAPTIONS)} fixed captions (without shards)"
        return Samples(images, list(FIXED_CAPTIONS), made_files(images, background), source)
    shards = first_split(data)
    numbers = evenly(len(shards), N_IMAGES)
    read = [shards.read(number) for number in numbers]
    images = list(decoded_samples(shards, numbers))
    captions = [sample.captions[0] for sample in read] + FIXED_CAPTIONS
    name = Path(str(data)).name if is_url(data) else data.resolve().name
    source = (
        f"{len(images)} images and captions of the {shards.split} split of {name} ({shards.fingerprint[:12]})"
    )
    files = original_files(shards) + made_files(images, background)
    return Samples(images, captions, files, f"{source} and {len(FIXED_CAPTIONS)} fixed captions")


def decoded_samples(shards: Shards, numbers: Iterable[int]) -> Iterator[Image.Image]:
    """The images of these samples, in RGB.

    Raises:
        UserError: one cannot be decoded; it is named.
    """
    for number in numbers:
        with shards.naming(number):
            image = decode(shards.read(number).image)
        yield image


def first_split(data: Path) -> Shards:
    """The first of val, test and train that has samples."""
    splits = read_manifest(data)["splits"]
    names = (name for name in ("val", "test", "train") if splits.get(name, {}).get("samples"))
    return Shards(data, next(names, "val"))


def evenly(n: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 to n, evenly spaced."""
    return list(range(0, n, max(1, n // most)))[:most]


def original_files(shards: Shards) -> list[File]:
    """Up to N_FILES files that the shards were built from, if they are still there; transparent and rotated
    ones first.

    A file counts if it gives the very pixels that the shards have.
    """
    root = _root_of(shards)
    if root is None:
        return []
    options = shards.manifest.get("check", {})
    rules = Rules(ImageColor.getrgb(shards.background)[:3], options.get("max_pixels", Rules.max_pixels))
    numbers = evenly(len(shards), MOST_SEARCHED)
    found = filter(None, (_original(shards, number, root, rules) for number in numbers))
    return sorted(found, key=lambda file: not {"transparency", "orientation"} & {*file.fixes})[:N_FILES]


def _root_of(shards: Shards) -> str | None:
    """The folder that the shards' images were in, if it is still there. Where its name is relative, it is
    looked for in the working folder, and in the folders that the shards are in.
    """
    name = shards.manifest.get("read", {}).get("images", "")
    if not name or is_url(name):
        return None
    near = () if is_url(shards.folder) else shards.folder.resolve().parents
    folders = (folder / name for folder in (Path(), *near))
    return next((str(folder) for folder in folders if folder.is_dir()), None)


def _original(shards: Shards, number: int, root: str, rules: Rules) -> File | None:
    """The file of a sample; None if it is gone or has changed, or if Pillow does not open it (SVG)."""
    data = read_local(ImageLocation(root, shards.meta(number).get("image", "")))
    try:
        checked = check(data, rules) if isinstance(data, bytes) else None
    except BadImage:
        return None
    # SVG is rendered by the build, and 16-bit gray is scaled: Pillow alone gives another image.
    if checked is None or not _opens(data) or {"16 bit", LARGE_TEXT} & {*checked.fixes}:
        return None
    image = decode(checked.data or data)
    (stored,) = decoded_samples(shards, [number])
    return File("original", data, image, checked.fixes) if _equal(image, stored) else None


def _opens(data: bytes) -> bool:
    """Whether any Pillow opens a file, without plugins or rendering."""
    kind = kind_of(data[:HEAD_BYTES])
    return kind is not None and kind.name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def made_files(images: list[Image.Image], background: tuple[int, int, int]) -> list[File]:
    """A transparent and a rotated file, made of two images."""
    made = []
    for kind, image in zip(("transparent", "rotated"), (images[0], images[-1]), strict=True):
        buffer, options = io.BytesIO(), {}
        if kind == "transparent":  # from opaque at the top to transparent
            image = image.copy()
            image.putalpha(ImageOps.invert(Image.linear_gradient("L")).resize(image.size))
        else:
            exif = Image.Exif()
            exif[EXIF_ORIENTATION] = 6
            options["exif"] = exif.tobytes()
        image.save(buffer, "PNG", **options)
        data = buffer.getvalue()
        try:
            checked = check(data, Rules(background, min_side_px=1, max_aspect=math.inf))
        except BadImage:  # what the transparency leaves has a single color
            continue
        made.append(File(kind, data, decode(checked.data or data), checked.fixes))
    return made


def _equal(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


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
