"""Several data sets in one run: one numbering of their samples, and an order that gives each its share of
every batch.

    batch k   [icons general icons icons general ...]   which set has which place is the same in every batch
              the sample is the next one of the set's own Order, with its own epochs
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np

from data_prep.errors import UserError
from data_prep.shards import Joined, Sample, Shards
from data_prep.tables import are, counted
from train.data.order import Order, part_of_groups, random_bits
from train.data.shares import pairs_of, shares_of
from train.recipe import Recipe

SET = 5  # a stream of random bits beside those of train.data.order, train.data.loader and train.step


class DataSets(Joined):
    """The training pairs of several folders of shards, as Shards gives those of one.

    Attributes:
        groups: int64 [n]; groups of different sets have different numbers.
        fingerprint: those of the sets, with spaces between them.
        folder: the folders of the sets, for messages.
        shard_sizes, weight_range: as of Shards, over all sets.
    """

    def __init__(self, parts: list[Shards]):
        super().__init__(parts)
        numbered = [np.unique(part.groups, return_inverse=True)[1] for part in parts]
        starts = np.cumsum([0, *(int(numbers.max()) + 1 for numbers in numbered)])
        self.groups = np.concatenate(
            [numbers + start for numbers, start in zip(numbered, starts[:-1], strict=True)]
        )
        self.shard_sizes = np.concatenate([part.shard_sizes for part in parts])
        self.fingerprint = " ".join(part.fingerprint for part in parts)
        self.folder, self.split = ", ".join(str(part.folder) for part in parts), parts[0].split
        least, largest = zip(*(part.weight_range for part in parts), strict=True)
        self.weight_range = min(least), max(largest)

    @property
    def background(self) -> str:
        """That of the first set, which the model is validated on."""
        return self.parts[0].background

    def read(self, number: int) -> Sample:
        shards, number = self.locate(number)
        return shards.read(number)

    def key(self, number: int) -> str:
        shards, number = self.locate(number)
        return shards.key(number)

    def naming(self, number: int) -> AbstractContextManager[None]:
        shards, number = self.locate(number)
        return shards.naming(number)

    def verify(self, part: int = 0, parts: int = 1) -> None:
        for shards in self.parts:
            shards.verify(part, parts)


class MixedOrder(Order):
    """The stream of training pairs of several sets; see Order. An epoch is one of the first set.

    Args:
        sizes: of each set, samples in each of its shards.
        pairs: of each set, in every batch.
    """

    def __init__(self, sizes: Sequence[np.ndarray], pairs: Sequence[int], seed: int):
        # The first set's seed is the run's: alone it would have the same order.
        seeds = [seed, *(int(random_bits(1, seed, number, SET)[0]) for number in range(1, len(sizes)))]
        self._arguments = sizes, pairs, seed
        self.orders = [Order(*each) for each in zip(sizes, pairs, seeds, strict=True)]
        self.global_batch_size, self.seed = sum(pairs), seed
        self.n_samples = sum(order.n_samples for order in self.orders)
        self.steps_per_epoch = self.orders[0].steps_per_epoch
        self.samples_per_epoch = self.steps_per_epoch * self.global_batch_size
        self._starts = np.cumsum([0, *(order.n_samples for order in self.orders)])
        # Evenly spread, so that every rank and micro batch has about its share of each set.
        spread = np.concatenate([(np.arange(n) + 0.5) / n for n in pairs])
        in_turn = np.argsort(spread, kind="stable")
        self._set_at = np.repeat(np.arange(len(pairs)), pairs)[in_turn]
        self._offset_at = np.concatenate([np.arange(n) for n in pairs])[in_turn]

    def __reduce__(self):
        return MixedOrder, self._arguments

    def sample_at(self, position: int) -> int:
        batch, place = divmod(position, self.global_batch_size)
        number = self._set_at[place]
        order = self.orders[number]
        offset = int(self._offset_at[place])
        return int(self._starts[number]) + order.sample_at(batch * order.global_batch_size + offset)

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """Each set has its own."""
        epochs = np.empty(len(positions), np.int64)
        for _, order, here, own in self._of_sets(positions):
            epochs[here] = order.epochs(own)
        return epochs

    def numbers(self, positions: np.ndarray) -> np.ndarray:
        numbers = np.empty(len(positions), np.int64)
        for number, order, here, own in self._of_sets(positions):
            numbers[here] = self._starts[number] + order.numbers(own)
        return numbers

    def _of_sets(self, positions: np.ndarray) -> Iterator[tuple[int, Order, np.ndarray, np.ndarray]]:
        """Each set's number and order, which of the positions it has, and their positions in its order."""
        batches, places = np.divmod(positions, self.global_batch_size)
        sets = self._set_at[places]
        for number, order in enumerate(self.orders):
            here = np.flatnonzero(sets == number)
            yield number, order, here, batches[here] * order.global_batch_size + self._offset_at[places[here]]


