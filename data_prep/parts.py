"""Images that are small in bytes and in pixels, and still slow to open: many scans, chunks, comments, tags.

`excess` counts them in the file's structure, before a decoder sees the file. Pages and frames need no limit:
only the first is decoded, and no reader here looks for more than a second.
"""

import re
import struct
from collections.abc import Iterator

import numpy as np

MAX_SCANS = 100  # of a JPEG; usual are 1 and 10. Each visits all pixels.
MAX_SEGMENTS = 1000  # of a JPEG before its first scan; Pillow copies all EXIF again for each of EXIF
MAX_CHUNKS = 100_000  # of a PNG
MAX_PROFILES = 8  # iCCP chunks of a PNG, which may have one; Pillow decompresses a megabyte of each
MAX_BLOCKS = 10_000  # of a GIF's comments before its second frame; Pillow copies a comment for each of them
MAX_DATA_BLOCKS = 1_000_000  # of the first frame; usual are 255 bytes in each
MAX_TAGS = 4096  # of a TIFF's first page, or of EXIF
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # in a scan, 255 is followed by 0, or by D0 to D7
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers SOF0 to SOF15
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_SCAN, _END = 0xDA, 0xD9
# Bytes of a value of each type (TIFF 6.0, page 15; BigTIFF).
_TYPE_BYTES = dict.fromkeys((1, 2, 6, 7), 1) | dict.fromkeys((3, 8), 2) | dict.fromkeys((4, 9, 11, 13), 4)
_TYPE_BYTES |= dict.fromkeys((5, 10, 12, 16, 17, 18), 8)


def excess(data: bytes, format: str) -> str:
    """What an image has too much of to be opened, in words; "" for nothing. A damaged file is no excess.

    Args:
        format: as data_prep.signatures names it; "EXIF" for the content of an EXIF block.
    """
    count = {"JPEG": _of_jpeg, "PNG": _of_png, "GIF": _of_gif, "TIFF": _of_tiff, "EXIF": _of_tiff}.get(format)
    try:
        return count(data) if count else ""
    except (IndexError, struct.error):  # truncated: the decoder says so
        return ""


def _of_jpeg(data: bytes) -> str:
    components, is_progressive = 0, False
    for number, (marker, start) in enumerate(_segments(data, 2)):
        if number > MAX_SEGMENTS:
            return f"more than {MAX_SEGMENTS:,} segments"
        if marker in _FRAMES:
            components, is_progressive = data[start + 9], marker in _PROGRESSIVE
        if marker == _SCAN:
            if not is_progressive and data[start + 4] == components:
                return ""  # it has all components, and decoders read no other
            return _scans(data, start)
    return ""


def _segments(data: bytes, start: int) -> Iterator[tuple[int, int]]:
    """Marker and start of each segment, up to the end of the image; what a scan has in between is skipped."""
    while found := _MARKER.search(data, start):
        marker, start = found[1][0], found.start()
        if marker == _END:
            return
        yield marker, start
        start += 2
        if marker not in (0x01, 0xD8):  # those have no content
            start += max(2, struct.unpack_from(">H", data, start)[0])


def _scans(data: bytes, first: int) -> str:
    pairs = np.frombuffer(data, np.uint8, offset=first)
    # Of these pairs some are in what follows the image, or in a thumbnail. The exact count takes longer.
    if int(((pairs[:-1] == 0xFF) & (pairs[1:] == _SCAN)).sum()) <= MAX_SCANS:
        return ""
    n = sum(marker == _SCAN for marker, _ in _segments(data, first))
    return f"{n:,} scans; at most {MAX_SCANS} are decoded" if n > MAX_SCANS else ""


def _of_png(data: bytes) -> str:
    start, chunks, profiles = 8, 0, 0
    while start < len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        chunks += 1
        profiles += kind == b"iCCP"
        if kind == b"IEND":
            return ""
        if chunks > MAX_CHUNKS:
            return f"more than {MAX_CHUNKS:,} chunks"
        if profiles > MAX_PROFILES:
            return f"more than {MAX_PROFILES} color profiles"
        start += 12 + length
    return ""


def _of_gif(data: bytes) -> str:
    at, blocks, data_blocks, frames = 13 + _table(data[10]), 0, 0, 0
    while frames < 2 and blocks <= MAX_BLOCKS:
        kind, at = data[at], at + 1
        if kind == 0x3B:
            return ""
        if kind == 0x2C:  # an image: its place, size, colors, and the width of its codes
            frames += 1
            at += 10 + _table(data[at + 8])
        elif kind == 0x21:
            at += 1
        else:
            blocks += 1  # Pillow skips bytes that belong to nothing
            continue
        while length := data[at]:
            at += 1 + length
            blocks += kind == 0x21
            data_blocks += kind == 0x2C
            if data_blocks > MAX_DATA_BLOCKS:
                return f"more than {MAX_DATA_BLOCKS:,} blocks of pixels"
        at += 1
    return f"more than {MAX_BLOCKS:,} blocks of comments" if blocks > MAX_BLOCKS else ""


def _table(flags: int) -> int:
    """Bytes of a GIF's table of colors."""
    return 3 * (2 << (flags & 7)) if flags & 0x80 else 0


def _of_tiff(data: bytes) -> str:
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return ""
    is_big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
    (start,) = (
        struct.unpack_from(f"{order}Q", data, 8) if is_big else struct.unpack_from(f"{order}I", data, 4)
    )
    number, entry = (f"{order}Q", f"{order}HHQQ") if is_big else (f"{order}H", f"{order}HHII")
    (n,) = struct.unpack_from(number, data, start)
    if n > MAX_TAGS:
        return f"{n:,} tags; at most {MAX_TAGS:,} are read"
    total, start = 0, start + struct.calcsize(number)
    for _ in range(n):
        _, kind, count, place = struct.unpack_from(entry, data, start)
        start += struct.calcsize(entry)
        size = count * _TYPE_BYTES.get(kind, 0)
        if size > (8 if is_big else 4) and place + size <= len(data):
            total += size  # each tag's own copy, also where several name the same place
    return "tags that name the same bytes again and again" if total > len(data) + 65536 else ""
