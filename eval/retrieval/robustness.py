"""Robustness: R@1 of query images that are downscaled, blurred or cropped, at three levels each."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from data_prep.shards import Shards
from eval.embed import Embedded, embed_images
from eval.options import Inference
from eval.retrieval.intervals import Difference, paired_difference
from eval.retrieval.ranking import Relevance, query_values, ranks, summarize
from train.model.clip import Clip
from train.world import World

LEVELS = {"resample": (2, 4, 8), "blur": (0.02, 0.04, 0.08), "crop": (0.9, 0.7, 0.5)}
# Of center_crop_gain(): the part of each side that is kept, images, and the level of the interval.
CENTER_CROP, MAX_CROPPED, CROP_LEVEL = 0.96, 1000, 0.99


def degrade(degradation: str, level: float) -> Callable[[Image.Image], Image.Image]:
    """A function that degrades an RGB image.

    Args:
        degradation: "resample": downscaled by `level` and upscaled again; "blur": Gaussian, its radius
            `level` times the shorter side; "crop": the center, `level` of each side.
    """

    def resample(image: Image.Image) -> Image.Image:
        small = (max(1, round(image.width / level)), max(1, round(image.height / level)))
        return image.resize(small, Image.BOX).resize(image.size, Image.BICUBIC)

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(level * min(image.size)))

    def crop(image: Image.Image) -> Image.Image:
        left, top = round(image.width * (1 - level) / 2), round(image.height * (1 - level) / 2)
        return image.crop((left, top, max(left + 1, image.width - left), max(top + 1, image.height - top)))

    return {"resample": resample, "blur": blur, "crop": crop}[degradation]


def curves(
    clip: Clip, shards: Shards, embedded: Embedded, world: World, inference: Inference
) -> dict[str, list[dict]]:
    """For each degradation a list of points: its level, image_to_text/R@1, and image_to_image/R@1, where the
    degraded image must find an undegraded image of its group, itself included.
    """
    images, texts = embedded.image_features, embedded.text_features
    to_text = Relevance(shards.groups, embedded.captions.text_of, embedded.captions.group_of)
    to_image = Relevance(shards.groups, np.arange(len(shards)), shards.groups)

    def point(degradation: str, level: float) -> dict:
        degraded = embed_images(clip, shards, world, inference, change=degrade(degradation, level))
        return {
            "level": level,
            "image_to_text/R@1": summarize(ranks(degraded, texts, to_text, world)[0])["R@1"],
            "image_to_image/R@1": summarize(ranks(degraded, images, to_image, world)[0])["R@1"],
        }

    return {
        degradation: [point(degradation, level) for level in levels] for degradation, levels in LEVELS.items()
    }


def center_crop_gain(
    clip: Clip, shards: Shards, embedded: Embedded, world: World, inference: Inference
) -> Difference:
    """How much better an image's center finds its captions than the whole image does: R@1, paired by image.

    A model that was trained on crops has seen things larger than evaluation shows them (Touvron et al. 2019,
    arXiv:1906.06423); then it does better on crops. At most MAX_CROPPED images, evenly spread.
    """
    numbers = np.linspace(0, len(shards) - 1, min(len(shards), MAX_CROPPED)).round().astype(np.int64)
    cropped = embedded.image_features.clone()
    crop = degrade("crop", CENTER_CROP)
    cropped[numbers] = embed_images(clip, shards, world, inference, crop, numbers.tolist())
    relevance = Relevance(shards.groups, embedded.captions.text_of, embedded.captions.group_of)
    hits = []
    for images in (embedded.image_features, cropped):
        to_text, _ = ranks(images, embedded.text_features, relevance, world)
        hits.append(query_values(to_text)["R@1"][numbers])
    return paired_difference(*hits, shards.groups[numbers], CROP_LEVEL)