def open_pairs(recipe: Recipe) -> Shards | DataSets:
    """The training pairs of a recipe.

    Raises:
        UserError: a folder is none of shards, or has fewer pairs than each batch takes from it.
    """
    pairs = pairs_of(recipe.data, recipe.global_batch_size)
    parts = [train_split(recipe, folder) for folder in pairs]
    if len(parts) == 1:
        return parts[0]
    for shards, (folder, n) in zip(parts, pairs.items(), strict=True):
        if not n:
            raise UserError(
                f"{folder}: its share of {shares_of(recipe.data)[folder]:g} is none of the"
                f" {recipe.global_batch_size} pairs of a batch; pass a larger share or --global-batch-size"
            )
        if n > len(shards):
            raise UserError(
                f"{folder}: {counted(len(shards), 'training image')} are fewer than the {n} that each batch"
                " takes of them; pass a smaller share or --global-batch-size"
            )
    return DataSets(parts)


def train_split(recipe: Recipe, folder: str) -> Shards:
    """The training pairs of one folder, of the fraction of its groups that the recipe uses."""
    pairs = Shards(folder, "train")
    if recipe.groups_fraction == 1:
        return pairs
    return pairs.only(part_of_groups(pairs.groups, recipe.groups_fraction, recipe.seed))


def check_val(pairs: Shards | DataSets) -> None:
    """Check that validation asks for nothing that is trained on; of several sets, the first is validated.

    Raises:
        UserError: a group of images is in train and in val.
    """
    first = pairs if isinstance(pairs, Shards) else pairs.parts[0]
    if not first.manifest["splits"].get("val", {}).get("samples"):
        return
    in_val = np.isin(first.groups, Shards(first.folder, "val").groups)
    if shared := len(np.unique(first.groups[in_val])):
        raise UserError(
            f"{first.folder}: {counted(shared, 'group')} {are(shared)} in train and in val, which inflates"
            " validation; build the shards again"
        )


def order_of(recipe: Recipe, pairs: Shards | DataSets) -> Order:
    """The order in which a run sees `pairs`."""
    if isinstance(pairs, Shards):
        return Order(pairs.shard_sizes, recipe.global_batch_size, recipe.seed)
    sizes = [part.shard_sizes for part in pairs.parts]
    return MixedOrder(sizes, [*pairs_of(recipe.data, recipe.global_batch_size).values()], recipe.seed)


def described(recipe: Recipe, order: Order, steps: int) -> Iterator[str]:
    """A line on each of several sets: its pairs of a batch, its share where that is rounded, its epochs.

    Args:
        steps: of the run.
    """
    if not isinstance(order, MixedOrder):
        return
    for (folder, share), part in zip(shares_of(recipe.data).items(), order.orders, strict=True):
        n, whole = part.global_batch_size, recipe.global_batch_size
        rounded = f" (a share of {n / whole:.3g}, not {share:g})" if abs(n - share * whole) > 1e-3 else ""
        yield (
            f"{folder}: {n} of {whole} pairs of each batch{rounded}, {steps / part.steps_per_epoch:.1f}"
            f" epochs of {counted(part.n_samples, 'image')}"
        )
