"""A file of a store, read from its start to its end with jumps: a tar whose images are passed over.

A request takes about as long as the transfer of FAR bytes. So what is nearer than that is read with what
comes before it, in blocks of up to MAX_BLOCK: small images cost a request per megabyte. What is farther,
beyond a large image, is asked for by itself.
"""

import io

from data_prep.store.remote import Store

MIN_BLOCK, MAX_BLOCK, FAR = 1 << 16, 1 << 20, 1 << 18


class StoreReader:
    """A file object with read, seek and tell.

    Args:
        size: of the file, in bytes.

    Attributes:
        requests, fetched_bytes: so far.
    """

    def __init__(self, store: Store, name: str, size: int):
        self.store, self.name, self.size = store, name, size
        self.requests, self.fetched_bytes = 0, 0
        self._at, self._block = 0, MIN_BLOCK // 2
        self._start, self._data = 0, b""  # what was fetched last

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        """The next bytes, fewer at the end of the file."""
        end = self.size if size < 0 else min(self._at + size, self.size)
        pieces = []
        while self._at < end:
            first = self._at - self._start
            if not 0 <= first < len(self._data):
                self._fetch(end - self._at)
                first = 0
            pieces.append(self._data[first : end - self._start])
            self._at += len(pieces[-1])
        return b"".join(pieces)

    def _fetch(self, wanted: int) -> None:
        beyond = self._at - self._start - len(self._data)
        self._block = min(2 * self._block, MAX_BLOCK) if 0 <= beyond <= FAR else MIN_BLOCK
        n_bytes = min(max(wanted, self._block), self.size - self._at)
        self._start, self._data = self._at, self.store.read(self.name, self._at, n_bytes)
        self.requests += 1
        self.fetched_bytes += n_bytes
