"""Which sample comes when: a pure function of (seed, samples), so a run resumes anywhere with no state to
store.
"""

import functools

import numpy as np

WINDOW_SHARDS = 16  # mixed with each other; far apart in the epoch, so that each remote shard is wanted once


def random_bits(n: int, *entropy: int) -> np.ndarray:
    """uint64 [n], a function of `entropy` alone; numpy keeps raw streams stable over versions (NEP 19),
    permutations not.
    """
    return np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(n)


def epoch_order(
    shard_sizes: np.ndarray,
    seed: int,
    epoch: int,
    groups: np.ndarray | None = None,
    window: int = WINDOW_SHARDS,
) -> np.ndarray:
    """int64 [n], every sample number once: shards shuffled, then samples shuffled within windows of shards.

    Args:
        groups: int64 [n], group of each sample; those of one group are then as far from each other as their
            window has room.
    """
    shards = np.argsort(random_bits(len(shard_sizes), seed, epoch, 0), kind="stable")
    ends = np.cumsum(shard_sizes)
    keys, order = random_bits(int(ends[-1]), seed, epoch, 1), []
    for first in range(0, len(shards), window):
        samples = np.concatenate(
            [
                np.arange(ends[shard] - shard_sizes[shard], ends[shard])
                for shard in shards[first : first + window]
            ]
        )
        here, keys = keys[: len(samples)], keys[len(samples) :]
        places = here if groups is None else _spread(here, groups[samples])
        order.append(samples[np.argsort(places, kind="stable")])
    return np.concatenate(order)


def _spread(keys: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Places in a window, fp64 [n] from 0 to 1: the k-th of the m members that a group has there stands at (k
    + u) / m.

    Both the order of the members and u, one number per group, come of `keys`: u is their sum without its
    overflow, which is uniform whatever their order; so a group of one stands where its key puts it.

    Args:
        keys: uint64 [n], uniform.
        groups: int64 [n].
    """
    by_group = np.lexsort((keys, groups))
    ordered = groups[by_group]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    sizes = np.diff(starts, append=len(keys))
    members = np.arange(len(keys)) - np.repeat(starts, sizes)
    shifts = (np.add.reduceat(keys[by_group], starts) >> np.uint64(11)) * 2.0**-53
    places = np.empty(len(keys))
    places[by_group] = (members + np.repeat(shifts, sizes)) / np.repeat(sizes, sizes)
    return places


class Order:
    """The stream of training pairs, by position: batch k holds positions k * batch to (k + 1) * batch.

    An epoch is as many whole batches as fit; the pairs that are left over differ from epoch to epoch.

    Args:
        groups: int64 [n], group of each sample, to keep the members of one from meeting in a batch; None to
            let them.
    """

    def __init__(self, shard_sizes: np.ndarray, batch: int, seed: int, groups: np.ndarray | None = None):
        self.shard_sizes, self.batch, self.seed, self.groups = shard_sizes, batch, seed, groups
        self.steps_per_epoch = int(shard_sizes.sum()) // batch
        assert self.steps_per_epoch > 0, (int(shard_sizes.sum()), batch)
        self.samples_per_epoch = self.steps_per_epoch * batch
        self._epoch_order = functools.lru_cache(maxsize=2)(self._compute)

    def __reduce__(self):
        return Order, (self.shard_sizes, self.batch, self.seed, self.groups)

    def _compute(self, epoch: int) -> np.ndarray:
        return epoch_order(self.shard_sizes, self.seed, epoch, self.groups)

    def sample_at(self, position: int) -> int:
        """The sample number at a position of the stream."""
        epoch, offset = divmod(position, self.samples_per_epoch)
        return int(self._epoch_order(epoch)[offset])
