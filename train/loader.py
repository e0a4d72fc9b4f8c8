"""Positions of the stream become batches; position and seed decide everything in them.

rank r of W, step k:  positions k*batch + r*batch/W ...  ->  Order  ->  Shards.read  ->  augment, tokenize
"""

import io
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data_prep.errors import Fault
from data_prep.shards import Shards
from train.order import Order, random_bits
from train.world import World

CAPTION, AUGMENT = 2, 3  # streams of randomness beside the two of train.order


class Batch(NamedTuple):
    images: torch.Tensor  # uint8 [b, 3, H, W]
    tokens: torch.Tensor  # int64 [b, L]


class TrainPairs(Dataset):
    """One augmented picture and one of its captions, by position in the stream."""

    def __init__(self, shards: Shards, order: Order, transform: Callable):
        self.shards, self.order, self.transform = shards, order, transform

    def __getitem__(self, position: int) -> tuple[torch.Tensor, str]:
        sample = self.shards.read(self.order.sample_at(position))
        caption_bits, augment_bits = random_bits(2, self.order.seed, position, CAPTION).tolist()
        caption = sample.captions[caption_bits % len(sample.captions)]
        with torch.random.fork_rng(devices=[]):  # without workers this is the process that also draws dropout
            torch.default_generator.manual_seed(augment_bits)
            return self.transform(decode(sample.image)), caption


class EvalImages(Dataset):
    """The picture of a sample as the model's own preprocessing wants it, by sample number."""

    def __init__(self, shards: Shards, transform: Callable):
        self.shards, self.transform = shards, transform

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.transform(decode(self.shards.read(number).image))


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")).convert("RGB")


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

    def __call__(self, pairs: list[tuple[torch.Tensor, str]]) -> Batch:
        images, captions = zip(*pairs, strict=True)
        return Batch(torch.stack(images), self.tokenize(list(captions)))


def train_loader(pairs: TrainPairs, tokenize: Callable, samples: int, end: int, world: World, workers: int) -> Iterator[Batch]:
    """This rank's share of every global batch from `samples` to `end`, in order; one set of workers for the whole run."""
    return loader(pairs, RankPositions(samples, end, pairs.order.batch, world), workers, world, _Collate(tokenize))


def loader(dataset: Dataset, batches: Iterable[list[int]], workers: int, world: World, collate: Callable = torch.stack) -> Iterator:
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
        raise Fault(f"a shard cannot be read any more ({said}); put it back, and run the same command again") from None


def _quiet_worker(_: int) -> None:
    # A stop is for the main process to decide on; a worker ends when that one does. Forked workers inherit its handlers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
