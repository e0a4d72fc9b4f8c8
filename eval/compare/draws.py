"""Each image's text against k others: the texts, which of them are drawn, and how often the own one wins.

Scores within eval.retrieval.ranking.TIE are tied, and a tie of m counts 1/m: a collapsed model scores exactly
1 / (k + 1).
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from eval.retrieval.ranking import TIE
from train.data.order import random_bits

CHUNK_FLOATS = 1 << 24


@dataclass(frozen=True)
class Column:
    """One column of texts of a split.

    Attributes:
        texts: the distinct texts, sorted, so that a draw does not depend on the order of samples.
        first: int64 [n_images], the text that is each image's first one; -1 where it has none.
        own: for each image the texts of its group, int64, sorted; they are never drawn against it.
    """

    name: str
    texts: list[str]
    first: np.ndarray
    own: list[np.ndarray]

    @property
    def n_wrong(self) -> np.ndarray:
        """int64 [n_images], texts of other groups only; 0 where the image has no text to compare with."""
        n_own = np.array([len(own) for own in self.own])
        return np.where(self.first >= 0, len(self.texts) - n_own, 0)


def column_of(name: str, texts_of: list[list[str]], groups: np.ndarray) -> Column:
    """A Column from the texts of each image and the groups int64 [n_images]."""
    texts = sorted({text for texts in texts_of for text in texts})
    number_of = {text: number for number, text in enumerate(texts)}
    of_group: dict[int, set[int]] = {}
    for group, image_texts in zip(groups.tolist(), texts_of, strict=True):
        of_group.setdefault(group, set()).update(number_of[text] for text in image_texts)
    arrays = {group: np.array(sorted(members), dtype=np.int64) for group, members in of_group.items()}
    first = np.array([number_of[image_texts[0]] if image_texts else -1 for image_texts in texts_of])
    return Column(name, texts, first, [arrays[group] for group in groups.tolist()])


def draw(column: Column, keys: list[str], k: int, seed: int) -> np.ndarray:
    """k distinct texts of other groups for each image: int64 [n_images, k], -1 where there are fewer than k.

    A function of (seed, key, the set of texts) alone.
    Source: Floyd's sampling without replacement, Bentley and Floyd 1987 (doi:10.1145/30401.315746).
    """
    drawn = np.full((len(keys), k), -1, dtype=np.int64)
    for image, (key, n_wrong) in enumerate(zip(keys, column.n_wrong.tolist(), strict=True)):
        n_drawn = min(k, n_wrong)
        if not n_drawn:
            continue
        entropy = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big")
        chosen: dict[int, None] = {}
        limits = range(n_wrong - n_drawn, n_wrong)
        for bits, last in zip(random_bits(n_drawn, seed, entropy).tolist(), limits, strict=True):
            index = bits % (last + 1)
            chosen[last if index in chosen else index] = None
        # Indices count wrong texts alone; the shift steps over the own ones.
        indices, own = np.array(list(chosen)), column.own[image]
        drawn[image, :n_drawn] = indices + np.searchsorted(own - np.arange(len(own)), indices, side="right")
    return drawn


def drawn_accuracy(
    image_features: torch.Tensor, text_features: torch.Tensor, first: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """float [n]: 1 where an image's text beats the drawn ones, 1/m where it is tied for first with m - 1,
    else 0.

    Args:
        image_features: fp32 [n, d], L2-normed.
        text_features: fp32 [n_texts, d], L2-normed.
        first: int64 [n].
        drawn: int64 [n, k], -1 for none.
    """
    own, others = (torch.from_numpy(texts).to(text_features.device) for texts in (first, drawn))
    chunk = max(1, CHUNK_FLOATS // (drawn.shape[1] * image_features.shape[1]))
    values = []
    for rows in torch.arange(len(first)).split(chunk):
        images = image_features[rows]
        own_scores = (images * text_features[own[rows]]).sum(1, keepdim=True)
        lead = (images[:, None] * text_features[others[rows].clamp(min=0)]).sum(2) - own_scores
        lead[others[rows] < 0] = -torch.inf
        values.append((lead <= TIE).all(1) / (1.0 + (lead.abs() <= TIE).sum(1).double()))
    return torch.cat(values).cpu().numpy()


def expected_accuracy(above: np.ndarray, tied: np.ndarray, n_wrong: np.ndarray, k: int) -> np.ndarray:
    """The exact mean of drawn_accuracy over all draws of k (of all, where fewer are wrong): float [n].

    With R of N above, none of them is drawn with probability q(R) = C(N-R, k) / C(N, k). A tie of E is R = G
    to G + E, each equally likely, and the sum over these has a closed form: sum_R C(N-R, k) = C(N-G+1, k+1) -
    C(N-G-E, k+1).

    Args:
        above, tied, n_wrong: int64 [n]: G, E and N.
    """
    k_of = np.minimum(k, n_wrong)

    def none_drawn(above: np.ndarray) -> np.ndarray:
        probability = np.ones(len(above))
        for number in range(int(k_of.max(initial=0))):  # factors in [0, 1], so nothing overflows
            factor = np.clip(n_wrong - above - number, 0, None) / np.maximum(n_wrong - number, 1)
            probability *= np.where(number < k_of, factor, 1)
        return probability

    high = (n_wrong - above + 1) * none_drawn(above)
    low = np.clip(n_wrong - above - tied - k_of, 0, None) * none_drawn(above + tied)
    return (high - low) / ((k_of + 1) * (tied + 1))
