"""Images that are small in bytes and pixels, and slow to decode: each is a reject, none is a stall."""

import csv
import os
import random
import struct
import threading
import time

import numpy as np
import pytest
import slow_images
from evil import encoded, noise, png_of
from PIL import Image

from data_prep import images, parts
from data_prep.build.pipeline import Checking, Parallelism, Reading, build
from data_prep.child import Child, Died
from data_prep.images import BadImage, Rules, check, rgb
from train.data.decode import decode, decoded

ANY_SIZE = Rules(min_side_px=1, max_aspect=float("inf"))


def reason(data: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        check(data)
    return str(caught.value)


def exif_of(n: int, size: int) -> bytes:
    """EXIF with `n` tags of the same bytes."""
    return slow_images.tags(n, size)


def icon_of(png: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 32, 32, 0, 0, 1, 32, len(png), 22) + png


EXIF_CHUNK = (b"eXIf", exif_of(1000, 1 << 16))
PROFILES = slow_images.chunks(9, b"iCCP", slow_images.packed(1 << 20))
SLOW = {
    "scans": (lambda: slow_images.scans(101), "101 scans; at most 100 are decoded"),
    "all scans": (lambda: slow_images.scans(883), "883 scans"),
    "scans of a frame without progression": (lambda: slow_images.sequential_scans(5000), "5,000 scans"),
    "segments": (lambda: slow_images.segments(100_000), "more than 1,000 segments"),
    "chunks": (lambda: slow_images.chunks(100_001), "more than 100,000 chunks"),
    "chunks of a plain PNG": (lambda: slow_images.chunks(100_001, color=2), "more than 100,000 chunks"),
    "profiles": (lambda: PROFILES, "more than 8 color profiles"),
    "profiles in an icon": (lambda: icon_of(PROFILES), "more than 8 color profiles"),
    "comments": (lambda: slow_images.comments(10_001), "more than 10,000 blocks of comments"),
    "junk": (lambda: slow_images.frames(1, b"\1" * 10_001), "more than 10,000 blocks of comments"),
    "data": (lambda: slow_images.frames(1, data=b"\1a" * 1_000_001), "more than 1,000,000 blocks of pixels"),
    "tags": (lambda: slow_images.tags(5000, 8), "tags; at most 4,096 are read"),
    "equal tags": (lambda: slow_images.tags(1000, 1 << 20), "tags that name the same bytes"),
    "EXIF of PNG": (
        lambda: png_of(*slow_images.parts_of(encoded(noise(mode="RGBA"))), EXIF_CHUNK, (b"IEND", b"")),
        "tags that name the same bytes",
    ),
    "EXIF of WebP": (
        lambda: encoded(noise(), "WEBP", exif=exif_of(1000, 1 << 16)),
        "tags that name the same bytes",
    ),
    "EXIF of JPEG": (
        lambda: encoded(noise(), "JPEG", exif=b"Exif\0\0" + exif_of(1000, 40_000)),
        "tags that name the same bytes",
    ),
}


@pytest.mark.parametrize("name", SLOW)
def test_what_is_slow_to_open_is_refused_by_its_parts(name):
    make, detail = SLOW[name]
    text = reason(make())
    assert text.startswith("slow to decode (")
    assert detail in text


# What is below the limits, and what it equals.
QUICK = {
    "segments": (lambda: slow_images.segments(900), lambda: slow_images.segments(0)),
    "pages": (lambda: slow_images.pages(40_000), lambda: slow_images.pages(2)),
    "frames": (lambda: slow_images.frames(200_000), lambda: slow_images.frames(2)),
    "frames of PNG": (lambda: slow_images.animated_png(20_000), lambda: slow_images.animated_png(2)),
    "comments": (lambda: slow_images.comments(9999), lambda: slow_images.comments(0)),
    "chunks": (lambda: slow_images.chunks(90_000), lambda: slow_images.chunks(0)),
    "texts": (
        lambda: slow_images.chunks(20_000, b"zTXt", slow_images.packed(1 << 20)),
        lambda: slow_images.chunks(2, b"zTXt", slow_images.packed(1 << 20)),
    ),
    "profile": (lambda: slow_images.chunks(1, b"iCCP", slow_images.packed(9)), lambda: slow_images.chunks(0)),
    "tags": (lambda: slow_images.tags(4000, 8), lambda: slow_images.tags(0, 8)),
    "after the end": (lambda: slow_images.scans(3) + b"\xff\xda" * 1000, lambda: slow_images.scans(3)),
}


@pytest.mark.parametrize("name", QUICK)
def test_below_the_limits_extra_parts_change_nothing(name):
    many, few = (make() for make in QUICK[name])
    start = time.process_time()
    found = check(many)
    assert time.process_time() - start < 5
    expected = check(few)
    assert (found.pixels, found.fixes) == (expected.pixels, expected.fixes)


def test_a_hundred_scans_are_decoded():
    found = check(slow_images.scans(100, 400, 200))
    assert (found.width, found.height, found.fixes) == (400, 200, ("gray to RGB",))


@pytest.mark.parametrize("progressive", [False, True])
def test_ordinary_jpegs_have_few_parts(progressive):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 1, "\xda" * 500
    for mode in ("RGB", "L", "CMYK"):
        data = encoded(noise(300, 200, mode), "JPEG", progressive=progressive, exif=exif.tobytes())
        assert parts.excess(data, "JPEG") == ""
        assert check(data).fixes == check(encoded(noise(300, 200, mode), "JPEG")).fixes


def test_damaged_files_are_no_excess_and_no_error():
    chance = random.Random(0)
    kinds = {"PNG": PROFILES, "JPEG": slow_images.scans(4), "GIF": slow_images.comments(9)}
    kinds |= {"TIFF": slow_images.tags(9, 8), "EXIF": encoded(noise(), "TIFF")}
    for format, whole in kinds.items():
        for _ in range(300):
            data = bytearray(whole[: chance.randrange(len(whole))])
            for _ in range(chance.randrange(4)):
                data[chance.randrange(len(data) + 1) :][:1] = bytes([chance.randrange(256)])
            assert isinstance(parts.excess(bytes(data), format), str)


@pytest.mark.parametrize(
    "data", [slow_images.scans(101), PROFILES, slow_images.sequential_scans(200)], ids=["jpeg", "png", "rgb"]
)
def test_training_refuses_them_in_shards_of_other_makers(data):
    for read in (decode, decoded):
        with pytest.raises(BadImage, match="slow to decode"):
            read(data)


def variants() -> dict[str, bytes]:
    """Ordinary images of every format, and of every mode that has to be changed."""
    found = {f"{format} {mode}": encoded(noise(40, 30, mode), format) for format, mode in (
        ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "L"), ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"),
        ("WEBP", "RGB"), ("WEBP", "RGBA"), ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "RGBA"),
        ("JPEG2000", "RGB"), ("ICO", "RGBA"), ("AVIF", "RGB"),
    )}  # fmt: skip
    gray = Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 60)
    return found | {
        "GIF": slow_images.frames(3),
        "pages": slow_images.pages(3),
        "16 bit": encoded(gray, "TIFF"),
    }


