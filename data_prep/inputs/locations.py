"""Where the bytes of an image are, a file, a piece of a file, or a URL, and how they are read."""

import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from fsspec import AbstractFileSystem

from data_prep.below import open_below
from data_prep.errors import UserError
from data_prep.images import BadImage
from data_prep.inputs.names import OUTSIDE, missing_hint
from data_prep.inputs.storage import is_http, is_url
from data_prep.masked import masked_url
from data_prep.store.remote import file_at, remote

MAX_BYTES = 1 << 30
PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")
CONNECTIONS, ATTEMPTS = 16, 3
PIECE_S = 60  # after which no other image of a piece is asked for, so that progress is seen


class ImageLocation(NamedTuple):
    """The file `name` below `root`; or `length` bytes at `offset` of the file `root`.

    Attributes:
        root: a folder, a URL, or a file that contains images.
        name: relative to `root`; if `offset` is given, it only identifies the image.
    """

    root: str
    name: str = ""
    offset: int | None = None
    length: int = 0

    @property
    def is_remote(self) -> bool:
        return self.offset is None and is_url(self.root)

    @property
    def is_stored(self) -> bool:
        """Whether it is a piece of a file behind a URL."""
        return self.offset is not None and is_url(self.root)

    @property
    def url(self) -> str:
        """Of a remote image. A `#` is part of its name, and so is each `%` if one of them quotes nothing."""
        name = self.name
        if is_http(self.root):
            name = (name.replace("%", "%25") if PERCENT.search(name) else name).replace("#", "%23")
        return self.root + name if self.root.endswith("/") else f"{self.root}/{name}"


class _Later(Exception):
    """An image is fetched in a later piece."""


