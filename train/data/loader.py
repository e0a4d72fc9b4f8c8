"""Positions of the sample stream become batches; position and seed decide everything in them.

rank r of W, step k:  positions k*B + r*B/W ...  ->  Order  ->  Shards.read  ->  decode, crop, tokenize
                      (B is global_batch_size)
"""

import contextlib
import hashlib
import multiprocessing.util
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from multiprocessing.queues import Queue
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from data_prep.errors import Fault, UserError
from data_prep.images import DAMAGE
from data_prep.shards import Shards, altered
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

    def shard_of(self, position: int) -> tuple[Shards, dict]:
        return self.shards, self.shards.entry(self.order.sample_at(position))

    def key_at(self, position: int) -> str:
        """The key of the sample at a position of the stream."""
        return self.shards.key(self.order.sample_at(position))


class EvalImages(Dataset):
    """Images by their sample number, preprocessed as the model does it for evaluation."""

    def __init__(self, shards: Shards, transform: Callable):
        self.shards, self.transform = shards, transform

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.transform(decode(self.shards.read(number).image))

    def shard_of(self, number: int) -> tuple[Shards, dict]:
        return self.shards, self.shards.entry(number)


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
        UserError: a shard is damaged, which another attempt would not change.
    """
    if workers:
        _kill_workers_at_exit(os.getpid())
    loaded = DataLoader(
        _Readable(dataset),
        batch_sampler=batches,
        collate_fn=_CollateReadable(collate),
        num_workers=workers,
        pin_memory=has_streams(world.device),
        worker_init_fn=_quiet_worker,
        prefetch_factor=PREFETCH_BATCHES if workers else None,
    )
    with contextlib.closing(_received(loaded)) as received:
        for batch in received:
            if isinstance(batch, UserError):
                raise batch
            yield batch


def _received(loaded: DataLoader) -> Iterator:
    """The batches; a worker that died while it sent one is named as torch names it elsewhere. When this ends,
    by an exception too, so do the workers.
    """
    iterator = iter(loaded)
    workers = getattr(iterator, "_workers", ())
    try:
        yield from iterator
    except (ConnectionError, EOFError) as error:
        for worker in workers:
            worker.join(0.2)  # it closes its socket before it is gone
        ended = [worker for worker in workers if not worker.is_alive()]
        if not ended:
            raise
        names = [signal.strsignal(-worker.exitcode) for worker in ended if worker.exitcode < 0]
        raise RuntimeError(
            f"DataLoader worker (pid {ended[0].pid}) is killed by signal: {(names or ['Unknown'])[0]}. "
        ) from error
    finally:
        if workers:
            iterator._shutdown_workers()


class _Readable(Dataset):
    """Samples, or the UserError that says why one cannot be read: raised in a worker process, an exception
    would arrive with a traceback as its text.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, number: int):
        try:
            return self.dataset[number]
        except OSError as error:
            if error.errno is None and (damage := self._damage(number)):  # Pillow's own
                return UserError(damage)
            return Fault(
                f"a shard can no longer be read ({error}); restore it and run the same command again"
            )
        except (UserError, *DAMAGE, KeyError, TypeError) as error:
            if damage := self._damage(number):
                return UserError(damage)
            if isinstance(error, UserError):
                return error
            raise  # the shard is as it was built: an error of ours

    def _damage(self, number: int) -> str:
        """What is wrong with the shard of a sample; "" if its files have their sha256."""
        if not hasattr(self.dataset, "shard_of"):
            return ""
        shards, entry = self.dataset.shard_of(number)
        return next(altered(shards.folder, entry), "")


class _CollateReadable:
    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, samples: list):
        error = next((sample for sample in samples if isinstance(sample, UserError)), None)
        return error or self.collate(samples)


@lru_cache
def _kill_workers_at_exit(_process: int) -> None:
    """multiprocessing ends workers that are left at exit by SIGTERM, which they ignore, and waits for them.

    Not by atexit, which a child of multiprocessing does not run.
    """
    multiprocessing.util.Finalize(None, _kill_workers, exitpriority=0)


def _kill_workers() -> None:
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise that a worker was killed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _quiet_worker(_: int) -> None:
    # Stop requests are for the main process, but torchrun, srun, timeout and terminals send them to the whole
    # process group. A worker ends with the loader, at exit, or by itself when the main process is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    Queue._on_queue_feeder_error = staticmethod(_end_of_worker)


def _end_of_worker(error: Exception, _: object) -> None:
    """A batch cannot be sent, for lack of room in /dev/shm: end, where Python prints it and the main process
    waits for ever. By the signal of a write beyond that room, which end_of_reader() knows.
    """
    if isinstance(error, (RuntimeError, OSError)):
        os.kill(os.getpid(), signal.SIGBUS)
        time.sleep(60)  # another thread may have to handle the signal
    traceback.print_exception(error)
