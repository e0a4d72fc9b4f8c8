"""Positions of the sample stream become batches; position and seed decide everything in them.

rank r of W, step k:  positions k*B + r*B/W ...  ->  Order  ->  Shards.read  ->  decode, crop, tokenize
                      (B is global_batch_size)
"""

import contextlib
import gc
import hashlib
import math
import multiprocessing.util
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, repeat
from multiprocessing.queues import Queue
from typing import NamedTuple

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from data_prep.child import exit_with_parent
from data_prep.cores import local_rank, ranks_here
from data_prep.errors import Fault, UserError
from data_prep.shards import Damaged, Sample, Shards
from data_prep.terminal import say
from train.data.ahead import Chunk, ahead
from train.data.augment import N_UNIFORMS, Augmentation, crop
from train.data.captions import caption, draw
from train.data.decode import decode
from train.data.order import Order, random_bits
from train.device import has_streams
from train.recipe import Augment, Captions
from train.world import World

SAMPLE = 2  # a stream of random bits beside the two of train.data.order
PLANNED = 1 << 20  # positions that are looked up at once, for what they will read
PREFETCH_BATCHES = 4  # per worker, at most
SHARED_MEMORY = "/dev/shm"
SHARED_PART = 0.5  # of what is free: replay, and validation during training, have loaders of their own
BYTES_BESIDE_AN_IMAGE = 2048  # of a pair, at most: tokens, augmentation, ids
MAX_REPLACEMENTS = 100  # of a damaged sample, if these are damaged too
BYTES_OF_A_WORKER, BYTES_OF_PAGES = 1 << 17, 1 << 15  # its queues; each tensor of a batch takes whole pages


class Batch(NamedTuple):
    """One rank's pairs of a step.

    Attributes:
        images: uint8 [b, 3, H, W], cropped.
        tokens: int64 [b, L].
        augment_rows: fp32 [b, n], drawn by Augmentation.draw; applied to the images in the step.
        patch_seeds: int64 [b], one per sample, from which patch dropout draws its mask.
        ids: int64 [b, 2], group and caption id; pairs that share one of them are positives if same_group says
            so.
        weights: fp32 [b], of the pairs in the loss, relative to the largest of all; None if all are equal.
    """

    images: torch.Tensor
    tokens: torch.Tensor
    augment_rows: torch.Tensor
    patch_seeds: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(each if each is None else each.to(device, non_blocking=True) for each in self))

    def split(self, n: int) -> list["Batch"]:
        """Chunks of n pairs; the last one has what is left."""
        chunks = zip(*(repeat(None) if each is None else each.split(n) for each in self), strict=False)
        return [Batch(*chunk) for chunk in chunks]


class Skipped(NamedTuple):
    """A damaged sample, in whose place another was read."""

    shard: str  # the file
    key: str
    found: str  # what is wrong


class Pair(NamedTuple):
    """One sample of the stream, before it is collated into a Batch."""

    image: torch.Tensor  # uint8 [H, W, 3]
    caption: str
    augment_row: list[float]
    patch_seed: int
    group: int
    weight: float | None  # None if all are equal
    skipped: tuple[Skipped, ...]  # damaged samples, in whose place it is


class TrainPairs(Dataset):
    """Pairs by their position in the stream.

    Args:
        skip_damaged: another sample takes the place of a damaged one.
    """

    def __init__(
        self,
        shards: Shards,
        order: Order,
        size: tuple[int, int],
        augment: Augment,
        captions: Captions,
        skip_damaged: bool = False,
    ):
        self.shards, self.order, self.size, self.captions = shards, order, size, captions
        self.skip_damaged = skip_damaged
        self.augmentation = Augmentation(augment)
        least, self.largest_weight = shards.weight_range
        self.is_weighted = least < self.largest_weight

    def __getitem__(self, position: int) -> Pair:
        number, sample, skipped = self._read(position)
        bits = random_bits(1 + N_UNIFORMS, self.order.seed, position, SAMPLE)
        uniforms = ((bits[1:] >> 11) * 2.0**-53).tolist()
        with self.shards.naming(number):
            image = crop(sample.image, self.size, self.augmentation.augment, uniforms)
        drawn = draw(len(sample.captions), self.captions, int(bits[0]))
        return Pair(
            image,
            caption(sample.captions[drawn], self.captions, int(bits[0])),
            self.augmentation.draw(uniforms),
            int(bits[0]) >> 1,  # the caption's bits too; PatchDropout hashes them, so the two are independent
            int(self.shards.groups[number]),
            sample.weights[drawn] / self.largest_weight if self.is_weighted else None,
            skipped,
        )

    def _read(self, position: int) -> tuple[int, Sample, tuple[Skipped, ...]]:
        """The sample at a position of the stream: its number, what it is, and those that were skipped for it.

        In the place of a damaged one comes the sample in the same place of the next batch, or of the one
        after it: within an epoch no batch gets a pair twice, and each of several sets keeps its share.
        """
        skipped = []
        for number in self._candidates(position):
            try:
                return number, self.shards.read(number), tuple(skipped)
            except Damaged as error:
                if not self.skip_damaged:
                    raise UserError(f"{error}, or train without such samples: --on-damage skip") from None
                skipped.append(Skipped(str(error.file), self.shards.key(number), error.found))
        raise UserError(
            f"{skipped[0].shard}: sample {skipped[0].key}: {skipped[0].found}, and so are the"
            f" {len(skipped) - 1} samples in its place; restore the shards or build them again"
        )

    def _candidates(self, position: int) -> Iterator[int]:
        """The number of the sample at a position, then of those that may replace it."""
        size = self.order.global_batch_size
        return map(self.order.sample_at, range(position, position + (1 + MAX_REPLACEMENTS) * size, size))

    def key_at(self, position: int, damaged: set[str]) -> str:
        """The key of the sample that was read at a position of the stream.

        Args:
            damaged: keys of those that were skipped.
        """
        return next(key for key in map(self.shards.key, self._candidates(position)) if key not in damaged)


