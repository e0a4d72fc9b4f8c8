"""Image files that are small in bytes and pixels, and slow to open or to decode in the usual way."""

import io
import os
import signal
import struct
import zlib
from itertools import pairwise

from evil import encoded, header, noise, png_of


def scans(n: int, width: int = 64, height: int = 64) -> bytes:
    """A valid progressive gray JPEG of `n` scans (at most 883). Its first block is bright. Each scan after
    the first is another bit of a coefficient of all blocks, zero.
    """
    blocks = -(-width // 8) * -(-height // 8)
    dc = "10" + "1" * 7 + "10" + "0" * 7 + "0" * (blocks - 2)  # 127 more, 127 less, then no difference
    ac = ("0" + "1" * 14) * -(-blocks // 32767)  # runs of 32767 blocks without a coefficient
    bits = [(k, k, last + 1 if last < 13 else 0, last) for k in range(1, 64) for last in range(13, -1, -1)]
    parts = [
        b"\xff\xd8\xff\xdb" + struct.pack(">HB64s", 67, 0, b"\1" * 64),
        b"\xff\xc2" + struct.pack(">HBHHB3s", 11, 8, height, width, 1, b"\1\x11\0"),
        b"\xff\xc4" + struct.pack(">HB16s2s", 21, 0x00, b"\1\1", b"\0\7"),
        b"\xff\xc4" + struct.pack(">HB16s1s", 20, 0x10, b"\1", b"\xe0"),
    ]
    for start, end, high, low in [(0, 0, 0, 0), *bits[: n - 1]]:
        parts.append(b"\xff\xda" + struct.pack(">HBHBBB", 8, 1, 0x0100, start, end, high << 4 | low))
        parts.append(_bits(ac if end else dc))
    return b"".join(parts) + b"\xff\xd9"


def _bits(text: str) -> bytes:
    """The bits of a scan, filled up with ones; a byte 255 is followed by 0."""
    text += "1" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")


def sequential_scans(n: int) -> bytes:
    """A JPEG that is not progressive, of `n` scans with one color component each."""
    data = encoded(noise(), "JPEG")
    start = data.rindex(b"\xff\xda")
    end = start + 2 + struct.unpack_from(">H", data, start + 2)[0]
    scan = b"\xff\xda" + struct.pack(">HBHBBB", 8, 1, 0x0100, 0, 63, 0)
    return data[:start] + (scan + data[end:-2]) * n + data[-2:]


def segments(n: int, content: bytes = b"Exif\0\0a") -> bytes:
    """A JPEG with `n` more segments of EXIF."""
    data = encoded(noise(), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", 2 + len(content)) + content
    return data[:2] + segment * n + data[2:]


def pages(n: int) -> bytes:
    """A TIFF of `n` pages, each with the same few pixels."""
    data = encoded(noise(), "TIFF")
    start = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, start)[0]
    ifd = data[start : start + 2 + 12 * count]
    body = bytearray(data[: len(data) + len(data) % 2])
    starts = [start, *(len(body) + number * (len(ifd) + 4) for number in range(n - 1)), 0]
    for _, following in pairwise(starts[1:]):
        body += ifd + struct.pack("<I", following)
    body[start + len(ifd) : start + len(ifd) + 4] = struct.pack("<I", starts[1])
    return bytes(body)


def tags(n: int, size: int) -> bytes:
    """A TIFF with `n` private tags, all of the same `size` bytes of the file."""
    data = encoded(noise(), "TIFF")
    start = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, start)[0]
    own = data[start + 2 : start + 2 + 12 * count]
    body = bytearray(data + b"\0" * (len(data) % 2))
    at = len(body)
    body += bytes(size)
    struct.pack_into("<I", body, 4, len(body))
    body += struct.pack("<H", count + n) + own
    body += b"".join(struct.pack("<HHII", 51_200 + number, 7, size, at) for number in range(n))
    return bytes(body + bytes(4))


def frames(n: int, before: bytes = b"", data: bytes = b"") -> bytes:
    """A GIF of `n` equal frames.

    Args:
        before: blocks before the first frame.
        data: blocks after the pixels of the last one.
    """
    whole = encoded(noise(32, 24).quantize(4), "GIF")
    table = 13 + 3 * (2 << (whole[10] & 7))
    return whole[:table] + before + whole[table:-1] * (n - 1) + whole[table:-2] + data + b"\0;"


def comments(n: int) -> bytes:
    return frames(1, b"!\xfe\x01a\0" * n)


def animated_png(n: int) -> bytes:
    """An APNG of `n` frames."""
    data = io.BytesIO()
    noise(seed=1).save(data, "PNG", save_all=True, append_images=[noise(seed=2)])
    data = data.getvalue()
    second = data.rindex(b"fcTL") - 4
    end = data.rindex(b"IEND") - 4
    control = data.index(b"acTL") - 4
    actl = png_of((b"acTL", struct.pack(">II", n, 0)))[8:]
    return data[:control] + actl + data[control + 20 : second] + data[second:end] * (n - 1) + data[end:]


def chunks(n: int, kind: bytes = b"tEXt", content: bytes = b"a\0a", color: int = 6) -> bytes:
    """A PNG with `n` chunks more before its pixels."""
    width = 32 * {2: 3, 6: 4}[color]
    rows = b"".join(b"\0" + bytes([number]) * width for number in range(32))
    return png_of(
        header(32, 32, color=color), *[(kind, content)] * n, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    )


def parts_of(png: bytes) -> list[tuple[bytes, bytes]]:
    """The chunks of a PNG without its end."""
    start, found = 8, []
    while png[start + 4 : start + 8] != b"IEND":
        length = int.from_bytes(png[start : start + 4], "big")
        found.append((png[start + 4 : start + 8], png[start + 8 : start + 8 + length]))
        start += 12 + length
    return found


def packed(size: int) -> bytes:
    """The content of a zTXt or iCCP chunk that becomes `size` bytes."""
    return b"a\0\0" + zlib.compress(bytes(size), 9)


def endless(_: bytes) -> tuple[bytes]:
    """Answers of a data_prep.child: one that never comes, one without memory, one of a crash."""
    while True:
        pass


def large(_: bytes) -> tuple[bytes]:
    return (bytes(1 << 33),)


def crashing(request: bytes) -> tuple[bytes, bytes]:
    if request == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    return request, str(os.getpid()).encode()
