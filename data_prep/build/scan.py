"""Every image of a part is read and checked, in parallel. Results are stored in the order of keys, so that a
kill loses only the last seconds.

    rows -> chunks of images -> workers: read (file, URL, or the part's .bytes), check
         -> table images; changed and fetched images -> .bytes
"""

import json
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import xxhash

from data_prep.build.database import Count, insert, select_one
from data_prep.build.records import (
    SPOOLED,
    UNCHECKED,
    EarlierImage,
    ImageRows,
    Part,
    Place,
    StoredImage,
    join_rows,
    unchecked_images,
)
from data_prep.build.stored import UNREAD
from data_prep.child import exit_with_parent
from data_prep.images import DECODER_DIED, BadImage, CheckedImage, Rules, check, check_signature
from data_prep.inputs.locations import ImageLocation, read_all
from data_prep.inputs.names import Problem
from data_prep.progress import progress

CHUNK, CHUNK_BYTES = 64, 1 << 26  # images of a chunk, and how many bytes of them are held at once
COMMIT_EVERY_S = 2.0
FOUND = ("extension", "width", "height", "content", "pixels", "phash", "fixes", "source")  # by a check


class Unchecked(NamedTuple):
    """An image to check.

    Attributes:
        source: xxh3 of the file that an earlier command has checked in the same way; b"" for none.
    """

    location: ImageLocation
    source: bytes

    @property
    def is_trusted(self) -> bool:
        """A remote file is not fetched again to see whether it has changed, as on any resume."""
        return bool(self.source) and self.location.is_remote


class Checked(NamedTuple):
    """What a check found.

    Attributes:
        result: None for what the earlier command found.
        source: xxh3 of the file, if the image was changed.
    """

    result: CheckedImage | BadImage | None
    source: bytes | None = None


@dataclass(frozen=True)
class Checks:
    """What a worker does with each image.

    Attributes:
        skip_decode: accept images by their first bytes.
        in_place: tars are only indexed, so an image that would have to be changed is rejected.
        full_check: read the images in tars behind URLs as well.
    """

    rules: Rules
    skip_decode: bool = False
    in_place: bool = False
    full_check: bool = False

    def __call__(self, images: list[Unchecked]) -> list[Checked]:
        """What each image is; of many bytes, only the first images, see in_order()."""
        unread = {image for image in images if image.location.is_stored and not self.full_check}
        wanted = [image.location for image in images if not image.is_trusted and image not in unread]
        read, found, held = read_all(wanted, CHUNK_BYTES), [], 0
        for image in images:
            if image in unread:
                found.append(Checked(UNREAD))
                continue
            data = b"" if image.is_trusted else next(read, None)
            if data is None or held > CHUNK_BYTES:
                break
            found.append(Checked(None) if image.is_trusted else self._checked(image, data))
            held += len(getattr(found[-1].result, "data", None) or b"")
        return found

    def _checked(self, image: Unchecked, data: bytes | BadImage) -> Checked:
        if isinstance(data, BadImage):
            return Checked(data)
        if image.source and xxhash.xxh3_128_digest(data) == image.source:
            return Checked(None)
        try:
            result = self._check(image.location, data)
        except BadImage as bad:
            return Checked(bad)
        return Checked(result, None if result.data is None else xxhash.xxh3_128_digest(data))

    def _check(self, location: ImageLocation, data: bytes) -> CheckedImage:
        checked = check_signature(data) if self.skip_decode else check(data, self.rules)
        if self.in_place and checked.data is not None:
            raise BadImage(
                "needs a change",
                f"{', '.join(checked.fixes)}; index cannot change images in tars, but build can",
            )
        if location.is_remote:  # keep the bytes, so that the writer does not fetch them again
            return replace(checked, data=checked.data or data)
        return checked


def scan(part: Part, inputs: list[str], root: str, checks: Checks, processes: int) -> None:
    """Check every image of a part that is not checked yet.

    Args:
        root: the folder or URL that image paths are relative to.

    Raises:
        UserError: a remote file system is not available.
    """
    if part.get("scanned"):
        return
    query = f"FROM (SELECT count(DISTINCT key) AS n FROM rows WHERE {UNCHECKED})"
    total = select_one(part.db, Count, query, last_key=part.get("last_key")).n
    committed_at = time.monotonic()
    part.db.execute("BEGIN")
    part.truncate_spool()
    bar = progress(total=total, desc="checking images", unit="image")
    crashed = Checked(BadImage(DECODER_DIED["crash"]))
    for chunk, results in in_order(checks, _jobs(part, inputs, root), processes, crashed):
        for (image, earlier), checked in zip(chunk, results, strict=True):
            _store(part, image, earlier, checked)
        bar.update(len(chunk))
        if time.monotonic() - committed_at > COMMIT_EVERY_S:
            part.set(last_key=chunk[-1][0].key)
            part.commit()
            part.db.execute("BEGIN")
            committed_at = time.monotonic()
    bar.close()
    part.set(scanned=1)
    part.commit()


