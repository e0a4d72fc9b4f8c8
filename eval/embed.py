"""Images and captions of a split become features, each exactly once on any number of ranks."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import Compose

from data_prep.progress import progress
from data_prep.shards import Shards
from eval.options import Inference
from eval.retrieval.ranking import check_finite
from train.data.loader import EvalImages, loader
from train.device import use_bf16
from train.model.clip import Clip, load
from train.world import World


def load_for_eval(name: str, inference: Inference, world: World) -> Clip:
    """A MODEL (see train.model.clip.load) on this rank's device, in evaluation mode."""
    return for_eval(load(name), inference, world)


def for_eval(clip: Clip, inference: Inference, world: World) -> Clip:
    """An opened model on this rank's device, in evaluation mode."""
    clip.towers.bf16 = use_bf16(inference.precision, world.device)
    clip.towers.to(world.device).eval()
    return clip


def precision_of(clip: Clip) -> str:
    """ "bf16" or "fp32", in which its towers compute."""
    return "bf16" if clip.towers.bf16 else "fp32"


def pixel_bytes(clip: Clip, n: int) -> int:
    """Bytes of n images as a model takes them: uint8 [n, 3, H, W]."""
    return n * 3 * math.prod(clip.image_size)


def open_shards(folder: Path, split: str, world: World) -> Shards:
    """A split whose files are verified; the ranks share the work.

    Raises:
        UserError: no such split, or a file was altered.
    """
    shards = Shards(folder, split)
    shards.verify(world.rank, world.world_size)
    return shards


@dataclass(frozen=True)
class Captions:
    """The captions of a split.

    Attributes:
        texts: the distinct captions, in order of appearance.
        first: int64 [n_images], the text that is each image's first caption.
        text_of, group_of: int64 [pairs], text text_of[i] is a caption in group group_of[i]; see
            eval.retrieval.ranking.Relevance.
        image_of: int64 [pairs], the image that the text is a caption of.
        same_image: int64 [n_images], the first image whose file has the same bytes; None if all differ.
    """

    texts: list[str]
    first: np.ndarray
    text_of: np.ndarray
    group_of: np.ndarray
    image_of: np.ndarray
    same_image: np.ndarray | None = None

    def first_image(self) -> np.ndarray:
        """int64 [texts], the first image that has each text as a caption."""
        return self.image_of[np.unique(self.text_of, return_index=True)[1]]

    def first_group(self) -> np.ndarray:
        """int64 [texts], the smallest group that has each text as a caption."""
        groups = np.full(len(self.texts), np.iinfo(np.int64).max)
        np.minimum.at(groups, self.text_of, self.group_of)
        return groups


def read_captions(shards: Shards) -> Captions:
    image_with: dict[str, int] = {}  # sha256 of the image's bytes -> the first image that has them
    captions, same_image = [], []
    for image in range(len(shards)):
        meta = shards.meta(image)
        captions.append(meta["captions"])
        same_image.append(image_with.setdefault(meta.get("sha256") or f"number {image}", image))
    return replace(numbered_captions(captions, shards.groups), same_image=np.array(same_image))


def numbered_captions(captions: Sequence[Sequence[str]], groups: np.ndarray) -> Captions:
    """The captions of each image, one at least, by number; groups int64 [n_images]."""
    number_of: dict[str, int] = {}
    first, text_of, group_of, image_of = [], [], [], []
    for image, (of_image, group) in enumerate(zip(captions, groups.tolist(), strict=True)):
        texts = [number_of.setdefault(caption, len(number_of)) for caption in of_image]
        first.append(texts[0])
        text_of += texts
        group_of += [group] * len(texts)
        image_of += [image] * len(texts)
    return Captions(list(number_of), *map(np.array, (first, text_of, group_of, image_of)))


@dataclass(frozen=True)
class Embedded:
    """A split as features: fp32, L2-normed, all of them on every rank.

    Attributes:
        image_features: [n_images, d], by sample number.
        text_features: [n_texts, d], by number in `captions.texts`.
    """

    image_features: torch.Tensor
    text_features: torch.Tensor
    captions: Captions


