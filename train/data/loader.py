"""Positions of the sample stream become batches; position and seed decide everything in them.

rank r of W, step k:  positions k*B + r*B/W ...  ->  Order  ->  Shards.read  ->  decode, crop, tokenize
                      (B is global_batch_size)
"""

import hashlib
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from data_prep.errors import Fault
from data_prep.shards import Shards
from train.data.augment import N_UNIFORMS, Augmentation, crop
from train.data.captions import caption
from train.data.decode import decode
from train.data.order import Order, random_bits
from train.device import has_streams
from train.recipe import Augment, Captions
from train.world import World

SAMPLE = 2  # a stream of random bits beside the two of train.data.order
PREFETCH_BATCHES = 4  # per worker


class Batch(NamedTuple):
    """One rank's pairs of a step.

    Attributes:
        images: uint8 [b, 3, H, W], cropped.
        tokens: int64 [b, L].
        augment_rows: fp32 [b, n], drawn by Augmentation.draw; applied to the images in the step.
        patch_seeds: int64 [b], one per sample, from which patch dropout draws its mask.
        ids: int64 [b, 2], group and caption id; pairs that share one of them are positives if same_group says
            so.
    """

    images: torch.Tensor
    tokens: torch.Tensor
    augment_rows: torch.Tensor
    patch_seeds: torch.Tensor
    ids: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def split(self, n: int) -> list["Batch"]:
        """Chunks of n pairs; the last one has what is left."""
        return [Batch(*chunk) for chunk in zip(*(tensor.split(n) for tensor in self), strict=True)]


class Pair(NamedTuple):
    """One sample of the stream, before it is collated into a Batch."""

    image: torch.Tensor  # uint8 [H, W, 3]
    caption: str
    augment_row: list[float]
    patch_seed: int
    group: int


class TrainPairs(Dataset):
    """Pairs by their position in the stream."""

    def __init__(
        self, shards: Shards, order: Order, size: tuple[int, int], augment: Augment, captions: Captions
    ):
        self.shards, self.order, self.size, self.captions = shards, order, size, captions
        self.augmentation = Augmentation(augment)

    def __getitem__(self, position: int) -> Pair:
        number = self.order.sample_at(position)
        sample = self.shards.read(number)
        bits = random_bits(1 + N_UNIFORMS, self.order.seed, position, SAMPLE)
        uniforms = ((bits[1:] >> 11) * 2.0**-53).tolist()
        return Pair(
            crop(sample.image, self.size, self.augmentation.augment, uniforms),
            caption(sample.captions, self.captions, int(bits[0])),
            self.augmentation.draw(uniforms),
            int(bits[0]) >> 1,  # the caption's bits too; PatchDropout hashes them, so the two are independent
            int(self.shards.groups[number]),
        )

    def key_at(self, position: int) -> str:
        """The key of the sample at a position of the stream."""
        return self.shards.key(self.order.sample_at(position))


class EvalImages(Dataset):
    """Images by their sample number, preprocessed as the model does it for evaluation."""

    def __init__(self, shards: Shards, transform: Callable):
        self.shards, self.transform = shards, transform

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.transform(decode(self.shards.read(number).image))


class RankPositions:
    """For each step from `samples` to `end`, the positions of the global batch that this rank reads."""

    def __init__(self, samples: int, end: int, global_batch_size: int, world: World):
        assert global_batch_size % world.world_size == 0, (global_batch_size, world.world_size)
        self.share = global_batch_size // world.world_size
        self.starts = range(samples + world.rank * self.share, end, global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(start, start + self.share)) for start in self.starts)


class _Collate:
    def __init__(self, tokenize: Callable):
        self.tokenize = tokenize

    def __call__(self, pairs: list[Pair]) -> Batch:
        images, captions, augment_rows, patch_seeds, groups = zip(*pairs, strict=True)
        ids = torch.tensor([groups, [caption_id(caption) for caption in captions]]).T.contiguous()
        return Batch(
            # made contiguous on the device, which is faster
            default_collate(list(images)).permute(0, 3, 1, 2),
            self.tokenize(list(captions)),
            torch.tensor(augment_rows, dtype=torch.float32),
            torch.tensor(patch_seeds),
            ids,
        )


def caption_id(caption: str) -> int:
    """63 bits that identify a caption, without regard to case and spaces; the same in any process."""
    digest = hashlib.blake2b(" ".join(caption.casefold().split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def train_loader(
    pairs: TrainPairs, tokenize: Callable, samples: int, end: int, world: World, workers: int
) -> Iterator[Batch]:
    """This rank's share of every global batch from `samples` to `end`, in order; one set of workers for the
    run.
    """
    positions = RankPositions(samples, end, pairs.order.global_batch_size, world)
    return loader(pairs, positions, workers, world, _Collate(tokenize))


def loader(
    dataset: Dataset,
    batches: Iterable[list[int]],
    workers: int,
    world: World,
    collate: Callable = torch.stack,
) -> Iterator:
    """The collated samples of each batch of numbers, in order.

    Raises:
        Fault: a shard can no longer be read.
    """
    loaded = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=has_streams(world.device),
        worker_init_fn=_quiet_worker,
        prefetch_factor=PREFETCH_BATCHES if workers else None,
    )
    try:
        yield from loaded
    except OSError as error:  # a worker's error comes with a traceback as its text
        reason = str(error).strip().splitlines()[-1]
        raise Fault(
            f"a shard can no longer be read ({reason}); restore it and run the same command again"
        ) from None


def _quiet_worker(_: int) -> None:
    # Stop requests are for the main process, but torchrun, srun, timeout and terminals send them to the whole
    # process group. A worker ends with the loader, or by itself when the main process is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
