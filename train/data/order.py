"""Which sample comes when: a pure function of (seed, samples), so a run resumes anywhere with no state to
store.
"""

import functools

import numpy as np

GROUPS = 6  # a stream of random bits beside those of orders, of train.data.loader and sets, and of train.step
WINDOW_SHARDS = 16  # mixed with each other; an epoch reads each shard in one stretch


def random_bits(n: int, *entropy: int) -> np.ndarray:
    """uint64 [n], a function of `entropy` alone; numpy keeps raw streams stable over versions (NEP 19),
    permutations not.
    """
    return np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(n)


def epoch_order(shard_sizes: np.ndarray, seed: int, epoch: int, window: int = WINDOW_SHARDS) -> np.ndarray:
    """int64 [n], every sample number once: shards shuffled, then samples within windows of shards."""
    shards = np.argsort(random_bits(len(shard_sizes), seed, epoch, 0), kind="stable")
    ends = np.cumsum(shard_sizes)
    keys, order = random_bits(int(ends[-1]), seed, epoch, 1), []
    for first in range(0, len(shards), window):
        in_window = shards[first : first + window]
        samples = np.concatenate(
            [np.arange(ends[shard] - shard_sizes[shard], ends[shard]) for shard in in_window]
        )
        window_keys, keys = keys[: len(samples)], keys[len(samples) :]
        order.append(samples[np.argsort(window_keys, kind="stable")])
    return np.concatenate(order)


def part_of_groups(groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which samples are in a fraction of the groups: bool [n]. Of two fractions, the smaller is a part of the
    larger.

    Args:
        groups: int64 [n].
    """
    names, members = np.unique(groups, return_inverse=True)
    places = np.argsort(np.argsort(random_bits(len(names), seed, 0, GROUPS), kind="stable"), kind="stable")
    return (places < round(fraction * len(names)))[members]


class Order:
    """The stream of training pairs, by position: batch k holds positions k * B to (k + 1) * B.

    An epoch is as many whole batches as fit; which pairs are left over differs from epoch to epoch.

    Args:
        shard_sizes: int64 [shards], samples in each shard.
        global_batch_size: B.
    """

    def __init__(self, shard_sizes: np.ndarray, global_batch_size: int, seed: int):
        self.shard_sizes, self.global_batch_size, self.seed = shard_sizes, global_batch_size, seed
        self.n_samples = int(shard_sizes.sum())
        self.steps_per_epoch = self.n_samples // global_batch_size
        assert self.steps_per_epoch > 0, (self.n_samples, global_batch_size)
        self.samples_per_epoch = self.steps_per_epoch * global_batch_size
        self._epoch_order = functools.lru_cache(maxsize=2)(self._compute)

    def __reduce__(self):
        return Order, (self.shard_sizes, self.global_batch_size, self.seed)

    def _compute(self, epoch: int) -> np.ndarray:
        return epoch_order(self.shard_sizes, self.seed, epoch)

    def sample_at(self, position: int) -> int:
        """The sample number at a position of the stream."""
        epoch, offset = divmod(position, self.samples_per_epoch)
        return int(self._epoch_order(epoch)[offset])
