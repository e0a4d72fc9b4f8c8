"""Which sample comes when: a pure function of (seed, samples), so a run resumes anywhere with no state to
store.
"""

import functools
from typing import NamedTuple

import numpy as np

GROUPS = 6  # a stream of random bits beside those of orders, of train.data.loader and sets, and of train.step
WINDOW_SHARDS = 16  # mixed with each other; an epoch reads each shard in one stretch


def random_bits(n: int, *entropy: int, skip: int = 0) -> np.ndarray:
    """uint64 [n], a function of `entropy` alone; numpy keeps raw streams stable over versions (NEP 19),
    permutations not.

    Args:
        skip: of the stream, from which the next n are returned.
    """
    bits = np.random.PCG64(np.random.SeedSequence(entropy))
    return (bits.advance(skip) if skip else bits).random_raw(n)


class Epoch(NamedTuple):
    """The order of an epoch but for the samples within windows: shards shuffled, and where each window ends.

    Attributes:
        shards: int64 [shards], their numbers.
        ends: int64 [windows], the offset in the epoch at which each window of shards ends.
    """

    shards: np.ndarray
    ends: np.ndarray


def order_shards(shard_sizes: np.ndarray, seed: int, epoch: int) -> Epoch:
    """The shards of an epoch in their order, WINDOW_SHARDS to a window."""
    shards = np.argsort(random_bits(len(shard_sizes), seed, epoch, 0), kind="stable")
    sizes = np.add.reduceat(shard_sizes[shards], np.arange(0, len(shards), WINDOW_SHARDS))
    return Epoch(shards, np.cumsum(sizes))


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
        self._shard_starts = np.cumsum(shard_sizes) - shard_sizes
        self._epoch = functools.lru_cache(maxsize=2)(functools.partial(order_shards, shard_sizes, seed))
        self._window = functools.lru_cache(maxsize=4)(self._compute)

    def __reduce__(self):
        return Order, (self.shard_sizes, self.global_batch_size, self.seed)

    def _compute(self, epoch: int, window: int) -> np.ndarray:
        """int64 [n], the sample numbers of one window, shuffled."""
        shards, ends = self._epoch(epoch)
        shards = shards[window * WINDOW_SHARDS : (window + 1) * WINDOW_SHARDS]
        starts = self._shard_starts[shards].tolist()
        samples = np.concatenate(
            [np.arange(start, start + n) for start, n in zip(starts, self.shard_sizes[shards], strict=True)]
        )
        first = int(ends[window]) - len(samples)
        keys = random_bits(len(samples), self.seed, epoch, 1, skip=first)  # a piece of those of the epoch
        return samples[np.argsort(keys, kind="stable")]

    def sample_at(self, position: int) -> int:
        """The sample number at a position of the stream."""
        epoch, offset = divmod(position, self.samples_per_epoch)
        ends = self._epoch(epoch).ends
        window = int(np.searchsorted(ends, offset, side="right"))
        return int(self._window(epoch, window)[offset - int(ends[window])])  # from its end

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """The epoch that each of many positions is in: int64 [n]. In it, a shard is read in one stretch.

        Args:
            positions: int64 [n].
        """
        return positions // self.samples_per_epoch

    def numbers(self, positions: np.ndarray) -> np.ndarray:
        """The sample numbers at many positions of the stream: int64 [n].

        Args:
            positions: int64 [n], in any order.
        """
        numbers = np.empty(len(positions), np.int64)
        epochs, offsets = np.divmod(positions, self.samples_per_epoch)
        for epoch in np.unique(epochs).tolist():
            ends = self._epoch(epoch).ends
            of_epoch = np.flatnonzero(epochs == epoch)
            windows = np.searchsorted(ends, offsets[of_epoch], side="right")
            in_turn = np.argsort(windows, kind="stable")
            starts = np.flatnonzero(np.diff(windows[in_turn], prepend=-1))
            for window, part in zip(windows[in_turn[starts]], np.split(in_turn, starts[1:]), strict=True):
                places = of_epoch[part]
                numbers[places] = self._window(epoch, int(window))[offsets[places] - ends[window]]
        return numbers
