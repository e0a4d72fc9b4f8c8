"""What batches will read of shards behind a URL is fetched before they ask: a process beside the workers.

The order of samples is known, so the files are fetched in the order in which they are needed, as many ahead
as the cache has room for, and one that no batch needs any more this epoch gives way to the next. Nothing
depends on this process: a worker that does not find a sample fetches it.
"""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.child import exit_with_parent
from data_prep.errors import UserError
from data_prep.shards import Joined, Shards
from data_prep.store.cache import Cache, CachedFile, chosen

FILES_AT_ONCE = 8  # each one request after the other
POLL_S = 0.05


# Of samples: int64 [n], their numbers, the batch that each is in, and its epoch.
Chunk = tuple[np.ndarray, np.ndarray, np.ndarray]


class Wanted(NamedTuple):
    """What batches read of a file.

    Attributes:
        first, last: numbers of the batches.
        pieces: int64 [n, 2], offset and size.
    """

    first: int
    last: int
    file: CachedFile
    pieces: np.ndarray


def plan(shards: Shards | Joined, chunks: Iterable[Chunk]) -> Iterator[Wanted]:
    """What is read of each file behind a URL in an epoch, in the order in which batches need it."""
    for numbers, batches, epochs in chunks:
        wanted = []
        for part, here, own in shards.located(numbers):
            files, of_shard = part.remote_files(), part.shards_of(own)
            stretch = epochs[here] * len(files) + of_shard
            in_turn = np.argsort(stretch, kind="stable")
            for members in np.split(in_turn, np.flatnonzero(np.diff(stretch[in_turn])) + 1):
                if (file := files[of_shard[members[0]]]) is not None:
                    of_file = batches[here[members]]
                    pieces = part.pieces(np.sort(own[members]))
                    wanted.append(Wanted(int(of_file.min()), int(of_file.max()), file, pieces))
        yield from sorted(wanted, key=lambda each: each.first)


def is_remote(shards: Shards | Joined | None) -> bool:
    """Whether a tar of these shards is behind a URL."""
    parts = getattr(shards, "parts", [shards] if shards else [])
    return any(file is not None for part in parts for file in part.remote_files())


class Fetched:
    """The files that are fetched, and let go when all batches that read them have been."""

    def __init__(self, cache: Cache):
        self.cache, self.limit = cache, cache.limit()
        self.held: list[Wanted] = []
        self.held_bytes: dict[Path, int] = {}
        self.used: list[Path] = []

    def has_room(self, wanted: Wanted, n_read: int) -> bool:
        """Whether a file fits beside those that are needed.

        Args:
            n_read: batches that have been read.
        """
        self.held = [each for each in self.held if each.last >= n_read]
        kept = {each.file.path for each in self.held}
        self.used += [path for path in self.held_bytes if path not in kept]
        self.held_bytes = {path: self.held_bytes[path] for path in kept}
        others = sum(n for path, n in self.held_bytes.items() if path != wanted.file.path)
        return not self.held or others + wanted.file.bytes_of(wanted.pieces) <= self.limit

    def hold(self, wanted: Wanted) -> None:
        """Make room for a file, and keep it until it has been read."""
        path, n_bytes = wanted.file.path, wanted.file.bytes_of(wanted.pieces)
        self.held.append(wanted)
        self.held_bytes[path] = max(n_bytes, self.held_bytes.get(path, 0))
        if path in self.used:
            self.used.remove(path)
        self.cache.make_room(set(self.held_bytes), sum(self.held_bytes.values()), self.used)


def _fetch(wanted: Wanted) -> None:
    with suppress(UserError):  # the worker that does not find it meets the same error, and says it
        wanted.file.fetch(wanted.pieces)


@contextmanager
def ahead(
    shards: Shards | Joined | None, chunks: Iterable[Chunk], turn: int = 0, turns: int = 1
) -> Iterator[Callable[[int], None]]:
    """Fetch what batches will read; nothing is done where all shards are on this machine.

    Args:
        shards: None for images that are in none.
        chunks: as of plan(); they are computed in the other process.
        turn, turns: this rank fetches every `turns`-th file of the plan, which is the same for `turns` ranks.

    Returns:
        To be called with the number of batches that have been read.
    """
    if not is_remote(shards):
        yield lambda n_read: None
        return
    n_read = multiprocessing.Value("q", 0, lock=False)
    arguments = shards, chunks, Fetched(chosen()), n_read, turn, turns
    process = multiprocessing.Process(target=_run, args=arguments, daemon=True, name="fetch ahead")
    process.start()
    try:
        yield lambda n: setattr(n_read, "value", n)
    finally:
        process.kill()
        process.join()


def _run(
    shards: Shards | Joined, chunks: Iterable[Chunk], fetched: Fetched, n_read, turn: int, turns: int
) -> None:
    exit_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the workers: stops are for the main process
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for number, wanted in enumerate(plan(shards, chunks)):
            while not fetched.has_room(wanted, n_read.value):
                time.sleep(POLL_S)
            fetched.hold(wanted)
            if number % turns == turn:
                pool.submit(_fetch, wanted)
