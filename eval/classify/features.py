"""Image features of pictures with labels, each computed once, and kept by content."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

from data_prep.atomic import atomic_file
from data_prep.errors import UserError
from data_prep.images import BadImage, Rules, check
from data_prep.progress import progress
from eval.classify.labelled import Labelled
from eval.embed import batches
from eval.options import Inference
from eval.retrieval.ranking import check_finite
from train.data.decode import decode
from train.data.loader import loader
from train.model.clip import Clip
from train.world import World

RULES = Rules(
    min_side_px=1, max_aspect=float("inf")
)  # a published set is taken as it is, but for damage and blank pictures


class LabelledImages(Dataset):
    """(uint8 [3, H, W], usable) by number: the picture, checked and put right, as the model's own
    preprocessing wants it.
    """

    def __init__(self, data: Labelled, clip: Clip):
        self.read, self.transform, self.size = data.read, clip.eval_transform, clip.image_size

    def __getitem__(self, number: int) -> tuple[torch.Tensor, bool]:
        try:
            return self.transform(decode(checked(self.read(number)))), True
        except BadImage:
            return torch.zeros(3, *self.size, dtype=torch.uint8), False


def checked(data: bytes | BadImage) -> bytes:
    """The bytes of a picture, or of what it became by being put right: transparency on white, EXIF
    orientation applied.

    Raises:
        BadImage: it cannot be used.
    """
    if isinstance(data, BadImage):
        raise data
    return check(data, RULES).data or data


def read_file(path: Path, option: str) -> bytes:
    """The bytes of a file that the option `option` names.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read ({error.strerror}); a picture is wanted") from None


def picture_of(data: bytes, what: str) -> Image.Image:
    """A picture that somebody shows, in RGB.

    Raises:
        UserError: it cannot be used; `what` names it.
    """
    try:
        return decode(checked(data))
    except BadImage as bad:
        raise UserError(f"{what}: {bad}; another picture is wanted") from None


class Features(NamedTuple):
    """Of the m pictures that can be read.

    Attributes:
        image_features: fp32 [m, d], L2-normed.
        labels, groups: int64 [m].
        numbers: int64 [m], of the pictures in what they were read from.
        unreadable: the other pictures, (name, reason).
    """

    image_features: torch.Tensor
    labels: np.ndarray
    groups: np.ndarray
    numbers: np.ndarray
    unreadable: list[tuple[str, str]]


def embed_rows(
    clip: Clip, data: Labelled, world: World, inference: Inference
) -> tuple[torch.Tensor, torch.Tensor]:
    """image_features fp32 [n, d] and which rows are usable, bool [n]; the same on every rank."""
    clip.towers.eval()
    mine = batches(len(data), inference.batch_size)[world.rank :: world.world_size]
    images = loader(LabelledImages(data, clip), mine, inference.workers, world, default_collate)
    bar = progress(
        images,
        total=len(mine),
        desc="embedding images",
        unit="batch",
        leave=False,
        delay=1,
        disable=not world.is_first,
    )
    with torch.inference_mode():
        parts = [(clip.towers.image_features(pixels.to(world.device)), usable) for pixels, usable in bar]
    width = int(world.max(torch.tensor([parts[0][0].shape[1] if parts else 0])).item())
    features, good = (
        torch.zeros(len(data), width, device=world.device),
        torch.zeros(len(data), dtype=torch.int32, device=world.device),
    )
    for rows, (part, usable) in zip(mine, parts, strict=True):
        features[rows] = part
        good[rows] = usable.int().to(world.device)
    return world.sum(features), world.sum(good).bool()


def usable_rows(data: Labelled, rows: torch.Tensor, usable: torch.Tensor) -> Features:
    """What embed_rows gave, without the pictures that cannot be read.

    Raises:
        NotFinite: a feature is not finite; the first such picture is named.
        UserError: no picture can be read.
    """
    keep = usable.cpu().nonzero().flatten().numpy()
    unreadable = [
        (data.names[number], _problem(data.read(number)))
        for number in (~usable).cpu().nonzero().flatten().tolist()
    ]
    if not len(keep):
        raise UserError(
            f"{data.place}: none of {len(data)} pictures can be read, the first because: {unreadable[0][1]};"
            " check --data"
        )
    features = rows[usable]
    check_finite(features, "image_features", lambda row: f"image {data.names[keep[row]]}")
    return Features(features, data.labels[keep], data.groups[keep], keep, unreadable)


def _problem(data: bytes | BadImage) -> str:
    try:
        checked(data)
    except BadImage as bad:
        return str(bad)
    return "was not readable before, and is now"


def image_features(
    clip: Clip, data: Labelled, world: World, inference: Inference, cache: Path | None = None
) -> Features:
    """The features of all pictures that can be read, computed, or read from `cache`.

    Args:
        cache: folder of .npz files, named by a hash of the model's weights, config and precision, and the
            pictures' bytes; one that cannot be read is made again.

    Raises:
        NotFinite, UserError: see usable_rows.
    """
    if cache is None:
        return usable_rows(data, *embed_rows(clip, data, world, inference))
    parts = [clip.fingerprint(), json.dumps(clip.config, sort_keys=True), str(clip.towers.bf16), data.sha256]
    path = cache / f"{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:32]}.npz"
    found = read_cached(path, len(data))
    if any(world.any(found is None)):
        rows, usable = embed_rows(clip, data, world, inference)
        if world.is_first:
            cache.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as partial, open(partial, "wb") as file:
                np.savez(file, image_features=rows.cpu().numpy(), usable=usable.cpu().numpy())
        found = rows, usable
    return usable_rows(data, *(tensor.to(world.device) for tensor in found))


def read_cached(path: Path, n: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """image_features fp32 [n, d] and usable bool [n] of a file of image_features; None where there is none,
    or a damaged one.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            rows, usable = arrays["image_features"], arrays["usable"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    fits = (
        rows.ndim == 2
        and len(rows) == n
        and rows.dtype == np.float32
        and usable.shape == (n,)
        and usable.dtype == bool
    )
    return (torch.from_numpy(rows), torch.from_numpy(usable)) if fits else None
