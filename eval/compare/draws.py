"""Each image's text against k others: which texts there are, which are drawn, and how often the own one wins.

Scores within eval.retrieval.ranking.TIE are tied, and a tie of m counts as 1/m: a collapsed model has exactly
1/(k+1)."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from eval.retrieval.ranking import TIE
from train.data.order import random_bits

DRAWN_FLOATS = 1 << 24


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
    def wrong(self) -> np.ndarray:
        """int64 [n_images], texts of other groups only; 0 where the image has no text to compare with."""
        return np.array(
            [
                len(self.texts) - len(own) if first >= 0 else 0
                for first, own in zip(self.first, self.own, strict=True)
            ]
        )


def column_of(name: str, texts_of: list[list[str]], groups: np.ndarray) -> Column:
    """A Column from the texts of each image and groups int64 [n_images]."""
    texts = sorted({text for texts in texts_of for text in texts})
    number = {text: at for at, text in enumerate(texts)}
    of_group: dict[int, set[int]] = {}
    for group, mine in zip(groups.tolist(), texts_of, strict=True):
        of_group.setdefault(group, set()).update(number[text] for text in mine)
    arrays = {group: np.array(sorted(members), dtype=np.int64) for group, members in of_group.items()}
    first = np.array([number[mine[0]] if mine else -1 for mine in texts_of])
    return Column(name, texts, first, [arrays[group] for group in groups.tolist()])


def draw(column: Column, keys: list[str], k: int, seed: int) -> np.ndarray:
    """k distinct texts of other groups for each image: int64 [n_images, k], -1 where there are fewer than k.

    Drawn by (seed, key, the set of texts) alone.
    Source: Floyd's sampling without replacement, Bentley and Floyd 1987 (doi:10.1145/30401.315746).
    """
    drawn = np.full((len(keys), k), -1, dtype=np.int64)
    for at, (key, wrong) in enumerate(zip(keys, column.wrong.tolist(), strict=True)):
        wanted = min(k, wrong)
        if not wanted:
            continue
        entropy = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big")
        chosen: dict[int, None] = {}
        for bits, last in zip(
            random_bits(wanted, seed, entropy).tolist(), range(wrong - wanted, wrong), strict=True
        ):
            place = bits % (last + 1)
            chosen[last if place in chosen else place] = None
        places, own = np.array(list(chosen)), column.own[at]
        drawn[at, :wanted] = places + np.searchsorted(
            own - np.arange(len(own)), places, side="right"
        )  # steps over the own ones
    return drawn


def drawn_accuracy(
    image_features: torch.Tensor, text_features: torch.Tensor, first: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """For each image 1 where its text beats the drawn ones, 1/m where it shares the lead with m - 1, else 0.

    Args:
        image_features: fp32 [n, d], L2-normed; text_features [n_texts, d] likewise.
        first: int64 [n]; drawn: int64 [n, k], -1 for none.
    """
    right, others = (
        torch.from_numpy(first).to(text_features.device),
        torch.from_numpy(drawn).to(text_features.device),
    )
    values = []
    for rows in torch.arange(len(first)).split(
        max(1, DRAWN_FLOATS // (drawn.shape[1] * image_features.shape[1]))
    ):
        images = image_features[rows]
        ours = (images * text_features[right[rows]]).sum(1, keepdim=True)
        lead = (images[:, None] * text_features[others[rows].clamp(min=0)]).sum(2) - ours
        lead[others[rows] < 0] = -torch.inf
        values.append((lead <= TIE).all(1) / (1.0 + (lead.abs() <= TIE).sum(1).double()))
    return torch.cat(values).cpu().numpy()


def expected_accuracy(above: np.ndarray, tied: np.ndarray, wrong: np.ndarray, k: int) -> np.ndarray:
    """drawn_accuracy's mean over all draws of k (of all, where fewer are wrong), exactly: float [n].

    With R of N above, none of them is drawn with probability q(R) = C(N-R, k) / C(N, k). A tie of E is R = G
    to G + E, each as likely, and the sum over these has a closed form as well: sum_R C(N-R, k) = C(N-G+1,
    k+1) - C(N-G-E, k+1).

    Args:
        above, tied, wrong: int64 [n]: G, E and N.
    """
    k_of = np.minimum(k, wrong)

    def none_drawn(above: np.ndarray) -> np.ndarray:
        chance = np.ones(len(above))
        for at in range(int(k_of.max(initial=0))):  # factors within 0 and 1: nothing overflows
            chance *= np.where(at < k_of, np.clip(wrong - above - at, 0, None) / np.maximum(wrong - at, 1), 1)
        return chance

    high = (wrong - above + 1) * none_drawn(above)
    low = np.clip(wrong - above - tied - k_of, 0, None) * none_drawn(above + tied)
    return (high - low) / ((k_of + 1) * (tied + 1))
