"""Tars behind URLs that are indexed there: their headers, texts and the first bytes of images are read, of
several tars at once.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from data_prep.errors import UserError
from data_prep.images import BadImage, CheckedImage, signature_of
from data_prep.inputs.names import Problem
from data_prep.inputs.rows import Ignore, Row
from data_prep.inputs.storage import is_url
from data_prep.tables import counted
from data_prep.terminal import say

TARS = 8  # that are read at once; the rows of so many are held in memory
# What is known of an image that is not read.
UNREAD = CheckedImage("not read", 0, 0, b"", pixels=b"", phash=b"", fixes=(), data=None)


@dataclass
class Stored:
    """How tars behind URLs are read.

    Args:
        full_check: all images are read and checked later, and not accepted by their first bytes.
    """

    full_check: bool
    fetched: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self._pool = ThreadPoolExecutor(TARS)
        self._tars = 0

    def read_ahead(self, inputs: list[str], rows_of: Callable[..., Iterator[Row]]) -> dict[int, Callable]:
        """By the number of each input that is a URL, a function that takes Input.ignore and yields its rows.

        Args:
            rows_of: takes the number of an input, and `fetched` and `ignore` of Input.
        """
        numbers = [number for number, source in enumerate(inputs) if is_url(source)]
        self._tars = len(numbers)
        started, waiting = {}, iter(numbers)

        def start() -> None:
            if (number := next(waiting, None)) is not None:
                started[number] = self._pool.submit(_read, rows_of, number)

        for _ in range(TARS):
            start()

        def rows(number: int, ignore: Ignore) -> Iterator[Row]:
            read = started.pop(number).result()
            start()
            self.fetched += read.fetched
            for reason, name in read.ignored:
                ignore(reason, name)
            yield from read.rows
            if read.error:
                raise read.error

        return {number: lambda ignore, number=number: rows(number, ignore) for number in numbers}

    def problem_of(self, row: Row) -> Problem | None:
        """Why an image that will not be read cannot be trained on."""
        if self.full_check:
            return None
        try:
            signature_of(row.data, "index cannot change images in tars, but build can")
        except BadImage as bad:
            return Problem(bad.reason, bad.detail)
        return None

    def close(self) -> None:
        """Say what reading has cost."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._tars:
            requests, megabytes = self.fetched["requests"], self.fetched["bytes"] / 1e6
            say(f"{counted(self._tars, 'tar')} behind URLs: {requests:,} requests, {megabytes:,.1f} MB read")


@dataclass
class _Read:
    rows: list[Row] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    fetched: Counter = field(default_factory=Counter)
    error: UserError | None = None


def _read(rows_of: Callable[..., Iterator[Row]], number: int) -> _Read:
    """The rows of a tar, with the error that ends them."""
    read = _Read()

    def ignore(*ignored: str) -> None:
        read.ignored.append(ignored)

    try:
        for row in rows_of(number, fetched=read.fetched, ignore=ignore):
            read.rows.append(row)
    except UserError as error:
        read.error = error
    return read
