"""Inputs opened for reading: compressed ones within bounds, lines of text no longer than a row may be."""

import io
import lzma
import zlib
from collections.abc import Iterator

import fsspec

from data_prep.errors import UserError

MAX_LINE = 1 << 27  # characters; images in base64 are long, but a file of one line must not fill memory
# gzip reaches 1,032 and other formats far more; tables of captions reach 20, of repeated ones about 100.
MAX_RATIO = 200
FREE_BYTES = 1 << 28  # which any compressed file may become


class Bounded(io.RawIOBase):
    """What a compressed file becomes, up to MAX_RATIO times what was read of it.

    Raises:
        UserError: on reading more.
    """

    def __init__(self, source: str, raw, kind: str):
        self._source, self._raw, self._total = source, raw, 0
        self._file = fsspec.compression.compr[kind](raw, mode="rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer) -> int:
        try:
            data = self._file.read(len(buffer))
        except (zlib.error, lzma.LZMAError) as error:
            raise OSError(f"damaged compressed data: {error}") from None
        buffer[: len(data)] = data
        self._total += len(data)
        if self._total > FREE_BYTES and self._total > MAX_RATIO * self._raw.tell():
            raise UserError(
                f"{self._source}: becomes more than {MAX_RATIO} times its size, so it is not read; if that is"
                " meant, decompress it"
            )
        return len(data)

    def close(self) -> None:
        self._file.close()
        self._raw.close()
        super().close()


def open_bytes(source: str) -> io.BufferedIOBase:
    """A file or URL, decompressed if its name says that it is compressed.

    Raises:
        OSError, ValueError, ImportError: it cannot be opened.
    """
    raw = fsspec.open(source, "rb").open()
    kind = fsspec.core.get_compression(source, "infer")
    return io.BufferedReader(Bounded(source, raw, kind), 1 << 16) if kind else raw


def lines_of(source: str, text: io.TextIOBase, first: int = 1) -> Iterator[str]:
    """The lines of a text.

    Args:
        first: the number of the first of them, for messages.

    Raises:
        UserError: a line is too long.
    """
    number = first
    while line := text.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise UserError(
                f"{source}:{number}: a line of more than {MAX_LINE:,} characters, which no row has;"
                " check that this is a table of text"
            )
        yield line
        number += 1
