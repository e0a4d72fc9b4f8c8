"""What a short fine-tuning would add to a model: two square matrices on its cached features.

    image_features, text_features -> normalize(features @ matrix) -> contrastive loss -> the best round

A model whose features hold what tells the images apart gains by this; one that lacks it does not. It takes a
minute where full training takes hours, and no image is decoded twice.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data_prep.progress import progress
from train.loss import clip_loss
from train.world import World

HELD_OUT, BATCH = 0.1, 512
ROUND_STEPS, ROUNDS, PATIENCE = 50, 40, 5  # 2,000 steps; rounds without a better one
LR, WEIGHT_DECAY = 1e-3, 0.1  # of the matrices' difference from the identity, so decay pulls to the base
LOGIT_SCALE = 50.0  # of all models, so that their own does not decide
MAX_HELD_OUT = 2000  # images that a round is scored on


class Pairs(NamedTuple):
    """Cached features of training pairs.

    Attributes:
        image_features, text_features: fp32 [n_images, d] and [n_texts, d], L2-normed.
        texts: of each image, the numbers of its captions.
        groups: int64 [n_images].
    """

    image_features: torch.Tensor
    text_features: torch.Tensor
    texts: list[list[int]]
    groups: np.ndarray


class Projections(NamedTuple):
    """fp32 [d, d] each; after `steps`, 0 where the identity was best."""

    image: torch.Tensor
    text: torch.Tensor
    steps: int

    def images(self, features: torch.Tensor) -> torch.Tensor:
        """image_features [n, d] as the fitted model has them, L2-normed."""
        return F.normalize(features @ self.image, dim=1)

    def texts(self, features: torch.Tensor) -> torch.Tensor:
        """text_features [n, d] as the fitted model has them, L2-normed."""
        return F.normalize(features @ self.text, dim=1)


def fit(pairs: Pairs, seed: int = 0) -> Projections:
    """The matrices of the round that is best on a tenth of the groups, which are not trained on.

    The result is a function of (pairs, seed).
    """
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.unique(pairs.groups))
    held_out = np.isin(pairs.groups, groups[: max(1, round(HELD_OUT * len(groups)))])
    trained, scored = np.flatnonzero(~held_out), np.flatnonzero(held_out)[:MAX_HELD_OUT]
    device, width = pairs.image_features.device, pairs.image_features.shape[1]
    eye = torch.eye(width, device=device)
    changes = torch.zeros(2, width, width, device=device, requires_grad=True)
    best = Projections(eye, eye, 0)
    if len(trained) < 2 or not len(scored):
        return best
    optimizer = torch.optim.AdamW([changes], lr=LR, weight_decay=WEIGHT_DECAY)
    best_score = score(best, pairs, scored)
    counts = np.array([len(texts) for texts in pairs.texts])
    starts, every_text = np.cumsum(counts) - counts, np.concatenate(pairs.texts)
    stream, rounds = batches(trained, rng), range(1, ROUNDS + 1)
    for number in progress(rounds, desc="fitting projections", unit="round", leave=False, delay=1):
        for numbers in itertools.islice(stream, ROUND_STEPS):
            drawn = (rng.random(len(numbers)) * counts[numbers]).astype(int)
            texts = every_text[starts[numbers] + drawn]
            tuned = Projections(eye + changes[0], eye + changes[1], 0)
            outputs = (
                tuned.images(pairs.image_features[torch.from_numpy(numbers).to(device)]),
                tuned.texts(pairs.text_features[torch.from_numpy(texts).to(device)]),
                torch.tensor(LOGIT_SCALE, device=device),
            )
            ids = torch.from_numpy(np.stack([pairs.groups[numbers], -1 - texts], axis=1)).to(device)
            loss = clip_loss(outputs, ids, World(), same_group="positive")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        change = changes.detach().clone()
        fitted = Projections(eye + change[0], eye + change[1], number * ROUND_STEPS)
        if (now := score(fitted, pairs, scored)) > best_score:
            best, best_score = fitted, now
        elif fitted.steps - best.steps >= PATIENCE * ROUND_STEPS:
            break
    return best


def batches(numbers: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless, each number once per pass; of one pass, of equal size up to one."""
    while True:
        yield from np.array_split(rng.permutation(numbers), max(1, round(len(numbers) / BATCH)))


def score(projections: Projections, pairs: Pairs, numbers: np.ndarray) -> float:
    """Mean reciprocal rank of each image's first caption among those of `numbers`, both directions."""
    device = pairs.image_features.device
    images = projections.images(pairs.image_features[torch.from_numpy(numbers).to(device)])
    first = torch.tensor([pairs.texts[number][0] for number in numbers], device=device)
    similarity = images @ projections.texts(pairs.text_features[first]).T
    own = similarity.diagonal()
    ranks = torch.cat([(similarity >= own[:, None]).sum(1), (similarity >= own[None]).sum(0)])
    return (1 / ranks.double()).mean().item()
