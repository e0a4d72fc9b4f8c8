"""Each group is assigned to train, val or test by a hash of its name, so adding rows does not move existing
images between splits.
"""

import hashlib

SPLITS = ("train", "val", "test")


def split_of(group: str, val: float, test: float, seed: int = 0) -> str:
    """The split of a group.

    Args:
        val, test: the fractions of groups in these splits.
    """
    digest = hashlib.blake2b(group.encode(), digest_size=8, key=f"split {seed}".encode()).digest()
    position = int.from_bytes(digest, "big") / 2**64
    return "test" if position < test else "val" if position < test + val else "train"