class _Piece:
    """What may still be fetched.

    Args:
        max_bytes: that are held at once; 0 for any number, and any time.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.ends_at, self.held = max_bytes, time.monotonic() + PIECE_S, 0
        self._lock = threading.Lock()

    def cat(self, files: AbstractFileSystem, url: str, is_first: bool) -> bytes:
        """The bytes at a URL.

        Raises:
            _Later: no more may be fetched; the first one always is.
        """
        is_bounded = bool(self.max_bytes) and not is_first
        if is_bounded and (self.held > self.max_bytes or time.monotonic() > self.ends_at):
            raise _Later
        taken, is_whole = [], False

        def take(n_bytes: int) -> None:
            taken.append(n_bytes)
            if self._hold(n_bytes) > self.max_bytes and is_bounded:
                raise _Later

        try:
            if is_http(url):
                data = files.cat_file(url, take=take)
            else:  # whole in memory already
                data = files.cat_file(url)
                self._hold(len(data))
            is_whole = True
            return data
        finally:
            if not is_whole:
                self._hold(-sum(taken))

    def _hold(self, n_bytes: int) -> int:
        with self._lock:
            self.held += n_bytes
            return self.held


def read_all(locations: list[ImageLocation], max_bytes: int = 0) -> Iterator[bytes | BadImage]:
    """The bytes at each location, or why they cannot be read; remote files are fetched in parallel.

    Args:
        max_bytes: after about so many bytes, or PIECE_S, the rest is left out, but never the first location.
    """
    piece = _Piece(max_bytes)
    by_root: dict[str, list[str]] = {}
    for location in locations:
        if location.is_remote:
            by_root.setdefault(location.root, []).append(location.url)
    fetched = {root: _fetch(root, list(dict.fromkeys(urls)), piece) for root, urls in by_root.items()}
    return _until_left_out(locations, fetched, max_bytes)


def _until_left_out(
    locations: list[ImageLocation], fetched: dict[str, dict], max_bytes: int
) -> Iterator[bytes | BadImage]:
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        stored = _fetch_stored(pool, locations, max_bytes)
        for location in locations:
            if location.is_stored:
                if location not in stored:
                    return
                yield stored.pop(location).result()
            elif not location.is_remote:
                yield read_local(location)
            elif location.url in fetched[location.root]:
                yield fetched[location.root][location.url]
            else:
                return


def _fetch_stored(
    pool: ThreadPoolExecutor, locations: list[ImageLocation], max_bytes: int
) -> dict[ImageLocation, Future]:
    """Pieces of files behind URLs, on their way: as many as have `max_bytes`, and at least one."""
    started, total = {}, 0
    for location in locations:
        if location.is_stored:
            if started and max_bytes and total + location.length > max_bytes:
                break
            total += location.length
            started[location] = pool.submit(read_stored, location)
    return started


def read_stored(location: ImageLocation) -> bytes:
    """A piece of a file behind a URL."""
    store, name = file_at(location.root)
    return store.read(name, location.offset, location.length)


def _fetch(root: str, urls: list[str], piece: _Piece) -> dict[str, bytes | BadImage]:
    """What is at each URL; without those of a later piece."""
    files, refused = _file_system(root)
    outside = BadImage(OUTSIDE, f"not under {masked_url(root)}; see --images")
    fetched: dict[str, bytes | BadImage] = {url: outside for url in urls if leaves_url(root, url)}
    later: set[str] = set()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for attempt in range(ATTEMPTS):
            if len(fetched) + len(later) == len(urls):
                break
            time.sleep(attempt)  # a busy server gets one second, then two
            for url, future in [
                (url, pool.submit(piece.cat, files, url, url == urls[0]))
                for url in urls
                if url not in fetched and url not in later
            ]:
                error = future.exception()
                if isinstance(error, _Later):
                    later.add(url)
                elif error is None:
                    fetched[url] = future.result()
                elif isinstance(error, FileNotFoundError):
                    if (found := _fetch_quoted(files, url, pool, piece, url == urls[0])) is None:
                        later.add(url)
                    else:
                        fetched[url] = found
                elif isinstance(error, refused):
                    fetched[url] = BadImage("not fetched", f"{masked_url(url)}: {error}")
                elif attempt == ATTEMPTS - 1:
                    detail = f"{masked_url(url)}: {type(error).__name__}: {masked_url(str(error))}"
                    fetched[url] = BadImage("unreadable file", detail)
    return fetched


def _file_system(root: str) -> tuple[AbstractFileSystem, tuple[type[Exception], ...]]:
    """That of a root, and errors after which no other attempt is made."""
    if not is_http(root):
        # Of the root: fsspec takes `::` in the URL of an image for a chain of file systems.
        return remote(any_host(root)), ()
    from data_prep.inputs.image_server import ImageServer, NotFetched  # imports aiohttp, which is slow

    return ImageServer(root), (NotFetched,)


def _fetch_quoted(
    files, url: str, pool: ThreadPoolExecutor, piece: _Piece, is_first: bool
) -> bytes | BadImage | None:
    """The bytes of a file whose name has `%20` in it: its URL has `%2520`; None for a later piece."""
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    if is_http(url) and "%" in path:
        again = pool.submit(piece.cat, files, f"{scheme}://{host}/{path.replace('%', '%25')}", is_first)
        if (error := again.exception()) is None:
            return again.result()
        if isinstance(error, _Later):
            return None
    return BadImage("missing file", masked_url(url))


def leaves_url(root: str, url: str) -> bool:
    """Whether what the HTTP client makes of a URL is not below the root."""
    if not is_http(url) or root.endswith("://"):
        return False
    from yarl import URL  # of aiohttp, which fetches

    try:
        top, asked = URL(root), URL(url)
    except ValueError:
        return True
    path = top.path if top.path.endswith("/") else f"{top.path}/"
    same_host = (asked.scheme, asked.user, asked.host, asked.port) == (
        top.scheme,
        top.user,
        top.host,
        top.port,
    )
    return not (same_host and asked.path.startswith(path))


def any_host(root: str) -> str:
    """A URL of the root's file system, where the root is only a protocol such as https://."""
    return f"{root}host/" if root.endswith("://") else root


def read_local(location: ImageLocation) -> bytes | BadImage:
    """The bytes at a local location; refused if a symbolic link leads out of the root. Also a piece of a file
    behind a URL.
    """
    if location.is_stored:
        return read_stored(location)
    if "\0" in location.name and location.offset is None:
        return BadImage("missing file", "its path contains a NUL character, which no file system has")
    try:
        if location.offset is not None:
            data = os.pread(_open_cached(location.root), location.length, location.offset)
            assert len(data) == location.length, (location, len(data))
            return data
        descriptor = open_below(location.root, location.name)
        if descriptor is None:
            return BadImage(OUTSIDE, f"a symbolic link leads out of {location.root}")
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return BadImage("not a regular file")
            if status.st_size > MAX_BYTES:
                return BadImage("file too large", f"{status.st_size} bytes")
            return os.read(descriptor, status.st_size + 1)
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        return BadImage("missing file", f"no such file under {location.root}; {missing_hint(location.name)}")
    except OSError as error:
        return BadImage("unreadable file", os.strerror(error.errno or 0))


@lru_cache(16)
def _open_cached(path: str) -> int:
    return os.open(path, os.O_RDONLY)


def forget_open_files() -> None:
    """A later build in this process may have other files of the same names."""
    _open_cached.cache_clear()


def check_root(root: str) -> None:
    """Refuse a folder of images that does not exist.

    Raises:
        UserError: no such folder, or its protocol is unknown.
    """
    if is_url(root):
        remote(any_host(root))
    elif not Path(root).is_dir():
        raise UserError(f"{root}: no such folder; pass --images, the folder that image paths are relative to")