def _jobs(part: Part, inputs: list[str], root: str) -> Iterator[tuple]:
    """([(image, what an earlier command found, or None)], [what a worker gets]) of each chunk."""
    has_earlier = part.db.execute("SELECT 1 FROM earlier LIMIT 1").fetchone()
    for images in _chunks(unchecked_images(part), CHUNK):
        found = [
            select_one(part.db, EarlierImage, "FROM earlier WHERE key = :key", key=image.key)
            if has_earlier
            else None
            for image in images
        ]
        chunk = list(zip(images, found, strict=True))
        yield (
            chunk,
            [
                Unchecked(locate(part, inputs, root, image), earlier.source if earlier else b"")
                for image, earlier in chunk
            ],
        )


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


def locate(part: Part, inputs: list[str], root: str, image) -> ImageLocation:
    """Where the bytes of an image are.

    Args:
        image: anything with the fields image, container, offset and length.
    """
    if image.container is None:
        return ImageLocation(root, image.image)
    file = str(part.spool_path) if image.container == SPOOLED else inputs[image.container]
    return ImageLocation(file, image.image, image.offset, image.length)


def _store(part: Part, image: ImageRows, earlier: EarlierImage | None, checked: Checked) -> None:
    result = checked.result
    if isinstance(result, BadImage):
        problem = Problem(result.reason, result.detail)
        part.reject(*(row.reject(problem) for row in image.rows))
        return
    joined = join_rows(part, image)
    place = Place(image.container, image.offset, image.length)
    if result is None:
        if earlier.container is not None:
            place = Place(earlier.container, earlier.offset, earlier.length)
        found = earlier._asdict()
    else:
        if result.data is not None:
            place = part.spool(result.data)
        found = {**vars(result), "fixes": "\n".join(result.fixes), "source": checked.source}
    stored = StoredImage(
        image.key,
        image.rows[0].ordinal,
        image.image,
        captions="\n".join(joined.captions),  # load() leaves no line breaks in a caption
        **{
            name: json.dumps(values, ensure_ascii=False) if (values := getattr(joined, name)) else ""
            for name in ("weights", "groups")
        },
        split=joined.split,
        columns=image.rows[0].columns,
        **{name: found[name] for name in FOUND},
        **place._asdict(),
    )
    insert(part.db, "images", [stored])


def in_order(work: Callable, jobs: Iterable[tuple], processes: int, crashed) -> Iterator[tuple]:
    """(tag, work(items)) of each job (tag, items), in order, computed a few jobs ahead by worker processes.

    If a worker dies (killed for memory, or by a crash of a decoder), its items are tried again one by one.
    `work` may do only the first of several items; tag, which is then a list as long, is yielded in pieces.

    Args:
        crashed: the result of an item that kills its worker.
    """
    if processes == 1:
        for tag, items in jobs:
            while (result := work(items)) and len(result) < len(items):
                yield tag[: len(result)], result
                tag, items = tag[len(result) :], items[len(result) :]
            yield tag, result
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
                result = [_in_own_process(work, item, crashed) for item in items]
                pool = _pool(processes)
                waiting = deque((tag, items, _submit(pool, work, items)) for tag, items, _ in waiting)
            if 0 < len(result) < len(items):
                rest = items[len(result) :]
                waiting.appendleft((tag[len(result) :], rest, _submit(pool, work, rest)))
                tag = tag[: len(result)]
            yield tag, result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which then stops the workers
    exit_with_parent()


def _submit(pool: ProcessPoolExecutor, work: Callable, items: list) -> Future:
    try:
        return pool.submit(work, items)
    except BrokenProcessPool as broken:  # an earlier job broke the pool; it is retried first
        future = Future()
        future.set_exception(broken)
        return future


def _in_own_process(work: Callable, item, crashed):
    with _pool(1) as pool:
        try:
            return pool.submit(work, [item]).result()[0]
        except BrokenProcessPool:
            return crashed
