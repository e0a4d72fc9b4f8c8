"""The order is a function of (seed, samples): every sample once, the same for every world."""

import itertools
import pickle

import numpy as np

from train.data.loader import RankPositions
from train.data.order import WINDOW_SHARDS, Order, epoch_order
from train.world import World

SIZES = np.array([7, 40, 3, 25, 1, 30])


def test_every_sample_once_and_another_order_every_epoch():
    orders = [epoch_order(SIZES, seed=0, epoch=epoch) for epoch in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(SIZES.sum()))
    assert not np.array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[0], epoch_order(SIZES, seed=0, epoch=0))
    assert not np.array_equal(orders[0], epoch_order(SIZES, seed=1, epoch=0))


def test_shards_mix_within_their_window_alone():
    order = epoch_order(SIZES, seed=3, epoch=2, window=2)
    shards = np.argsort(
        epoch_order(np.ones(len(SIZES), int), seed=3, epoch=2, window=1)
    )  # place of each shard
    windows = shards[np.repeat(np.arange(len(SIZES)), SIZES)[order]] // 2
    np.testing.assert_array_equal(windows, np.sort(windows))
    assert len(set(windows.tolist())) == 3


def meetings(order: np.ndarray, groups: np.ndarray, batch: int) -> int:
    """Pairs of one group in one batch."""
    of_batch = groups[order[: len(order) // batch * batch]].reshape(-1, batch)
    return int(((of_batch[:, :, None] == of_batch[:, None, :]).sum() - of_batch.size) // 2)


def test_members_of_a_group_are_spread_over_their_window():
    sizes = np.full(WINDOW_SHARDS + 4, 150)  # two windows, of 2400 and of 600
    groups = np.random.default_rng(0).permutation(np.arange(sizes.sum()) // 6)
    met = np.zeros((2, 3), int)
    for epoch in range(3):
        random, spread = (epoch_order(sizes, 0, epoch, given) for given in (None, groups))
        np.testing.assert_array_equal(np.sort(spread), np.arange(sizes.sum()))
        np.testing.assert_array_equal(spread, epoch_order(sizes, 0, epoch, groups))
        assert set(spread[:2400] // 150) == set(
            random[:2400] // 150
        )  # a window is of the same shards as ever
        met[:, epoch] = meetings(random, groups, 32), meetings(spread, groups, 32)
    assert met[0].min() > 50
    assert met[1].max() <= met[0].min() / 5, met
    assert not np.array_equal(spread, epoch_order(sizes, 0, 1, groups))


def test_where_all_are_alone_spreading_changes_nothing():
    alone = np.random.default_rng(1).permutation(SIZES.sum())
    np.testing.assert_array_equal(epoch_order(SIZES, 5, 1, alone), epoch_order(SIZES, 5, 1))


def test_places_of_a_group_are_uniform_and_equally_far():
    """One window: of 40 groups of 5, any is as likely to stand first, and each fifth of the epoch has one of
    each group.
    """
    groups = np.tile(np.arange(40), 5)
    orders = [epoch_order(np.array([200]), seed, 0, groups) for seed in range(200)]
    first = np.bincount([order[0] % 40 for order in orders], minlength=40)
    assert first.max() <= 16  # 5 on average
    members = np.bincount([order[0] // 40 for order in orders], minlength=5)
    assert members.min() >= 20  # 40 on average
    at = np.argsort(orders[0])[np.arange(200).reshape(5, 40)]
    gaps = np.diff(np.sort(at, axis=0), axis=0)
    assert gaps.min() == gaps.max() == 40


def test_an_epoch_is_whole_batches():
    order = Order(SIZES, global_batch_size=10, seed=0)
    assert (order.steps_per_epoch, order.samples_per_epoch) == (10, 100)
    first = [order.sample_at(position) for position in range(100)]
    assert len(set(first)) == 100
    np.testing.assert_array_equal(first, epoch_order(SIZES, 0, 0)[:100])
    assert order.sample_at(100) == epoch_order(SIZES, 0, 1)[0]
    spread = Order(SIZES, global_batch_size=10, seed=0, groups=np.arange(SIZES.sum()) // 4)
    for each in (order, spread):
        again = pickle.loads(pickle.dumps(each))
        assert [again.sample_at(position) for position in range(200)] == [
            each.sample_at(position) for position in range(200)
        ]
    assert [spread.sample_at(position) for position in range(100)] != first


def test_any_world_reads_the_same_global_batches_from_any_start():
    whole = list(RankPositions(0, 60, global_batch_size=12, world=World()))
    for world_size in (1, 2, 3, 4, 6):
        for start in (0, 24):
            ranks = [
                list(RankPositions(start, 60, global_batch_size=12, world=World(rank, world_size)))
                for rank in range(world_size)
            ]
            joined = [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
            assert joined == whole[start // 12 :]


def test_the_order_is_the_same_in_every_version_of_the_libraries():
    """Stored runs resume in it: a change here is a change of the format."""
    assert epoch_order(np.array([3, 4]), seed=0, epoch=0).tolist() == EXPECTED
    assert Order(np.array([3, 4]), 2, 0).sample_at(0) == EXPECTED[0]


EXPECTED = [2, 0, 1, 6, 4, 3, 5]
