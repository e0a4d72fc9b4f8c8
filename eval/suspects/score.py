"""Which captions of a data set are probably wrong, by a model's features and by neighbours in both towers.

    pairs -> distance of image and caption
          -> nearest images, nearest captions -> lemon(): do neighbours have captions and images like these?
          -> hub_counts(): captions near to many images      -> same_things(): two groups that are one

The model should not have been trained on this data: it would have learned the errors too.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from eval.bases.projections import Pairs

# LEMoN (Zhang et al. 2024, arXiv:2407.18941, equations 1 to 3); its values for use without labelled errors
K, BETA, GAMMA, TAU_NEIGHBOUR, TAU_PAIR = 30, 5.0, 5.0, 0.1, 5.0
NEAR_CAPTIONS = 5  # of an image; a caption near to many images is a hub
ROWS = 512  # compared at once


class PairFeatures(NamedTuple):
    """One row per pair of an image and one of its captions: fp32 [p, d], L2-normed."""

    images: torch.Tensor
    texts: torch.Tensor


class Numbers(NamedTuple):
    """int64 [p] each: the image, the distinct caption and the group of each pair."""

    image: np.ndarray
    text: np.ndarray
    group: np.ndarray


def numbers_of(pairs: Pairs) -> Numbers:
    counts = [len(texts) for texts in pairs.texts]
    image = np.repeat(np.arange(len(counts)), counts)
    return Numbers(image, np.concatenate(pairs.texts), pairs.groups[image])


def features_of(pairs: Pairs, numbers: Numbers) -> PairFeatures:
    return PairFeatures(
        pairs.image_features[torch.from_numpy(numbers.image)],
        pairs.text_features[torch.from_numpy(numbers.text)],
    )


def distances_of(features: PairFeatures) -> torch.Tensor:
    """1 - cosine of each image and its own caption, fp32 [p]."""
    return 1 - (features.images * features.texts).sum(1)


def knowledge(pairs: PairFeatures, numbers: Numbers) -> float | None:
    """How often an image's own caption is nearer to it than that of a pair drawn from another group: 0.5 by
    chance; None where all pairs are of one group.
    """
    drawn = np.random.default_rng(0).permutation(len(numbers.image))
    others = PairFeatures(pairs.images, pairs.texts[torch.from_numpy(drawn)])
    is_nearer = (distances_of(pairs) < distances_of(others)).cpu().numpy()
    is_other = numbers.group != numbers.group[drawn]
    return float(is_nearer[is_other].mean()) if is_other.any() else None


def lemon(features: PairFeatures, image: np.ndarray, distances: torch.Tensor) -> torch.Tensor:
    """How badly each pair fits its neighbours and itself, fp32 [p]; higher is worse.

    d(image, text) + BETA * mean over the images nearest to this one of the distance of their captions to
    this caption + GAMMA * mean over the captions nearest to this one of the distance of their images to this
    image.
    Neighbours that are far away, or do not fit their own caption, count less.

    Args:
        image: int64 [p], the image of each pair; pairs of one image are no neighbours.
        distances: fp32 [p], of each image to its own caption.
    """
    total = distances.clone()
    for near, other, weight in (
        (features.images, features.texts, BETA),
        (features.texts, features.images, GAMMA),
    ):
        for rows, cosines, found in neighbours(near, image, K):
            apart = 1 - torch.einsum("rd,rkd->rk", other[rows], other[found])
            trust = torch.exp(-TAU_NEIGHBOUR * (1 - cosines)) * torch.exp(-TAU_PAIR * distances[found])
            total[rows] += weight * (apart * trust).mean(1)
    return total


def neighbours(
    features: torch.Tensor, image: np.ndarray, k: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For ROWS rows at a time: their numbers, and cosines [r, k] and numbers [r, k] of the nearest pairs of
    other images.
    """
    owner = torch.from_numpy(image).to(features.device)
    k = min(k, int(len(image) - np.bincount(image).max()))
    for rows in torch.arange(len(features), device=features.device).split(ROWS):
        cosines = features[rows] @ features.T
        cosines[owner[rows][:, None] == owner[None]] = -torch.inf
        best = cosines.topk(k, dim=1)
        yield rows, best.values, best.indices


def hub_counts(pairs: Pairs, numbers: Numbers) -> np.ndarray:
    """int64 [n_texts]: the number of groups without this caption that have an image to which it is among the
    NEAR_CAPTIONS nearest.
    """
    of_text = [set() for _ in range(len(pairs.text_features))]
    for text, group in zip(numbers.text.tolist(), numbers.group.tolist(), strict=True):
        of_text[text].add(group)
    near: list[set[int]] = [set() for _ in of_text]
    k = min(NEAR_CAPTIONS, len(of_text))
    for rows in torch.arange(len(pairs.image_features)).split(ROWS):
        found = (pairs.image_features[rows] @ pairs.text_features.T).topk(k, dim=1).indices.tolist()
        for group, texts in zip(pairs.groups[rows.numpy()].tolist(), found, strict=True):
            for text in texts:
                near[text].add(group)
    return np.array([len(groups - own) for groups, own in zip(near, of_text, strict=True)])


def same_things(pairs: Pairs, numbers: Numbers) -> list[tuple[int, int, float]]:
    """Images of two groups that are each other's nearest in the other groups, by their images and by their
    captions: (image, other image, the smaller of the two cosines), the most similar first.
    """
    first = np.array([texts[0] for texts in pairs.texts])
    nearest = {}
    for name, features in (
        ("image", pairs.image_features),
        ("text", pairs.text_features[torch.from_numpy(first)]),
    ):
        # the groups as owners: no neighbour in the own group
        parts = list(neighbours(features, pairs.groups, 1)) if len(np.unique(pairs.groups)) > 1 else []
        nearest[name] = [torch.cat([part[at][:, 0] for part in parts]) for at in (1, 2)] if parts else None
    if nearest["image"] is None:
        return []
    (image_cosines, images), (text_cosines, texts) = nearest["image"], nearest["text"]
    found = []
    for one, other in enumerate(images.tolist()):
        if one < other and images[other] == one:
            same_text = first[int(texts[one])] == first[other] or int(texts[one]) == other
            back = first[int(texts[other])] == first[one] or int(texts[other]) == one
            if same_text and back:
                found.append((one, other, min(image_cosines[one].item(), text_cosines[one].item())))
    return sorted(found, key=lambda pair: (-round(pair[2], 4), pair[:2]))
