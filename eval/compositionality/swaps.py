"""Swapped words: a caption of the user's own data against itself with two neighboring content words
exchanged.
"""

import hashlib
import itertools
import re
from typing import NamedTuple

from data_prep.errors import UserError
from data_prep.shards import Shards

# Words whose exchange changes little; a swap steps over them.
_FUNCTION_WORDS = (
    "a an and are as at by for from has have in into is it its of off on onto or over that the this to under"
    " up was with"
)
FUNCTION_WORDS = set(_FUNCTION_WORDS.split())


class Swap(NamedTuple):
    """An image, by number, its own caption, and the same with two words swapped."""

    number: int
    caption: str
    swapped: str


def swap_words(caption: str, correct: set[str], entropy: bytes) -> str | None:
    """The caption with two neighboring content words exchanged, chosen by `entropy`; None if no swap gives a
    new one.

    Args:
        correct: captions that are correct for the image, compared without case; no swap may be one of them.
    """
    words = [
        word
        for word in re.finditer(r"[^\W_]+(?:['’-][^\W_]+)*", caption)
        if word.group().lower() not in FUNCTION_WORDS
    ]
    correct = {text.lower() for text in correct | {caption}}
    swaps = []
    for left, right in itertools.pairwise(words):
        between = caption[left.end() : right.start()]
        swap = caption[: left.start()] + right.group() + between + left.group() + caption[right.end() :]
        if swap.lower() not in correct:
            swaps.append(swap)
    return swaps[int.from_bytes(hashlib.sha256(entropy).digest()[:8], "big") % len(swaps)] if swaps else None


def swaps_of(shards: Shards, seed: int) -> list[Swap]:
    """One swap for the first caption of every image where one is possible.

    Raises:
        UserError: there is none.
    """
    correct: dict[int, set[str]] = {}
    for number, group in enumerate(shards.groups.tolist()):
        correct.setdefault(group, set()).update(shards.captions(number))
    swaps = []
    for number, group in enumerate(shards.groups.tolist()):
        for caption in shards.captions(number)[:1]:
            if swapped := swap_words(caption, correct[group], f"{seed} {shards.key(number)}".encode()):
                swaps.append(Swap(number, caption, swapped))
    if not swaps:
        raise UserError(
            f"{shards.folder}: no caption of {shards.split} has two words to swap; leave out --data, or use"
            " longer captions"
        )
    return swaps
