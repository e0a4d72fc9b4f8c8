"""Image features of labelled images, computed once and cached by content."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

from data_prep.atomic import atomic_file
from data_prep.errors import UserError
from data_prep.images import BadImage, Rules, rgb
from data_prep.inputs.hub import is_data_set
from data_prep.inputs.storage import is_url
from data_prep.progress import progress
from eval.arrays import load_arrays
from eval.classify.labelled import SPLITS, Labelled
from eval.embed import batches, pixel_bytes
from eval.options import Inference
from eval.retrieval.ranking import check_finite
from train.data.loader import loader
from train.model.clip import Clip
from train.world import World

# Published data sets are taken as they are; only damaged and blank images are rejected.
RULES = Rules(min_side_px=1, max_aspect=float("inf"))


class LabelledImages(Dataset):
    """(uint8 [3, H, W], whether it is usable) by number, preprocessed for the model."""

    def __init__(self, data: Labelled, clip: Clip):
        self.read, self.transform, self.size = data.read, clip.eval_transform, clip.image_size
        self.background = clip.background

    def __getitem__(self, number: int) -> tuple[torch.Tensor, bool]:
        try:
            return self.transform(in_rgb(self.read(number), self.background)), True
        except BadImage:
            return torch.zeros(3, *self.size, dtype=torch.uint8), False


def split_of(data: str | Path, split: str) -> str:
    """`split` where the data has splits; "" for a file or a folder of classes, which are one split."""
    return split if has_splits(data) else ""


def has_splits(data: str | Path) -> bool:
    if is_url(str(data)):
        return is_data_set(str(data))
    data = Path(data)
    return data.is_dir() and bool(
        any((data / name).is_dir() for name in SPLITS)
        or any((data / name).is_file() for name in ("manifest.json", "cars_meta.mat", "devkit/cars_meta.mat"))
        or next(data.glob("*.parquet"), None)
        or next(data.glob("data/*.parquet"), None)
    )


def in_rgb(data: bytes | BadImage, background: tuple[int, int, int] = RULES.background) -> Image.Image:
    """An image in RGB: checked, EXIF orientation applied, transparency composited.

    Args:
        background: RGB under transparent parts; a model's own is Clip.background.

    Raises:
        BadImage: It cannot be used.
    """
    if isinstance(data, BadImage):
        raise data
    return Image.fromarray(rgb(data, replace(RULES, background=background)))


def read_file(path: Path, option: str) -> bytes:
    """The bytes of the file that `option` names.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read ({error.strerror}); pass an image file") from None


def open_image(data: bytes, name: str, background: tuple[int, int, int] = RULES.background) -> Image.Image:
    """An image from the user, in RGB.

    Args:
        background: As in in_rgb().
        name: What error messages call it.

    Raises:
        UserError: It cannot be used.
    """
    try:
        return in_rgb(data, background)
    except BadImage as bad:
        raise UserError(f"{name}: {bad}; use another image") from None


class Features(NamedTuple):
    """Features of the m usable images.

    Attributes:
        image_features: fp32 [m, d], L2-normed.
        labels, groups: int64 [m].
        numbers: int64 [m], of the images in the data that they were read from.
        unreadable: (name, reason) of the other images.
    """

    image_features: torch.Tensor
    labels: np.ndarray
    groups: np.ndarray
    numbers: np.ndarray
    unreadable: list[tuple[str, str]]


def image_features(
    clip: Clip, data: Labelled, world: World, inference: Inference, cache: Path | None = None
) -> Features:
    """The features of all usable images, computed or read from `cache`.

    Args:
        cache: Folder of .npz files, named by a hash of the model's weights, config and precision, and of the
            images' bytes. A damaged file is written again.

    Raises:
        NotFinite, UserError: See usable_rows.
    """
    if cache is None:
        return usable_rows(data, *embed_rows(clip, data, world, inference))
    settings = [
        clip.fingerprint(),
        json.dumps(clip.config, sort_keys=True),
        str(clip.towers.bf16),
        data.sha256,
    ]
    path = cache / f"{hashlib.sha256(' '.join(settings).encode()).hexdigest()[:32]}.npz"
    cached = read_cached(path, len(data))
    if any(world.any(cached is None)):
        rows, usable = embed_rows(clip, data, world, inference)
        if world.is_first:
            cache.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as partial, open(partial, "wb") as file:
                np.savez(file, image_features=rows.cpu().numpy(), usable=usable.cpu().numpy())
        cached = rows, usable
    return usable_rows(data, *(tensor.to(world.device) for tensor in cached))


def embed_rows(
    clip: Clip, data: Labelled, world: World, inference: Inference
) -> tuple[torch.Tensor, torch.Tensor]:
    """image_features fp32 [n, d], and which rows are usable, bool [n]; the same on every rank."""
    clip.towers.eval()
    own = batches(len(data), inference.batch_size)[world.rank :: world.world_size]
    batch_bytes = pixel_bytes(clip, inference.batch_size)
    images = loader(LabelledImages(data, clip), own, inference.readers, world, default_collate, batch_bytes)
    bar = progress(
        images,
        total=len(own),
        desc="embedding images",
        unit="batch",
        leave=False,
        delay=1,
        disable=not world.is_first,
    )
    with torch.inference_mode():
        parts = [
            (clip.towers.image_features(pixels.to(world.device, non_blocking=True)), usable)
            for pixels, usable in bar
        ]
    width = int(world.max(torch.tensor([parts[0][0].shape[1] if parts else 0])).item())
    rows = torch.zeros(len(data), width, device=world.device)
    is_usable = torch.zeros(len(data), dtype=torch.int32, device=world.device)
    for numbers, (features, usable) in zip(own, parts, strict=True):
        rows[numbers] = features
        is_usable[numbers] = usable.int().to(world.device)
    return world.sum(rows), world.sum(is_usable).bool()


def usable_rows(data: Labelled, rows: torch.Tensor, usable: torch.Tensor) -> Features:
    """The result of embed_rows without unreadable images.

    Raises:
        NotFinite: A feature is not finite; the first such image is named.
        UserError: No image can be read.
    """
    keep = usable.cpu().nonzero().flatten().numpy()
    rest = (~usable).cpu().nonzero().flatten().tolist()
    unreadable = [(data.names[number], _reason(data.read(number))) for number in rest]
    if not len(keep):
        raise UserError(
            f"{data.place}: none of {len(data)} images can be read (the first: {unreadable[0][1]})"
        )
    features = rows[usable]
    check_finite(features, "image_features", lambda row: f"image {data.names[keep[row]]}")
    return Features(features, data.labels[keep], data.groups[keep], keep, unreadable)


def _reason(data: bytes | BadImage) -> str:
    try:
        in_rgb(data)
    except BadImage as bad:
        return str(bad)
    return "could not be read the first time"


def read_cached(path: Path, n: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """image_features fp32 [n, d] and usable bool [n] from a cached file; None if missing or damaged."""
    try:
        arrays = load_arrays(path)
        rows, usable = arrays["image_features"], arrays["usable"]
    except (OSError, ValueError, KeyError):
        return None
    fits = (
        rows.ndim == 2
        and len(rows) == n
        and rows.dtype == np.float32
        and usable.shape == (n,)
        and usable.dtype == bool
    )
    return (torch.from_numpy(rows), torch.from_numpy(usable)) if fits else None
