"""Query images as people have them: small, blurred, cut off. How much of the retrieval survives, as a curve."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from data_prep.shards import Shards
from eval.embed import Embedded, embed_images
from eval.options import Inference
from eval.retrieval.ranking import Relevance, ranks, summarize
from train.model.clip import Clip
from train.world import World

LEVELS = {"resample": (2, 4, 8), "blur": (0.02, 0.04, 0.08), "crop": (0.9, 0.7, 0.5)}


def degrade(kind: str, level: float) -> Callable[[Image.Image], Image.Image]:
    """What is done to an RGB picture.

    Args:
        kind: resample: shrunk by `level` and enlarged again; blur: Gaussian, the radius `level` times the
            shorter side; crop: the middle, `level` of each side.
    """

    def change(image: Image.Image) -> Image.Image:
        width, height = image.size
        if kind == "resample":
            small = (max(1, round(width / level)), max(1, round(height / level)))
            return image.resize(small, Image.BOX).resize(image.size, Image.BICUBIC)
        if kind == "blur":
            return image.filter(ImageFilter.GaussianBlur(level * min(width, height)))
        assert kind == "crop", kind
        left, top = round(width * (1 - level) / 2), round(height * (1 - level) / 2)
        return image.crop((left, top, max(left + 1, width - left), max(top + 1, height - top)))

    return change


def curves(
    clip: Clip, shards: Shards, embedded: Embedded, world: World, inference: Inference
) -> dict[str, list[dict]]:
    """ "resample", "blur", "crop" -> for each level, image_to_text/R@1 and R@1 of finding an image of the
    group by the degraded one.
    """
    images, texts = embedded.image_features, embedded.text_features
    to_text = Relevance(shards.groups, embedded.captions.text_of, embedded.captions.group_of)
    to_image = Relevance(shards.groups, np.arange(len(shards)), shards.groups)
    found = {}
    for kind, levels in LEVELS.items():
        found[kind] = []
        for level in levels:
            features = embed_images(clip, shards, world, inference, change=degrade(kind, level))
            one = {
                "level": level,
                "image_to_text/R@1": summarize(ranks(features, texts, to_text, world)[0])["R@1"],
            }
            one["image_to_image/R@1"] = summarize(ranks(features, images, to_image, world)[0])["R@1"]
            found[kind].append(one)
    return found


def table(result: dict[str, list[dict]], whole: float) -> str:
    """The curves in a few lines; `whole` is image_to_text/R@1 of the undegraded images."""
    lines = [
        f"degraded query images, R@1 to a text of the group (whole: {100 * whole:.1f} %), and to an image of"
        " the group"
    ]
    for kind, levels in result.items():
        cells = (
            f"{one['level']:g}: {100 * one['image_to_text/R@1']:.1f}, {100 * one['image_to_image/R@1']:.1f} %"
            for one in levels
        )
        lines.append(f"  {kind:9} {'   '.join(cells)}")
    return "\n".join(lines)
