"""Formats of images: SVG, HEIC, AVIF and others are decoded or named, and nothing in an SVG is followed."""

import base64
import gzip
import io
import os
import signal
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, png
from evil import encoded, header, noise, png_of
from other_formats import HALF, RECT, drawing, heic
from PIL import Image, ImageDraw, PngImagePlugin

from data_prep import child, images, svg
from data_prep.build.pipeline import Parallelism, Reading, build
from data_prep.images import BadImage, Rules, check
from data_prep.signatures import kind_of


def pixels(data: bytes, **rules) -> np.ndarray:
    checked = check(data, Rules(**rules))
    return np.asarray(Image.open(io.BytesIO(checked.data or data)).convert("RGB"))


def reason(data: bytes, **rules) -> str:
    with pytest.raises(BadImage) as caught:
        check(data, Rules(**rules))
    return str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        drawing(HALF),
        drawing(HALF, before='<?xml version="1.0" encoding="windows-1252"?>\n<!-- made by hand -->\n'),
        drawing(HALF).decode().encode("utf-16"),
        b"\xef\xbb\xbf" + drawing(HALF),
        gzip.compress(drawing(HALF)),
        drawing(HALF).replace(b' xmlns="http://www.w3.org/2000/svg"', b""),
        drawing(HALF.replace("rect", "s:rect"), before="")
        .replace(b"<svg xmlns=", b"<s:svg xmlns:s=")
        .replace(b"</svg", b"</s:svg"),
        b'<!DOCTYPE svg [<!ENTITY blue "#0000ff">]>' + drawing(HALF.replace("#0000ff", "&blue;")),
        drawing(HALF, w="50pt", h="50pt").replace(b"width=", b'viewBox="0 0 50 50" width=', 1),
        drawing(HALF, w="100%", h="100%").replace(b"width=", b'viewBox="0 0 50 50" width=', 1),
    ],
    ids=["plain", "declared", "utf-16", "bom", "svgz", "no namespace", "prefix", "entity", "pt", "percent"],
)
def test_an_svg_is_drawn_on_the_background(data):
    expected = np.full((64, 64, 3), 255, np.uint8)
    expected[:, :32] = (0, 0, 255)
    np.testing.assert_array_equal(pixels(data, svg_px=64), expected)
    expected[:, 32:] = (1, 2, 3)
    np.testing.assert_array_equal(pixels(data, svg_px=64, background=(1, 2, 3)), expected)
    assert check(data, Rules(svg_px=64)).fixes == ("SVG to PNG", "transparency")


def test_an_svg_keeps_its_aspect():
    assert pixels(drawing(HALF, w="100", h="50"), svg_px=32).shape == (32, 64, 3)
    only_width = drawing(HALF, w="10").replace(b'height="50"', b'viewBox="0 0 50 100"', 1)
    assert pixels(only_width, svg_px=32).shape == (64, 32, 3)
    assert reason(drawing(w="1", h="1000"), svg_px=32).startswith("extreme aspect")
    assert reason(drawing(w="1", h="10000000"), svg_px=32).startswith("too many pixels (32 x 320000000")
    no_size = drawing().replace(b'width="50" height="50"', b"", 1)
    assert reason(no_size) == "SVG cannot be rendered (it has neither width and height nor a viewBox)"


def test_text_of_an_svg_is_the_same_on_every_machine():
    text = '<text x="4" y="40" font-size="40" font-family="{}">Ag</text>'
    named, default = (
        pixels(drawing(text.format(family)), svg_px=64) for family in ("Helvetica Neue", "serif")
    )
    np.testing.assert_array_equal(named, default)
    assert 0.05 < (named < 128).mean() < 0.5


