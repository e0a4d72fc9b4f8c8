"""Every image of a part is read and checked, in parallel; results are kept in the order of the keys, so a
kill loses seconds.

pictures -> chunks -> workers: read (file, URL, or the part's .bytes), check -> pictures table, new bytes to
.bytes"""

import errno
import os
import signal
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from data_prep.build.records import SPOOLED, Part, Picture, join, pictures
from data_prep.errors import UserError
from data_prep.images import BadImage, CheckedImage, Rules, check, trust
from data_prep.inputs.sources import is_url, remote
from data_prep.progress import progress

CHUNK = 64
COMMIT_EVERY_S = 2.0
MAX_BYTES = 1 << 30
FETCHES, TRIES = 16, 3


class Source(NamedTuple):
    """Where an image's bytes are: a name below `root`, or `size` bytes at `at` of the file `root`."""

    root: str
    name: str = ""
    at: int | None = None
    size: int = 0

    @property
    def is_remote(self) -> bool:
        return self.at is None and is_url(self.root)

    @property
    def url(self) -> str:
        return self.root + self.name if self.root.endswith("/") else f"{self.root}/{self.name}"


@dataclass(frozen=True)
class Checks:
    rules: Rules
    trusted: bool = False
    in_place: bool = False  # nothing can be rewritten, so what would have to be is refused

    def __call__(self, sources: list[Source]) -> list[CheckedImage | BadImage]:
        results = []
        for source, data in zip(sources, read_all(sources), strict=True):
            try:
                if isinstance(data, BadImage):
                    raise data
                checked = trust(data) if self.trusted else check(data, self.rules)
                if self.in_place and checked.data is not None:
                    raise BadImage(
                        "needs a change",
                        f"{', '.join(checked.fixes)}; build does that, index leaves tars as they are",
                    )
                # What came over a network is kept, not fetched twice.
                results.append(replace(checked, data=checked.data or data) if source.is_remote else checked)
            except BadImage as bad:
                results.append(bad)
        return results


def scan(part: Part, inputs: list[str], root: str, checks: Checks, processes: int) -> None:
    """Check every image of a part that is not checked yet.

    Raises:
        UserError: a remote file system is not to be had.
    """
    if part.get("scanned"):
        return
    (total,) = part.db.execute(
        "SELECT count(DISTINCT key) FROM rows WHERE key > ?", (part.get("last_key"),)
    ).fetchone()
    started, last_key = time.monotonic(), ""
    part.db.execute("BEGIN")
    _forget_unfinished(part)
    bar = progress(total=total, desc="checking images", unit="image")
    jobs = (
        (found, [place(part, inputs, root, picture) for picture in found])
        for found in _chunks(pictures(part), CHUNK)
    )
    for found, results in in_order(checks, jobs, processes, BadImage("the decoder crashed on it")):
        for picture, result in zip(found, results, strict=True):
            _keep(part, picture, result)
        last_key = found[-1].key
        bar.update(len(found))
        if time.monotonic() - started > COMMIT_EVERY_S:
            part.set(last_key=last_key)
            part.commit()
            part.db.execute("BEGIN")
            started = time.monotonic()
    bar.close()
    part.set(scanned=1)
    part.commit()


def _forget_unfinished(part: Part) -> None:
    """Cut off what was added to .bytes after the last commit."""
    (end,) = part.db.execute(
        "SELECT max(coalesce(p, 0), coalesce(r, 0)) FROM (SELECT max(at + size) p FROM pictures WHERE held = -1), "
        "(SELECT max(at + size) r FROM rows WHERE held = -1)"
    ).fetchone()
    if part.spool_path.exists():
        os.truncate(part.spool_path, end)


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


def place(part: Part, inputs: list[str], root: str, image) -> Source:
    """Where an image is, by its `image`, `held`, `at` and `size`; see data_prep.build.records."""
    if image.held is None:
        return Source(root, image.image)
    return Source(
        str(part.spool_path) if image.held == SPOOLED else inputs[image.held],
        image.image,
        image.at,
        image.size,
    )


def _keep(part: Part, picture: Picture, result: CheckedImage | BadImage) -> None:
    if isinstance(result, BadImage):
        part.reject([(*row[:3], picture.image) for row in picture.rows], result.reason, result.detail)
        return
    row = join(part, picture)
    held = (picture.held, picture.at, picture.size) if result.data is None else part.store(result.data)
    part.db.execute(
        f"INSERT INTO pictures VALUES ({', '.join('?' * 17)})",
        (
            *row.values(),
            result.extension,
            result.width,
            result.height,
            result.content,
            result.pixels,
            result.look,
            "\n".join(result.fixes),
            *held,
        ),
    )