def embed(clip: Clip, shards: Shards, world: World, inference: Inference) -> Embedded:
    """The features of every image and every distinct caption of a split.

    Batches are cut by number, not by rank, so a sample is in the same batch in any world.

    Raises:
        NotFinite: a feature is not finite; the first such sample is named.
    """
    captions = read_captions(shards)
    image_features = embed_images(clip, shards, world, inference)
    # Equal images tie exactly; in batches of other sizes their features would differ by rounding.
    image_features = image_features[torch.from_numpy(captions.same_image).to(image_features.device)]
    return Embedded(image_features, embed_texts(clip, captions.texts, world, inference), captions)


def embed_texts(clip: Clip, texts: list[str], world: World, inference: Inference) -> torch.Tensor:
    """text_features [n, d]: fp32, L2-normed, all of them on every rank.

    Raises:
        NotFinite: a feature is not finite; the first such text is named.
    """
    clip.towers.eval()
    own_batches = batches(len(texts), inference.batch_size)[world.rank :: world.world_size]
    with torch.inference_mode():
        tokens = (clip.tokenize([texts[number] for number in numbers]) for numbers in own_batches)
        text_features = fill(len(texts), own_batches, tokens, clip.towers.text_features, world, "texts")
    check_finite(text_features, "text_features", lambda row: f"caption {texts[row]!r}")
    return text_features


def embed_images(
    clip: Clip,
    shards: Shards,
    world: World,
    inference: Inference,
    change: Callable[[Image.Image], Image.Image] | None = None,
    numbers: Sequence[int] | None = None,
) -> torch.Tensor:
    """image_features [n, d] of a split: fp32, L2-normed, all of them on every rank.

    Args:
        change: applied to each image first.
        numbers: the images to embed, by sample number; by default all.

    Raises:
        NotFinite: a feature is not finite; the first such sample is named.
    """
    clip.towers.eval()
    numbers = range(len(shards)) if numbers is None else numbers
    own_batches = batches(len(numbers), inference.batch_size)[world.rank :: world.world_size]
    own_numbers = [[numbers[row] for row in rows] for rows in own_batches]
    transform = Compose([change, clip.eval_transform]) if change else clip.eval_transform
    batch_bytes = pixel_bytes(clip, inference.batch_size)
    images = loader(
        EvalImages(shards, transform), own_numbers, inference.readers, world, batch_bytes=batch_bytes
    )
    with torch.inference_mode():
        image_features = fill(len(numbers), own_batches, images, clip.towers.image_features, world, "images")
    check_finite(image_features, "image_features", lambda row: f"sample {shards.key(numbers[row])}")
    return image_features


def batches(n: int, size: int) -> list[list[int]]:
    """Numbers 0 to n in lists of `size`, cut without regard to ranks."""
    return [list(range(start, min(start + size, n))) for start in range(0, n, size)]


def fill(
    n: int,
    own_batches: list[list[int]],
    inputs: Iterable[torch.Tensor],
    tower: Callable[[torch.Tensor], torch.Tensor],
    world: World,
    what: str,
) -> torch.Tensor:
    """Features [n, d] of all ranks' batches, each in its rows.

    Args:
        own_batches: numbers of this rank's rows, as `inputs` has them.
        what: "images", for the progress bar.
    """
    bar = progress(
        inputs,
        total=len(own_batches),
        desc=f"embedding {what}",
        unit="batch",
        leave=False,
        delay=1,
        disable=not world.is_first,
    )
    parts = [tower(batch.to(world.device, non_blocking=True)) for batch in bar]
    own_width = parts[0].shape[1] if parts else 0  # a rank may have no batch
    width = int(world.max(torch.tensor([own_width])).item())
    features = torch.zeros(n, width, device=world.device)
    for rows, part in zip(own_batches, parts, strict=True):
        features[rows] = part
    return world.sum(features)  # exact: each row is zero on all other ranks