@pytest.mark.parametrize("tag", ["image", "feImage"])
@pytest.mark.parametrize("attribute", ["href", "xlink:href"])
@pytest.mark.parametrize("form", ["file://{}", "{}", " {}", "secret.png", "../secret/secret.png", "&name;"])
def test_an_svg_reads_no_file(tmp_path, monkeypatch, tag, attribute, form):
    """The renderer itself would read each of these but file:."""
    (tmp_path / "secret").mkdir()
    secret = tmp_path / "secret" / "secret.png"
    Image.new("RGB", (50, 50), "blue").save(secret)
    monkeypatch.chdir(secret.parent)
    body = f'<{tag} {attribute}="{form.format(secret)}" width="50" height="50"/>'
    if tag == "feImage":
        body = f'<filter id="f">{body}</filter><rect width="50" height="50" filter="url(#f)"/>'
    mark = '<rect width="5" height="5" fill="red"/>'
    data = f'<!DOCTYPE svg [<!ENTITY name "{secret}">]>'.encode() + drawing(body + mark)
    blue = (pixels(data) == (0, 0, 255)).all(-1)
    assert not blue.any()
    assert check(data).fixes[:2] == ("SVG to PNG", "SVG without the files that it names")


def test_a_file_behind_a_stylesheet_or_in_a_nested_svg_is_not_read(tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (50, 50), "blue").save(secret)
    inner = base64.b64encode(drawing(f'<image href="{secret}" width="50" height="50"/>')).decode()
    for body in (
        f'<image href="data:image/svg+xml;base64,{inner}" width="50" height="50"/>',
        f'<style>@import url({secret}); image {{ href: url("{secret}") }}</style><image />',
        f'<use href="{secret}#a"/>',
        f'<rect width="50" height="50" fill="url({secret})"/>',
    ):
        assert (
            not (pixels(drawing(body + '<rect width="5" height="5" fill="red"/>')) == (0, 0, 255))
            .all(-1)
            .any()
        )


def test_an_image_inside_of_an_svg_is_drawn():
    inner = base64.b64encode(png(Image.new("RGB", (9, 9), "blue"))).decode()
    body = f'<image href="data:image/png;base64,{inner}" width="25" height="50" preserveAspectRatio="none"/>'
    assert (pixels(drawing(body), svg_px=64)[32, 16] == (0, 0, 255)).all()


def laughs() -> str:
    entities = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 11))
    return f'<!DOCTYPE svg [<!ENTITY a0 "lol">{entities}]>'


def uses() -> str:
    return "".join(f'<g id="a{n}">{f"""<use href="#a{n - 1}"/>""" * 10}</g>' for n in range(9))


def bomb(side: int = 20_000) -> str:
    packer = zlib.compressobj()
    packed = b"".join(packer.compress(bytes(3 * side + 1)) for _ in range(side)) + packer.flush()
    image = base64.b64encode(png_of(header(side, side), (b"IDAT", packed), (b"IEND", b""))).decode()
    return f'<image href="data:image/png;base64,{image}" width="50" height="50"/>'


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"<svg <<", "not well-formed"),
        (drawing().replace(b"</svg>", b""), "no element found"),
        (
            b'<!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + drawing("<text>&x;</text>"),
            "undefined entity",
        ),
        (drawing("<text>&a10;</text>", before=laughs()), "amplification"),
        (drawing(uses()), "limit"),
        (drawing("<g>" * 5000 + "</g>" * 5000), "nested too deeply"),
        (drawing('<g transform="scale(1.1)">' * 900 + RECT + "</g>" * 900), "the renderer crashed on it"),
        (gzip.compress(b"<svg>" + bytes(80_000_000)), "64 MiB"),
        (gzip.compress(drawing())[:-20], "truncated"),
    ],
    ids=["garbage", "cut", "external entity", "laughs", "uses", "deep", "crash", "svgz bomb", "half svgz"],
)
def test_an_evil_svg_is_a_reject_and_the_next_one_is_drawn(data, detail):
    text = reason(data)
    assert text.startswith("SVG cannot be rendered (")
    assert detail in text
    assert pixels(drawing(HALF), svg_px=8).shape == (8, 8, 3)


@pytest.mark.slow
def test_time_and_memory_of_an_svg_are_bounded():
    endless = '<filter id="f"><feTurbulence numOctaves="100000000"/></filter>'
    used = '<rect width="50" height="50" filter="url(#f)"/>'
    assert "takes more than 10 seconds" in reason(drawing(endless + used))
    assert "more than 2 GiB of memory" in reason(drawing(bomb(30_000)))


def test_a_renderer_that_is_killed_from_outside_is_started_again():
    expected = pixels(drawing(HALF), svg_px=32)
    os.kill(child.own("data_prep.svg:_answer", svg.MAX_SECONDS, svg.MAX_MEMORY)._child.pid, signal.SIGTERM)
    np.testing.assert_array_equal(pixels(drawing(HALF), svg_px=32), expected)