@pytest.mark.parametrize("name", variants())
def test_pixels_are_those_of_the_build_with_and_without_a_child(name):
    data = variants()[name]
    expected = np.asarray(decode(check(data, ANY_SIZE).data or data))
    child = images.child_decoder(10)
    for found in (rgb(data, ANY_SIZE), rgb(data, ANY_SIZE, child)):
        np.testing.assert_array_equal(found, expected)
    child.close()


def test_a_child_that_takes_too_much_dies_and_the_next_request_has_a_new_one():
    for answer, memory, why, words in (
        ("slow_images:endless", 1 << 30, "slow", "more than 1 second"),
        ("slow_images:crashing", 1 << 30, "crash", "crashed"),
    ):
        child = Child(answer, 1, memory)
        with pytest.raises(Died, match=words) as caught:
            child.ask(b"cra", b"sh")
        assert caught.value.reason == why
        child.close()
    child = Child("slow_images:crashing", 1, 1 << 30)
    first = child.ask(b"one")
    with pytest.raises(Died):
        child.ask(b"crash")
    second = child.ask(b"one")
    assert first[:3] == second[:3] == b"one"
    assert first != second
    child.close()


def test_a_child_without_memory_is_a_reject():
    child = Child("data_prep.images:_answer", 60, 400 << 20)
    with pytest.raises(BadImage, match=r"too much memory to decode|the decoder crashed on it"):
        rgb(slow_images.scans(2, 7000, 7000), decoder=child)
    np.testing.assert_array_equal(rgb(encoded(noise()), decoder=child), np.asarray(noise()))
    child.close()


def test_a_child_is_ended_while_it_works():
    child, found = Child("slow_images:endless", 60, 1 << 30), []

    def ask() -> None:
        try:
            child.ask(b"")
        except Died as died:
            found.append(str(died))

    thread = threading.Thread(target=ask)
    thread.start()
    while child._child is None:
        time.sleep(0.01)
    child.end()
    thread.join(20)
    assert found == ["this process ends"]


@pytest.fixture(scope="module")
def slow_image() -> bytes:
    return encoded(noise(1500, 1500), "JPEG2000")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_slow_image_is_a_listed_reject_of_the_build(processes, slow_image, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_SECONDS", 0)  # one second is left, of which the child's start takes some
    files = {
        "slow.jp2": slow_image,
        "scans.jpg": slow_images.scans(200),
        "good.gif": slow_images.frames(2),
        "good.png": encoded(noise(seed=3)),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    rows = "".join(f"{name},a caption of {name}\n" for name in files)
    (tmp_path / "table.csv").write_text(f"image,caption\n{rows}")
    out = tmp_path / "out"
    report = build(
        [str(tmp_path / "table.csv")],
        out,
        Reading(images=str(tmp_path)),
        Checking(max_rejects=0.9),
        parallelism=Parallelism(processes),
    )
    assert (report["records"], report["reasons"]) == (2, {"slow to decode": 2})
    with open(out / "rejects.csv", newline="") as file:
        assert {row["path"] for row in csv.DictReader(file)} == {"slow.jp2", "scans.jpg"}
    assert os.path.getsize(out / "report.html") > 0
