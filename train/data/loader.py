"""Positions of the stream become batches; position and seed decide everything in them.

rank r of W, step k:  positions k*batch + r*batch/W ...  ->  Order  ->  Shards.read  ->  decode, crop, tokenize
"""

import hashlib
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from data_prep.errors import Fault
from data_prep.shards import Shards
from train.data.augment import CROP_DRAWS, DRAWS, crop, draw_changes
from train.data.captions import caption
from train.data.decode import decode
from train.data.order import Order, random_bits
from train.recipe import Augment, Captions
from train.world import World

SAMPLE = 2  # a stream of randomness beside the two of train.data.order


class Batch(NamedTuple):
    images: torch.Tensor  # uint8 [b, 3, H, W], cropped
    tokens: torch.Tensor  # int64 [b, L]
    changes: (
        torch.Tensor
    )  # fp32 [b, n], what the device does to each picture; see train.data.augment.draw_changes
    ids: (
        torch.Tensor
    )  # int64 [b, 2], group and caption_number: pairs that share one are mates, see train.loss


class TrainPairs(Dataset):
    """A cropped picture, one of its captions, what is still to be done to it, and its group, by position in
    the stream.
    """

    def __init__(
        self, shards: Shards, order: Order, size: tuple[int, int], augment: Augment, captions: Captions
    ):
        self.shards, self.order, self.size, self.augment, self.captions = (
            shards,
            order,
            size,
            augment,
            captions,
        )

    def __getitem__(self, position: int) -> tuple[torch.Tensor, str, list[float], int]:
        number = self.order.sample_at(position)
        sample = self.shards.read(number)
        bits = random_bits(1 + DRAWS, self.order.seed, position, SAMPLE)
        uniforms = ((bits[1:] >> 11) * 2.0**-53).tolist()
        image = crop(sample.image, self.size, self.augment, uniforms)
        text = caption(sample.captions, self.captions, int(bits[0]))
        return image, text, draw_changes(self.augment, uniforms[CROP_DRAWS:]), int(self.shards.groups[number])


class EvalImages(Dataset):
    """The picture of a sample as the model's own preprocessing wants it, by sample number."""

    def __init__(self, shards: Shards, transform: Callable):
        self.shards, self.transform = shards, transform

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.transform(decode(self.shards.read(number).image))


class RankPositions:
    """For each step from `samples` to `end`, the positions that this rank reads of the global batch."""

    def __init__(self, samples: int, end: int, batch: int, world: World):
        assert batch % world.world_size == 0, (batch, world.world_size)
        self.share = batch // world.world_size
        self.starts = range(samples + world.rank * self.share, end, batch)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(start, start + self.share)) for start in self.starts)


class _Collate:
    def __init__(self, tokenize: Callable):
        self.tokenize = tokenize

    def __call__(self, pairs: list[tuple[torch.Tensor, str, list[float], int]]) -> Batch:
        pictures, captions, changes, groups = zip(*pairs, strict=True)
        images = default_collate(list(pictures)).permute(
            0, 3, 1, 2
        )  # the device puts channels first; here it would cost more
        ids = torch.tensor([groups, [caption_number(caption) for caption in captions]]).T.contiguous()
        return Batch(images, self.tokenize(list(captions)), torch.tensor(changes, dtype=torch.float32), ids)


def caption_number(caption: str) -> int:
    """63 bits that stand for a caption, whatever its case and spaces, in any process and version."""
    digest = hashlib.blake2b(" ".join(caption.casefold().split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def train_loader(
    pairs: TrainPairs, tokenize: Callable, samples: int, end: int, world: World, workers: int
) -> Iterator[Batch]:
    """This rank's share of every global batch from `samples` to `end`, in order; one set of workers for the
    whole run.
    """
    return loader(
        pairs, RankPositions(samples, end, pairs.order.batch, world), workers, world, _Collate(tokenize)
    )


def loader(
    dataset: Dataset,
    batches: Iterable[list[int]],
    workers: int,
    world: World,
    collate: Callable = torch.stack,
) -> Iterator:
    """The collated samples of each batch of numbers, in order.

    Raises:
        Fault: a shard cannot be read any more.
    """
    loaded = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=_quiet_worker,
        prefetch_factor=4 if workers else None,
    )
    try:
        yield from loaded
    except OSError as error:  # of a worker it comes with a traceback as its text
        said = str(error).strip().splitlines()[-1]
        raise Fault(
            f"a shard cannot be read any more ({said}); put it back, and run the same command again"
        ) from None


def _quiet_worker(_: int) -> None:
    # A stop is for the main process to decide on; a worker ends when that one does. Forked workers inherit
    # its handlers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
