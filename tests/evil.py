"""A folder of bad inputs, and the expected result for each: a reason for its rejection, or a fix."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

SPLIT_HEADER = "image,caption,split"


def noise(width: int = 32, height: int = 24, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng((seed, width, height)).integers(
        0, 256, (height, width, channels), dtype=np.uint8
    )
    return Image.fromarray(values.squeeze(-1) if channels == 1 else values, mode if mode != "1" else None)


def drawn(background, ink, mode: str = "RGBA", size: int = 32) -> Image.Image:
    image = Image.new(mode, (size, size), background)
    ImageDraw.Draw(image).ellipse((4, 4, size - 9, size - 9), fill=ink)
    return image


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_of(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks, with valid checksums."""
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def header(width: int, height: int, depth: int = 8, color: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)


def zeroed(data: bytes, start: int, size: int) -> bytes:
    return data[:start] + bytes(size) + data[start + size :]


def jpeg_with_size(width: int, height: int) -> bytes:
    data = bytearray(encoded(noise(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def exif_turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise(40, 24), "JPEG", exif=exif)


def transparent_color() -> bytes:
    return encoded(drawn((255, 0, 255), (0, 90, 0), "RGB"), transparency=(255, 0, 255))


def text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "\0" * 80_000_000, zip=True)
    return encoded(drawn((0, 0, 0, 0), (0, 0, 0, 255)), pnginfo=info)


big = encoded(noise(200, 160))
photo = encoded(noise(200, 160), "JPEG", quality=90)
frames = [noise(seed=1), noise(seed=2)]
idat = zlib.compress(bytes(33 * 32 * 3))

# name -> bytes, and the reason of its rejection
BAD_FILES = {
    "empty.png": (b"", "empty file"),
    "text.png": (b"hello\n", "not an image"),
    "page.jpg": (b"<!doctype html><title>404</title>", "HTML page, not an image"),
    "drawing.svg": (
        b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "SVG cannot be rendered",
    ),
    "program.eps": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "PostScript (EPS) is not supported",
    ),
    "paper.pdf": (b"%PDF-1.7\n", "PDF is not supported"),
    "pointer.png": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "Git LFS pointer, not an image",
    ),
    "half.png": (big[: len(big) // 2], "truncated image"),
    "almost.png": (big[:-2], "truncated image"),
    "endless.png": (big[:-12], "truncated image"),
    "flipped.png": (big[:500] + bytes([big[500] ^ 4]) + big[501:], "damaged image"),
    "holed.png": (zeroed(big, 20_000, 4096), "damaged image"),
    "signature.png": (big[:8], "damaged image"),
    "garbage.png": (
        png_of(header(32, 32), (b"IDAT", b"not a zlib stream at all"), (b"IEND", b"")),
        "damaged image",
    ),
    "garbage_alpha.png": (
        png_of(header(32, 32, color=6), (b"IDAT", b"not a zlib stream"), (b"IEND", b"")),
        "damaged image",
    ),
    "no_pixels.png": (png_of(header(32, 32), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")), "damaged image"),
    "no_header.png": (png_of((b"IDAT", idat), (b"IEND", b"")), "damaged image"),
    "zero.png": (png_of(header(0, 32), (b"IDAT", idat), (b"IEND", b"")), "too small"),
    "bomb.png": (png_of(header(60_000, 60_000), (b"IDAT", idat), (b"IEND", b"")), "too many pixels"),
    "bomb_alpha.png": (
        png_of(header(60_000, 60_000, color=6), (b"IDAT", idat), (b"IEND", b"")),
        "too many pixels",
    ),
    "half.jpg": (photo[: len(photo) // 2], "truncated image"),
    "holed.jpg": (zeroed(photo, 8000, 4096), "damaged image"),
    "start.jpg": (photo[:3], "damaged image"),
    "bomb.jpg": (jpeg_with_size(65_000, 65_000), "too many pixels"),
    "half.gif": (encoded(noise(), "GIF")[:1000], "truncated image"),
    "half.webp": (encoded(noise(200, 160), "WEBP", lossless=True)[:9000], "damaged image"),
    "half.bmp": (encoded(noise(), "BMP")[:800], "truncated image"),
    "bomb.bmp": (
        encoded(noise(), "BMP").replace(struct.pack("<ii", 32, 24), struct.pack("<ii", 90_000, 90_000), 1),
        "too many pixels",
    ),
    "start.tiff": (b"II*\0", "damaged image"),
    "float.tiff": (
        encoded(Image.fromarray(np.random.default_rng(0).random((16, 16), np.float32)), "TIFF"),
        "unsupported pixel type",
    ),
    "pixel.gif": (encoded(Image.new("RGB", (1, 1)), "GIF"), "too small"),
    "thin.png": (encoded(noise(800, 9)), "extreme aspect"),
    "white.png": (encoded(Image.new("RGB", (32, 32), "white")), "blank image"),
    "white.jpg": (encoded(Image.new("RGB", (32, 32), "white"), "JPEG"), "blank image"),
    "nothing.png": (encoded(Image.new("RGBA", (32, 32))), "wholly transparent"),
    "white_on_nothing.png": (encoded(drawn((0, 0, 0, 0), (255, 255, 255, 255))), "blank on the background"),
}

# name -> bytes, and its fix (None: the bytes stay unchanged)
GOOD_FILES = {
    "alpha.png": (encoded(drawn((0, 0, 0, 0), (0, 0, 0, 255))), "transparency"),
    "alpha_unused.png": (encoded(noise(mode="RGB").convert("RGBA")), "alpha without transparency"),
    "alpha_gray.png": (encoded(drawn((0, 0, 0, 0), (0, 40, 0, 255)).convert("LA")), "transparency"),
    "alpha_palette.png": (encoded(drawn((0, 0, 0, 0), (0, 0, 90, 255)).quantize(4)), "palette transparency"),
    "alpha_color.png": (transparent_color(), "transparency"),
    "sixteen.png": (
        encoded(Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 60)),
        "16 bit",
    ),
    "sixteen_rgb.png": (
        png_of(
            header(16, 16, depth=16),
            (b"IDAT", zlib.compress(b"".join(b"\0" + os.urandom(96) for _ in range(16)))),
            (b"IEND", b""),
        ),
        "16 bit",
    ),
    "text_bomb.png": (text_bomb(), "large text left out"),
    "favicon.ico": (encoded(noise(32, 32), "ICO"), "ICO to PNG"),
    "gray.png": (encoded(noise(mode="L")), "gray to RGB"),
    "gray.jpg": (encoded(noise(mode="L", seed=3), "JPEG"), "gray to RGB"),
    "bits.png": (encoded(noise(mode="L", seed=4).convert("1")), "gray to RGB"),
    "palette.png": (encoded(noise(seed=5).quantize(16)), "palette to RGB"),
    "ink.jpg": (encoded(noise(seed=6).convert("CMYK"), "JPEG"), "CMYK to RGB"),
    "turned.jpg": (exif_turned(), "orientation"),
    "film.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "animated, first frame"),
    "film.png": (encoded(frames[0], save_all=True, append_images=frames[1:]), "animated, first frame"),
    "film.webp": (
        encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "animated, first frame",
    ),
    "map.bmp": (encoded(noise(seed=7), "BMP"), "BMP to PNG"),
    "scan.tiff": (encoded(noise(seed=8), "TIFF"), "TIFF to PNG"),
    "web.webp": (encoded(noise(seed=9), "WEBP", lossless=True), None),
    "really_a_jpeg.png": (encoded(noise(seed=10), "JPEG"), None),
    "Cancel_20.5.final.png": (encoded(noise(seed=11)), None),
    "späce and ünicode 图标.png": (encoded(noise(seed=12)), None),
}


def make(folder: Path) -> tuple[Path, dict[int, str], dict[str, str | None]]:
    """Write images/, and evil.csv beside it.

    Returns:
        The CSV; line -> the reason of its rejection; image -> its fix, for those that are included.
    """
    images = folder / "images"
    (images / "folder.png").mkdir(parents=True)
    for name, (data, _) in {**BAD_FILES, **GOOD_FILES}.items():
        (images / name).write_bytes(data)
    for name in ("plain.png", "twice.png"):
        (images / name).write_bytes(encoded(noise(seed=hash(name) % 2 + 20)))
    (folder / "secret.png").write_bytes(encoded(noise(seed=30)))
    (folder / "secrets").mkdir()
    (folder / "secrets" / "a.png").write_bytes(encoded(noise(seed=31)))
    os.symlink(folder / "secret.png", images / "link_out.png")
    os.symlink(folder / "secrets", images / "linked")
    os.symlink(images / "plain.png", images / "link_in.png")
    os.symlink(images / "nowhere.png", images / "dangling.png")
    os.symlink(images / "loop.png", images / "loop.png")
    os.mkfifo(images / "pipe.png")
    lines: list[tuple[bytes, str]] = []
    lines += [(f"{name},a caption of {name},".encode(), reason) for name, (_, reason) in BAD_FILES.items()]
    lines += [(f"{name},a caption of {name},".encode(), "") for name in GOOD_FILES]
    lines += [
        (b"none.png,missing,", "missing file"),
        (b"sub\\plain.png,a path of another system,", "missing file"),
        (b"plain.png/inside.png,a file is no folder,", "missing file"),
        (b"dangling.png,a link to nothing,", "missing file"),
        (b"loop.png,a link to itself,", "unreadable file"),
        (b"x" * 300 + b".png,a long name,", "unreadable file"),
        (b"folder.png,a folder,", "not a regular file"),
        (b"pipe.png,a pipe,", "not a regular file"),
        (b"../../../../../../etc/passwd,escape,", "outside of the images folder"),
        (b"a/../../secret.png,escape by the middle,", "outside of the images folder"),
        (b"/etc/passwd,absolute,", "outside of the images folder"),
        (b"file:///etc/passwd,URL,", "outside of the images folder"),
        (b"http://127.0.0.1:9/a.png,URL of elsewhere,", "outside of the images folder"),
        (str(folder / "secret.png").encode() + b",absolute beside,", "outside of the images folder"),
        (b"link_out.png,a link that leads out,", "outside of the images folder"),
        (b"linked/a.png,a folder that leads out,", "outside of the images folder"),
        (b"link_in.png,a link that stays,", ""),
        (b",no path,", "no image path"),
        (b"   ,only spaces,", "no image path"),
        (b"plain.png,,", "empty caption"),
        (b"plain.png, \t ,", "empty caption"),
        (b"plain.png", "empty caption"),
        (b"plain.png,a red, round brick,train", "malformed row"),
        (b"plain.png,caf\xe9,", "bad UTF-8"),
        (b"caf\xe9.png,a name of another encoding,", "bad UTF-8"),
        (b"plain.png,NA,", ""),
        (b"plain.png,null,", ""),
        (b"./plain.png,None,", ""),
        (b'plain.png,"two\nlines",', ""),
        (b"plain.png,two lines,", "duplicate row"),
        (b"plain.png,  NA ,", "duplicate row"),
        ("plain.png,\u202eright to left\u200b 🙂 ﬁ,".encode(), ""),
        (b"plain.png," + b"word " * 90 + b",", ""),
        (b"plain.png,\"<script>alert('x')</script>\",", ""),
        (b"twice.png,here,train", ""),
        (b"twice.png,there,val", "conflicting splits"),
        (b"twice.png,again,validation", "conflicting splits"),
        (b"twice.png,nowhere,holdout", "unknown split"),
    ]
    reasons, number, text = {}, 2, b"image,caption,split\n"
    for line, reason in lines:
        if reason:
            reasons[number] = reason
        number += 1 + line.count(b"\n")
        text += line + b"\n"
    (folder / "evil.csv").write_bytes(text)
    fixes = {name: fix for name, (_, fix) in GOOD_FILES.items()} | {
        "plain.png": None,
        "twice.png": None,
        "link_in.png": None,
    }
    return folder / "evil.csv", reasons, fixes