def in_order(work: Callable, jobs: Iterable[tuple], processes: int, crashed) -> Iterator[tuple]:
    """(tag, work(items)) of each job (tag, items), in order, a few jobs ahead of the reader.

    A worker that dies (killed for memory, a decoder's crash) takes nothing with it: its items are tried again
    one by one, and the one that kills its worker gets the result `crashed`.
    """
    if processes == 1:
        for tag, items in jobs:
            yield tag, work(items)
        return
    jobs, waiting = iter(jobs), deque()
    pool = _pool(processes)
    try:
        while True:
            while len(waiting) < 3 * processes and (job := next(jobs, None)):
                waiting.append((*job, _submit(pool, work, job[1])))
            if not waiting:
                return
            tag, items, future = waiting.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                pool.shutdown()
                result = [one for item in items for one in _alone(work, item, crashed)]
                pool = _pool(processes)
                waiting = deque((*job[:2], _submit(pool, work, job[1])) for job in waiting)
            yield tag, result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, initializer=_die_with, initargs=(os.getpid(),))


def _die_with(parent: int) -> None:
    """End this worker when its parent is gone: one that was killed could not tell us, and we would wait for
    ever.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us
    threading.Thread(target=watch, daemon=True).start()


def _submit(pool: ProcessPoolExecutor, work: Callable, items: list) -> Future:
    try:
        return pool.submit(work, items)
    except (
        BrokenProcessPool
    ) as broken:  # the pool died of an earlier job, whose turn to be retried comes first
        future = Future()
        future.set_exception(broken)
        return future


def _alone(work: Callable, item, crashed) -> list:
    with _pool(1) as pool:
        try:
            return pool.submit(work, [item]).result()
        except BrokenProcessPool:
            return [crashed]


def read_all(sources: list[Source]) -> Iterator[bytes | BadImage]:
    """The bytes of each source, or why they cannot be had; remote ones are fetched together."""
    urls = list(dict.fromkeys(source.url for source in sources if source.is_remote))
    fetched = _fetch(urls) if urls else {}
    return (fetched[source.url] if source.is_remote else read_local(source) for source in sources)


def _fetch(urls: list[str]) -> dict[str, bytes | BadImage]:
    files = remote(urls[0])
    found: dict[str, bytes | BadImage] = {}
    with ThreadPoolExecutor(FETCHES) as pool:
        for attempt in range(TRIES):
            time.sleep(attempt)  # a server that was busy is given a second, then two
            for url, answer in [(url, pool.submit(files.cat_file, url)) for url in urls if url not in found]:
                error = answer.exception()
                if error is None:
                    found[url] = answer.result()
                elif isinstance(error, FileNotFoundError):
                    found[url] = BadImage("missing file", url)
                elif attempt == TRIES - 1:
                    found[url] = BadImage("unreadable file", f"{url}: {type(error).__name__}: {error}")
            if len(found) == len(urls):
                break
    return found


def read_local(source: Source) -> bytes | BadImage:
    """The bytes of a local file, refused where a symbolic link leads out of its root."""
    try:
        if source.at is not None:
            descriptor = _open_once(source.root)
            data = os.pread(descriptor, source.size, source.at)
            assert len(data) == source.size, (source, len(data))
            return data
        descriptor = _open_below(source.root, source.name)
        if descriptor is None:
            return BadImage("outside of the images folder", f"a symbolic link leads out of {source.root}")
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                return BadImage("not a regular file")
            if found.st_size > MAX_BYTES:
                return BadImage("file too large", f"{found.st_size} bytes")
            return os.read(descriptor, found.st_size + 1)
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        return BadImage("missing file", f"no such file under {source.root}; see --images")
    except OSError as error:
        return BadImage("unreadable file", os.strerror(error.errno or 0))


def _open_below(root: str, name: str) -> int | None:
    """A descriptor of root/name, or None where a symbolic link leads out of `root`."""
    folder, _, base = name.rpartition("/")
    real_folder, is_below = _folder(root, folder)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # a pipe does not make us wait
    try:
        return os.open(real_folder + base, flags | os.O_NOFOLLOW) if is_below else None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK):
            raise
    path = os.path.realpath(real_folder + base)
    return os.open(path, flags) if path.startswith(_folder(root, "")[0]) else None


@lru_cache(4096)
def _folder(root: str, folder: str) -> tuple[str, bool]:
    """root/folder without symbolic links, with a slash at its end; and whether it is in `root`."""
    path = os.path.join(os.path.realpath(os.path.join(root, folder)), "")
    return path, path.startswith(os.path.join(os.path.realpath(root), ""))


@lru_cache(16)
def _open_once(path: str) -> int:
    return os.open(path, os.O_RDONLY)


def check_root(root: str) -> None:
    """Refuse an images folder that is none.

    Raises:
        UserError: it is not there, or not to be reached.
    """
    if is_url(root):
        remote(root if not root.endswith("://") else f"{root}host/")
    elif not Path(root).is_dir():
        raise UserError(
            f"{root}: no such folder; pass --images, the folder that the image paths are relative to"
        )
