"""Which sample comes when: a pure function of (seed, samples), so a run resumes anywhere with no state to store."""

import functools

import numpy as np

WINDOW_SHARDS = 16  # mixed with each other; far apart in the epoch, so that each remote shard is wanted once


def random_bits(n: int, *entropy: int) -> np.ndarray:
    """uint64 [n], a function of `entropy` alone; numpy keeps raw streams stable over versions (NEP 19), permutations not."""
    return np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(n)


def epoch_order(shard_sizes: np.ndarray, seed: int, epoch: int, window: int = WINDOW_SHARDS) -> np.ndarray:
    """int64 [n], every sample number once: shards shuffled, then samples shuffled within windows of shards."""
    shards = np.argsort(random_bits(len(shard_sizes), seed, epoch, 0), kind="stable")
    starts = np.concatenate([[0], np.cumsum(shard_sizes)[:-1]])
    order = np.concatenate([np.arange(starts[shard], starts[shard] + shard_sizes[shard]) for shard in shards])
    keys = random_bits(len(order), seed, epoch, 1)
    window_of = np.repeat(np.arange(len(shards)) // window, shard_sizes[shards])
    return order[np.lexsort((keys, window_of))]


class Order:
    """The stream of training pairs, by position: batch k holds positions k * batch to (k + 1) * batch.

    An epoch is as many whole batches as fit; the pairs that are left over differ from epoch to epoch.
    """

    def __init__(self, shard_sizes: np.ndarray, batch: int, seed: int):
        self.shard_sizes, self.batch, self.seed = shard_sizes, batch, seed
        self.steps_per_epoch = int(shard_sizes.sum()) // batch
        assert self.steps_per_epoch > 0, (int(shard_sizes.sum()), batch)
        self.samples_per_epoch = self.steps_per_epoch * batch
        self._epoch_order = functools.lru_cache(maxsize=2)(self._compute)

    def __reduce__(self):
        return Order, (self.shard_sizes, self.batch, self.seed)

    def _compute(self, epoch: int) -> np.ndarray:
        return epoch_order(self.shard_sizes, self.seed, epoch)

    def sample_at(self, position: int) -> int:
        """The sample number at a position of the stream."""
        epoch, offset = divmod(position, self.samples_per_epoch)
        return int(self._epoch_order(epoch)[offset])
