"""`data` of a recipe: one folder of shards, or several, each with its share of every batch.

    data: shards                                      --data shards
    data: {shards/icons: 0.7, shards/general: 0.3}    --data shards/icons=0.7 shards/general=0.3

One typed word is always a folder, so its path may contain "=".
"""

import os
from pathlib import Path
from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec

from data_prep.errors import UserError
from data_prep.store.remote import absolute_place

TOLERANCE = 1e-6  # of the shares' sum
Sets = str | dict[str, float]  # a folder, or shares by folder


def from_words(words: list[str]) -> Sets:
    """The value of --data. One word is a folder, whatever characters it has.

    Raises:
        UserError: several words are not all FOLDER=SHARE. tyro would print a ValueError in a box of help.
    """
    if len(words) == 1:
        return words[0]
    shares: dict[str, float] = {}
    for word in words:
        folder, _, share = word.rpartition("=")
        try:
            number = float(share)
        except ValueError:
            number = None
        if not folder or number is None:
            raise UserError(
                f"--data {word}: has no share, and of several data sets each must: icons=0.7 general=0.3"
            )
        if folder in shares:
            raise UserError(f"--data {folder}: is named twice; name each folder once, with its share")
        shares[folder] = number
    if not shares:
        raise UserError("--data: must be a folder of shards, or several with shares: icons=0.7 general=0.3")
    return shares


def to_words(data: Sets) -> list[str]:
    """`data` as typed after --data; from_words() reads it."""
    if isinstance(data, str):
        return [data]
    if len(data) == 1:  # one word is a folder
        return [str(folder) for folder in data]
    return [f"{folder}={share}" for folder, share in data.items()]


Data = Annotated[
    Sets,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="SHARDS",
        instance_from_str=from_words,
        is_instance=lambda value: isinstance(value, (str, dict)),
        str_from_instance=to_words,
    ),
]


def shares_of(data: Sets) -> dict[str, float]:
    """Shares by folder."""
    return {data: 1.0} if isinstance(data, str) else data


def first_of(data: Sets) -> str:
    """The folder that defines the epoch, and is validated."""
    return next(iter(shares_of(data)))


def are_valid(data: Sets) -> bool:
    """Whether the shares are above 0 and sum to 1, and no folder is written in two ways."""
    shares = shares_of(data)
    are_parts = all(share > 0 for share in shares.values()) and abs(sum(shares.values()) - 1) <= TOLERANCE
    return are_parts and len(set(map(os.path.abspath, shares))) == len(shares)


def pairs_of(data: Sets, global_batch_size: int) -> dict[str, int]:
    """Pairs of each set in every batch, by folder: their sum is the batch.

    Rounded by largest remainder: down, and up again for those that lose most, until the batch is full.
    """
    total = sum(shares_of(data).values())  # 1 to rounding
    exact = {folder: share / total * global_batch_size for folder, share in shares_of(data).items()}
    pairs = {folder: int(value + TOLERANCE) for folder, value in exact.items()}
    by_loss = sorted(exact, key=lambda folder: round(pairs[folder] - exact[folder], 6))
    for folder in by_loss[: global_batch_size - sum(pairs.values())]:
        pairs[folder] += 1
    return pairs


def absolute(data: Sets | Path) -> Sets:
    """`data` with the absolute path of each folder; URLs as they are."""
    if isinstance(data, dict):
        return {absolute_place(folder): share for folder, share in data.items()}
    return absolute_place(data)
