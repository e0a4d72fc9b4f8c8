"""The order is a function of (seed, samples): every sample once per epoch, for any number of ranks."""

import itertools
import pickle

import numpy as np

from train.data.loader import RankPositions
from train.data.order import Order, epoch_order
from train.world import World

SIZES = np.array([7, 40, 3, 25, 1, 30])


def test_every_sample_once_and_a_new_order_in_each_epoch():
    orders = [epoch_order(SIZES, seed=0, epoch=epoch) for epoch in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(SIZES.sum()))
    assert not np.array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[0], epoch_order(SIZES, seed=0, epoch=0))
    assert not np.array_equal(orders[0], epoch_order(SIZES, seed=1, epoch=0))


def test_shards_are_mixed_within_their_window():
    order = epoch_order(SIZES, seed=3, epoch=2, window=2)
    one_each = epoch_order(np.ones(len(SIZES), int), seed=3, epoch=2, window=1)
    place_of_shard = np.argsort(one_each)
    windows = place_of_shard[np.repeat(np.arange(len(SIZES)), SIZES)[order]] // 2
    np.testing.assert_array_equal(windows, np.sort(windows))
    assert len(set(windows.tolist())) == 3


def test_an_epoch_is_whole_batches():
    order = Order(SIZES, global_batch_size=10, seed=0)
    assert (order.steps_per_epoch, order.samples_per_epoch) == (10, 100)
    first = [order.sample_at(position) for position in range(100)]
    assert len(set(first)) == 100
    np.testing.assert_array_equal(first, epoch_order(SIZES, 0, 0)[:100])
    assert order.sample_at(100) == epoch_order(SIZES, 0, 1)[0]
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
    assert epoch_order(np.array([3, 4]), seed=0, epoch=0).tolist() == [2, 0, 1, 6, 4, 3, 5]
    assert Order(np.array([3, 4]), 2, 0).sample_at(0) == 2
