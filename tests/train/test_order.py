"""The order is a function of (seed, samples): every sample once per epoch, for any number of ranks."""

import itertools
import pickle

import numpy as np
import pytest

from train.data.loader import RankPositions
from train.data.order import WINDOW_SHARDS, Order, order_shards, random_bits
from train.world import World

SIZES = np.array([7, 40, 3, 25, 1, 30])
MANY = np.random.default_rng(0).integers(0, 9, 50)  # of four windows; some shards are empty


def whole_order(shard_sizes: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """An epoch at once: shards shuffled, then samples within windows of shards."""
    shards = np.argsort(random_bits(len(shard_sizes), seed, epoch, 0), kind="stable")
    ends = np.cumsum(shard_sizes)
    keys, order = random_bits(int(ends[-1]), seed, epoch, 1), []
    for first in range(0, len(shards), WINDOW_SHARDS):
        in_window = shards[first : first + WINDOW_SHARDS]
        samples = np.concatenate(
            [np.arange(ends[shard] - shard_sizes[shard], ends[shard]) for shard in in_window]
        )
        window_keys, keys = keys[: len(samples)], keys[len(samples) :]
        order.append(samples[np.argsort(window_keys, kind="stable")])
    return np.concatenate(order)


@pytest.mark.parametrize(
    "sizes", [SIZES, MANY, np.array([5]), np.repeat(1, 16), np.repeat(1, 17), np.array([0] * 20 + [9])]
)
def test_windows_one_by_one_are_the_epoch_at_once(sizes):
    order, n = Order(sizes, 1, seed=3), int(sizes.sum())
    expected = np.concatenate([whole_order(sizes, 3, epoch) for epoch in range(3)])
    np.testing.assert_array_equal(order.numbers(np.arange(3 * n)), expected)
    assert [order.sample_at(position) for position in range(3 * n)] == expected.tolist()
    places = np.random.default_rng(1).integers(0, 3 * n, 200)  # in no order, and some more than once
    np.testing.assert_array_equal(order.numbers(places), expected[places])
    assert len(order.numbers(places[:0])) == 0


def test_every_sample_once_and_a_new_order_in_each_epoch():
    n = SIZES.sum()
    orders = Order(SIZES, 1, seed=0).numbers(np.arange(3 * n)).reshape(3, n)
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(n))
    assert not np.array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[0], Order(SIZES, 1, seed=0).numbers(np.arange(n)))
    assert not np.array_equal(orders[0], Order(SIZES, 1, seed=1).numbers(np.arange(n)))


def test_shards_are_mixed_within_their_window():
    order = Order(MANY, 1, seed=3).numbers(np.arange(MANY.sum()))
    place_of_shard = np.argsort(order_shards(MANY, 3, 0).shards)
    windows = place_of_shard[np.repeat(np.arange(len(MANY)), MANY)[order]] // WINDOW_SHARDS
    np.testing.assert_array_equal(windows, np.sort(windows))
    assert len(set(windows.tolist())) == 4


def test_an_epoch_is_whole_batches():
    order = Order(SIZES, global_batch_size=10, seed=0)
    assert (order.steps_per_epoch, order.samples_per_epoch) == (10, 100)
    first = [order.sample_at(position) for position in range(100)]
    assert len(set(first)) == 100
    np.testing.assert_array_equal(first, whole_order(SIZES, 0, 0)[:100])
    assert order.sample_at(100) == whole_order(SIZES, 0, 1)[0]
    again = pickle.loads(pickle.dumps(order))  # as a loader worker gets it
    assert [again.sample_at(position) for position in range(100)] == first


def test_any_number_of_ranks_reads_the_same_global_batches_from_any_start():
    whole = list(RankPositions(0, 60, global_batch_size=12, world=World()))
    for world_size in (1, 2, 3, 4, 6):
        for start in (0, 24):
            ranks = [
                list(RankPositions(start, 60, global_batch_size=12, world=World(rank, world_size)))
                for rank in range(world_size)
            ]
            joined = [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
            assert joined == whole[start // 12 :]


def test_the_order_is_fixed():
    """A stored run resumes in it, so a change here is a change of the format."""
    order = Order(np.array([3, 4]), 1, seed=0)
    assert order.numbers(np.arange(7)).tolist() == [2, 0, 1, 6, 4, 3, 5]
    assert Order(np.array([3, 4]), 2, 0).sample_at(0) == 2