class EvalImages(Dataset):
    """Images by their sample number, preprocessed as the model does it for evaluation."""

    def __init__(self, shards: Shards, transform: Callable):
        self.shards, self.transform = shards, transform

    def __getitem__(self, number: int) -> torch.Tensor:
        with self.shards.naming(number):
            image = decode(self.shards.read(number).image)
        return self.transform(image)


class RankPositions:
    """For each step from `samples` to `end`, the positions of the global batch that this rank reads."""

    def __init__(self, samples: int, end: int, global_batch_size: int, world: World):
        assert global_batch_size % world.world_size == 0, (global_batch_size, world.world_size)
        self.share = global_batch_size // world.world_size
        self.starts = range(samples + world.rank * self.share, end, global_batch_size)

        # of the ranks of this node, which are numbered in a row
        first = samples + (world.rank - local_rank()) * self.share
        self.of_node = first, self.share * ranks_here()

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(start, start + self.share)) for start in self.starts)

    def chunks_of_node(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The positions that the ranks of this node read, int64 [n], and the number of the batch of each."""
        start, share = self.of_node
        at_once = max(1, PLANNED // share)
        for first in range(0, len(self.starts), at_once):
            batches = np.arange(first, min(first + at_once, len(self.starts)))
            positions = start + (batches * self.starts.step)[:, None] + np.arange(share)
            yield positions.ravel(), np.repeat(batches, share)


class _Collate:
    def __init__(self, tokenize: Callable):
        self.tokenize = tokenize

    def __call__(self, pairs: list[Pair]) -> tuple[Batch, list[Skipped]]:
        images, captions, augment_rows, patch_seeds, groups, weights, skipped = zip(*pairs, strict=True)
        ids = torch.tensor([groups, [caption_id(caption) for caption in captions]]).T.contiguous()
        batch = Batch(
            # made contiguous on the device, which is faster
            default_collate(list(images)).permute(0, 3, 1, 2),
            self.tokenize(list(captions)),
            torch.tensor(augment_rows, dtype=torch.float32),
            torch.tensor(patch_seeds),
            ids,
            None if None in weights else torch.tensor(weights, dtype=torch.float32),
        )
        return batch, list(chain(*skipped))


def caption_id(caption: str) -> int:
    """63 bits that identify a caption, without regard to case and spaces; the same in any process."""
    digest = hashlib.blake2b(" ".join(caption.casefold().split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def train_loader(
    pairs: TrainPairs,
    tokenize: Callable,
    samples: int,
    end: int,
    world: World,
    workers: int,
    skipped: list[Skipped] | None = None,
) -> Iterator[Batch]:
    """This rank's share of every global batch from `samples` to `end`, in order; one set of workers for the
    run.

    Args:
        skipped: with each batch, the damaged samples that were skipped for it are added here.
    """
    skipped = [] if skipped is None else skipped
    positions = RankPositions(samples, end, pairs.order.global_batch_size, world)
    batch_bytes = positions.share * (3 * math.prod(pairs.size) + BYTES_BESIDE_AN_IMAGE)
    loaded = loader(pairs, positions, workers, world, _Collate(tokenize), batch_bytes)
    with contextlib.closing(loaded) as batches:
        for batch, of_batch in batches:
            skipped += of_batch
            yield batch


def loader(
    dataset: Dataset,
    batches: Iterable[list[int]],
    workers: int,
    world: World,
    collate: Callable = torch.stack,
    batch_bytes: int = 0,
) -> Iterator:
    """The collated samples of each batch of numbers, in order.

    Args:
        batch_bytes: of a batch; so many are read ahead as shared memory has room for.

    Raises:
        Fault: a shard can no longer be read.
        UserError: a shard is damaged, which another attempt would not change.
    """
    fetched = ahead(getattr(dataset, "shards", None), _Chunks(dataset, batches), *_turns(batches))
    if isinstance(batches, Sequence):
        workers = min(workers, len(batches))
    workers, prefetch = read_ahead(workers, batch_bytes, free_shared_bytes(), warn=world.is_first)
    if workers:
        _kill_workers_at_exit(os.getpid())
    loaded = DataLoader(
        _Readable(dataset),
        batch_sampler=batches,
        collate_fn=_CollateReadable(collate),
        num_workers=workers,
        pin_memory=has_streams(world.device),
        worker_init_fn=_quiet_worker,
        prefetch_factor=prefetch if workers else None,
    )
    with fetched as have_read, contextlib.closing(_received(loaded)) as received:
        for number, batch in enumerate(received, 1):
            if isinstance(batch, UserError):
                raise batch
            have_read(number)
            yield batch


def _turns(batches: Iterable[list[int]]) -> tuple[int, int]:
    """Of the ranks that fetch what all of their node read, and the number of these."""
    return (local_rank(), ranks_here()) if isinstance(batches, RankPositions) else (0, 1)


class _Chunks:
    """Samples of batches, the batch and the epoch of each, for train.data.ahead: computed where it runs."""

    def __init__(self, dataset: Dataset, batches: Iterable[list[int]]):
        self.dataset, self.batches = dataset, batches

    def __iter__(self) -> Iterator[Chunk]:
        if isinstance(self.batches, RankPositions):
            order = self.dataset.order
            for positions, of_batch in self.batches.chunks_of_node():
                yield order.numbers(positions), of_batch, order.epochs(positions)
        else:
            sizes = [len(batch) for batch in self.batches]
            numbers = np.fromiter(chain.from_iterable(self.batches), np.int64, sum(sizes))
            yield numbers, np.repeat(np.arange(len(sizes)), sizes), np.zeros(len(numbers), np.int64)


def read_ahead(workers: int, batch_bytes: int, free: float, warn: bool) -> tuple[int, int]:
    """How many workers read, and how many batches each has ready or in work; fewer of both where shared
    memory, through which batches are passed, has no room.

    A page that is written beyond that room ends the worker.

    Args:
        workers: as asked for.
        free: bytes of shared memory, for this rank.
    """
    known = batch_bytes and free < math.inf
    room = (SHARED_PART * free - BYTES_OF_A_WORKER * workers) / (batch_bytes + BYTES_OF_PAGES)
    batches = int(room) - 1 if known else sys.maxsize  # one is in use
    readers = max(0, min(workers, batches))
    if readers < workers and warn:
        _warn_of_shared_memory(readers, workers, batch_bytes)
    return readers, min(PREFETCH_BATCHES, batches // readers) if readers else 0


@lru_cache  # once for each case, though every validation has loaders
def _warn_of_shared_memory(readers: int, workers: int, batch_bytes: int) -> None:
    reading = f"{readers} of {workers} workers read" if readers else "no worker reads, but the process itself"
    say(
        f"warning: {SHARED_MEMORY} has little room for batches of {batch_bytes / 1e6:,.1f} MB:"
        f" {reading}; give the machine or container more shared memory",
        file=sys.stderr,
    )


def free_shared_bytes() -> float:
    """Shared memory for this rank; infinite where torch uses no files for it."""
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return math.inf
    return min(free, psutil.virtual_memory().available) / ranks_here()


def _received(loaded: DataLoader) -> Iterator:
    """The batches; a worker that died while it sent one is named as torch names it elsewhere. When this ends,
    by an exception too, so do the workers.
    """
    gc.freeze()  # a worker that collects garbage would write to, and so copy, all objects of this process
    try:
        iterator = iter(loaded)
    finally:
        gc.unfreeze()
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
            return Fault(
                f"a shard can no longer be read ({error}); restore it and run the same command again"
            )
        except UserError as error:
            return error


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
    # process group. A worker ends with the loader, at exit, or by itself when the main process is gone (torch
    # watches its parent alone, which a forkserver is, where the main process is of one).
    exit_with_parent()
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