def test_threads_and_forks_have_a_renderer_of_their_own():
    expected, found = pixels(drawing(HALF), svg_px=32), []
    threads = [
        threading.Thread(target=lambda: found.append(pixels(drawing(HALF), svg_px=32))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all((image == expected).all() for image in found)
    fork = os.fork()
    if not fork:
        os._exit(0 if (pixels(drawing(HALF), svg_px=32) == expected).all() else 1)
    assert os.waitpid(fork, 0)[1] == 0
    np.testing.assert_array_equal(pixels(drawing(HALF), svg_px=32), expected)


def test_a_module_in_the_working_folder_is_not_imported_by_the_renderer(tmp_path):
    for name in ("resvg_py.py", "struct.py", "data_prep.py"):
        (tmp_path / name).write_text("raise SystemExit('hijacked')")
    code = (
        f"import sys; sys.path[0] = {str(ROOT)!r}; from data_prep.svg import render;"
        f" print(len(render({drawing(HALF)!r}, 32, 10**6).png) > 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"


def test_without_the_packages_the_reject_says_what_to_install(monkeypatch):
    data = heic(noise(64, 48))
    monkeypatch.setattr(images, "installed_version", lambda package: "")
    assert reason(drawing()) == "SVG: install resvg-py (pip install resvg-py)"
    assert reason(data) == "HEIC: install pillow-heif (pip install pillow-heif)"


def test_heic_avif_ico_and_jpeg_2000_are_read():
    image = Image.new("RGB", (64, 48), (10, 20, 200))
    ImageDraw.Draw(image).rectangle((0, 0, 31, 47), fill=(200, 20, 10))
    for name, data in {
        "HEIF": heic(image, quality=95),
        "AVIF": encoded(image, "AVIF", quality=95),
        "ICO": encoded(image.resize((48, 48)), "ICO"),
        "JPEG2000": encoded(image, "JPEG2000"),
    }.items():
        assert kind_of(data[:64]).name == name
        found = pixels(data)
        assert np.abs(found[24, 8].astype(int) - (200, 20, 10)).max() < 12, name
        assert np.abs(found[24, 40].astype(int) - (10, 20, 200)).max() < 12, name
        assert check(data).fixes[0] == f"{name} to PNG"
        for cut in (data[: len(data) // 2], data[:40]):
            assert reason(cut).split(" (")[0] in ("damaged image", "truncated image"), name


@pytest.mark.parametrize("format", ["HEIF", "AVIF", "JPEG2000", "ICO", "SVG"])
def test_a_mutated_file_is_an_image_or_a_reject(format):
    image, rng = noise(48, 48), np.random.default_rng(0)
    data = {"HEIF": heic, "SVG": lambda _: drawing(HALF)}.get(format, lambda image: encoded(image, format))(
        image
    )
    rejected = 0
    for _ in range(150):
        mutated = bytearray(data)
        for at in rng.integers(0, min(len(data), 400), 4):
            mutated[at] = rng.integers(256)
        try:
            check(bytes(mutated))
        except BadImage:
            rejected += 1
    assert rejected > 10


def test_a_bomb_in_an_icon_is_refused_by_its_header():
    bomb = png_of(header(12_000, 12_000), (b"IDAT", b""), (b"IEND", b""))
    ico = encoded(noise(48, 48), "ICO")
    start = ico.index(b"\x89PNG")
    data = ico[: start - 8] + struct.pack("<II", len(bomb), start) + bomb
    assert reason(data) == "too many pixels (12000 x 12000; see --max-pixels)"


def test_a_heic_that_is_turned_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert pixels(heic(noise(64, 48), exif=exif.tobytes())).shape == (64, 48, 3)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "base64"])
def test_svgs_in_a_table(tmp_path, kind):
    """As data sets of icons on the Hugging Face hub have them: the text of the SVG in a column."""
    texts = [
        drawing(HALF).decode(),
        '<?xml version="1.0"?>' + drawing(HALF.replace("0000ff", "ff0000")).decode(),
    ]
    if kind == "base64":
        texts = [base64.b64encode(text.encode()).decode() for text in texts]
    table = pd.DataFrame({"Svg": texts, "caption": ["blue", "red"]})
    path = tmp_path / f"icons.{kind if kind != 'base64' else 'csv'}"
    {
        ".csv": lambda: table.to_csv(path, index=False),
        ".jsonl": lambda: table.to_json(path, orient="records", lines=True),
        ".parquet": lambda: table.to_parquet(path),
    }[path.suffix]()
    report = build([str(path)], tmp_path / "out", Reading("Svg"), parallelism=Parallelism(1))
    assert (report["images"], report["fixes"]["SVG to PNG"]) == (2, 2)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"%PDF-1.7\n", "PDF is not supported"),
        (b"8BPS\0\1" + bytes(20), "Photoshop (PSD) is not supported"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL is not supported"),
        (encoded(noise(), "PPM"), "PNM (PBM, PGM, PPM) is not supported"),
        (encoded(noise(64, 64), "ICNS"), "ICNS is not supported"),
        (b"\0\0\0\x20ftypisom" + bytes(30), "video (MP4, MOV) is not supported"),
        (b"PK\3\4" + bytes(30), "ZIP is not supported"),
        (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "XML is not supported"),
        (b'{"error": "not found"}', "JSON is not supported"),
        (
            b"\n<!DOCTYPE html><html><body><svg></svg>",
            "HTML page, not an image (it is what a server answered instead of the image)",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
            "Git LFS pointer, not an image (get the image by: git lfs pull)",
        ),
        (b"hello world", "not an image (it begins with b'hello world')"),
    ],
)
def test_other_files_are_named(data, text):
    assert reason(data) == text


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt"])
def test_a_png_with_a_large_text_is_a_good_image(mode, kind):
    info, image = PngImagePlugin.PngInfo(), noise(mode="RGB").convert(mode)
    text = "workflow " * 300_000
    if kind == "iTXt":
        info.add_itxt("prompt", text, zip=True)
    else:
        info.add_text("prompt", text, zip=kind == "zTXt")
    data = encoded(image, pnginfo=info)
    assert len(data) > 2_000_000 or kind != "tEXt"
    np.testing.assert_array_equal(pixels(data), np.asarray(image.convert("RGB")))
    assert check(data).fixes[0] == "large text left out"
    small = encoded(image, pnginfo=PngImagePlugin.PngInfo())
    assert check(data).pixels == check(small).pixels
    assert len(check(data).data) < 10_000


def gray(levels: np.ndarray, format: str = "PNG", white: int = 0) -> bytes:
    """A gray image whose file says which value is white."""
    if format == "TIFF":
        return encoded(Image.fromarray(levels), format, tiffinfo={281: white} if white else {})
    data = encoded(Image.fromarray(levels))
    if not white:
        return data
    chunk = b"sBIT" + bytes([white.bit_length()])
    return data[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def test_12_bits_in_16_or_32_are_scaled_by_what_the_file_says_or_named():
    ramp = np.arange(4096).reshape(64, 64)
    expected = np.repeat(np.round(ramp / 4095 * 255).astype(np.uint8)[..., None], 3, 2)
    for data in (
        gray(ramp.astype(np.uint16), white=4095),
        gray(ramp.astype(np.uint16), "TIFF", white=4095),
        gray(ramp.astype(np.int32), "TIFF", white=4095),
    ):
        np.testing.assert_array_equal(pixels(data), expected)
        assert check(data).fixes[-1] == "16 bit"
    for data in (gray(ramp.astype(np.uint16)), gray(ramp.astype(np.uint16), "TIFF")):
        assert reason(data).startswith("nearly black in 16 bit (no value is above 4095 of 65535; ")
    unknown = reason(gray(ramp.astype(np.int32), "TIFF"))
    assert (
        unknown
        == "range of gray unknown (32-bit gray with values from 0 to 4095; convert it to 8 or 16 bits)"
    )
    scaled = ramp.astype(np.uint16) * 16  # sBIT of a file that was scaled, as the standard asks
    np.testing.assert_array_equal(pixels(gray(scaled, white=4095))[..., 0], np.round(scaled / 257))


def test_16_bit_rgb_that_is_nearly_black_is_named():
    values = np.random.default_rng(0).integers(0, 4096, (16, 48)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    data = png_of(header(16, 16, depth=16), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    assert reason(data).startswith("nearly black in 16 bit")
