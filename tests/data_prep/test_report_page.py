"""report.html: the counts of the report, thumbnails that decode, and no effect of untrusted text."""

import base64
import csv
import io
import json
import random
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from types import SimpleNamespace

import pytest
from PIL import Image, ImageDraw

from data_prep.build.options import Checking, Parallelism, Reading, Splitting
from data_prep.build.pipeline import build
from data_prep.build.split import SPLITS
from data_prep.report.page import THUMBNAIL_BYTES, THUMBNAIL_PX, _choose

EVIL = """<script>alert(1)</script>"'><img src=https://evil.example/x onerror=alert(2)> {body} & \u202e"""
LONG = "a caption that goes on and on " * 20


class Page(HTMLParser):
    """What a browser would see: tags, attributes, and text by tag."""

    def __init__(self, source: str):
        super().__init__()
        self.source, self.tags, self.attributes, self.text = source, set(), [], ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_data(self, data):
        self.text += data

    @property
    def thumbnails(self) -> list[Image.Image]:
        uris = [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        assert all(uri.startswith("data:image/webp;base64,") for uri in uris)
        data = [base64.b64decode(uri.partition(",")[2], validate=True) for uri in uris]
        assert all(len(content) <= THUMBNAIL_BYTES for content in data)
        thumbnails = [Image.open(io.BytesIO(content)) for content in data]
        for thumbnail in thumbnails:
            thumbnail.load()
        return thumbnails

    def section(self, title: str) -> str:
        """The source from a heading to the next one as high."""
        _, found = self.source.split(f"<h2>{title}", 1)
        return found.split("<h2>")[0]


def drawing(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    randoms = random.Random(seed)
    image = Image.new("RGB", size, "white")
    for _ in range(12):
        x, y = randoms.randrange(size[0]), randoms.randrange(size[1])
        color = tuple(randoms.randrange(256) for _ in range(3))
        ImageDraw.Draw(image).rectangle([x, y, x + size[0] // 4, y + size[1] // 4], color)
    return image


def write_csv(folder, rows):
    with open(folder / "rows.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption", "group", "split"), *rows])
    return str(folder / "rows.csv")


def page_of(table, out, read=None, check=None, split=None) -> tuple[Page, dict]:
    read = read or Reading(group_column="group", split_column="split")
    build(
        [table],
        out,
        read=read,
        check=check or Checking(max_rejects=1.0),
        split=split or Splitting(),
        parallelism=Parallelism(processes=1),
    )
    return Page((out / "report.html").read_text(encoding="utf-8")), json.loads(
        (out / "report.json").read_text()
    )


@pytest.fixture(scope="module")
def nasty(tmp_path_factory) -> tuple[Page, dict]:
    """Everything at once: all reasons for rejects, HTML in texts, a giant group, and a leak across splits."""
    folder = tmp_path_factory.mktemp("nasty")
    (folder / "in").mkdir()
    rows = []

    def add(name, caption="a caption", group="", split="train", data: bytes | Image.Image = b""):
        if isinstance(data, Image.Image):
            data.save(folder / "in" / name)
        elif data:
            (folder / "in" / name).write_bytes(data)
        rows.append((name, caption, group, split))

    for number in range(40):
        add(
            f"{number:02}.png",
            f"drawing {number}",
            "giant" if number < 30 else f"group {number}",
            data=drawing(number),
        )
    evil = "<script>alert(3)<script>.png"
    add(evil, EVIL, EVIL, data=drawing(50))
    add(f"{evil}.gone.png", EVIL)
    add("long.png", LONG, data=drawing(51))
    for name, split in (("left.png", "train"), ("right.png", "test")):
        add(name, f"seen in {split}", split=split, data=drawing(60))
    with Image.open(folder / "in" / "right.png") as image:
        image.putpixel((0, 0), (1, 2, 3))
        image.save(folder / "in" / "right.png")
    drawing(70).save(folder / "secret.png")
    (folder / "in" / "link.png").symlink_to(folder / "secret.png")
    add("link.png")
    add("../secret.png")
    add("text.png", data=b"no image")
    add("bomb.png", data=Image.new("1", (9000, 9000)))
    add("blank.png", data=Image.new("RGB", (20, 20), "red"))
    add("tiny.png", data=drawing(71, (4, 4)))
    add("noise.tiff", "noise", split="test", data=Image.effect_noise((200, 200), 100))
    add("00.png", "")
    add("nul\0.png")
    add("01.png", "drawing 1", "giant")
    return page_of(write_csv(folder / "in", rows), folder / "out")


def test_untrusted_text_has_no_effect_and_nothing_is_fetched(nasty):
    page, _ = nasty
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not [
        name
        for _, name, _ in page.attributes
        if name.startswith("on") or name in ("href", "srcset", "background")
    ]
    assert all(value.startswith("data:") for _, name, value in page.attributes if name == "src")
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert EVIL in page.text
    assert "<script>alert(3)<script>.png.gone.png" in page.text
    assert (
        "meta",
        "content",
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    ) in page.attributes


def test_counts_are_those_of_the_report(nasty):
    page, report = nasty
    numbers = dict(re.findall(r"<dt>(?:[=+] )?(\w+)<dd>([\d,]+)", page.source))
    assert {name: int(value) for name, value in numbers.items()} == {name: report[name] for name in numbers}
    assert list(numbers) == ["rows", "records", "rejects", "images", "groups"]
    for title, found in (("Rejected rows", report["reasons"]), ("Changed images", report["fixes"])):
        cells = re.findall(r"<th scope=row>([^<]+)<td>([\d,]+)", page.section(title))
        assert {label: int(count) for label, count in cells} == found
    splits = re.findall(
        r"<th scope=row>(\w+)<td>(\d+).*?<td class=note>(\d+) captions, (\d+) groups",
        page.section("Images of each split"),
    )
    expected = [
        (split, counts["images"], counts["captions"], counts["groups"])
        for split, counts in report["splits"].items()
    ]
    assert [(split, *map(int, counts)) for split, *counts in splits] == expected


def test_each_reason_has_examples_with_thumbnails_where_they_decode(nasty):
    page, report = nasty
    assert len(report["reasons"]) >= 9, report["reasons"]
    n_images = {}
    for reason, count in report["reasons"].items():
        _, found = page.section("Rejected rows").split(f"<h3>{reason} ")
        found = found.split("<h3>")[0]
        assert found.count("<figure") == min(3, count)
        assert found.count("<figcaption>line ") == min(3, count)
        n_images[reason] = found.count("<img")
    seen = {reason for reason, count in n_images.items() if count}
    assert seen == {"blank image", "too small", "empty caption", "duplicate row"}


def test_every_thumbnail_decodes_and_is_small(nasty):
    page, report = nasty
    assert report["fixes"]["TIFF to PNG"] == 1
    thumbnails = page.thumbnails
    assert len(thumbnails) > 24
    assert max(max(thumbnail.size) for thumbnail in thumbnails) == 96 == THUMBNAIL_PX
    assert len(page.source) < 300_000


def test_warnings_come_first(nasty):
    page, report = nasty
    warnings = page.source.partition("<ul class=warnings>")[2].partition("</ul>")[0]
    for words in (
        "rows were rejected",
        "val is empty",
        "1 caption (2.2%) will be truncated",
        "1 near-identical pair across splits",
        "giant”",
    ):
        assert words in warnings, words
    assert page.source.index("<ul class=warnings>") < page.source.index("<h2>")
    assert LONG[:200] in page.section("Length of captions")
    assert report["captions_truncated"] == 1


def test_a_leak_is_shown_as_a_pair(nasty):
    page, report = nasty
    assert report["leaks"] == 1
    (pair,) = re.findall(r"<div class=pair>(.*?)</div></div>", page.section("Near-identical"), re.DOTALL)
    assert re.findall(r"<figcaption>(\w+)<br>([\w.]+)", pair) == [
        ("train", "left.png"),
        ("test", "right.png"),
    ]
    assert pair.count("<img") == 2


def test_samples_are_evenly_spaced_and_the_largest_group_is_shown(nasty):
    page, report = nasty
    assert page.section("train ").count("<figure") == 24
    assert page.section("test ").count("<figure") == report["splits"]["test"]["images"] == 2
    assert "<code>giant</code> <small>30 images, in train</small>" in page.section("Groups")


def test_the_largest_groups_are_found_among_many_more_than_are_kept():
    randoms = random.Random(0)
    sizes = {group: randoms.choice((1, 1, 1, 2, 3, 9)) for group in range(5000)} | {
        7: 40,
        4998: 41,
        4999: 42,
        3: 43,
        2500: 44,
    }
    groups = [group for group, size in sizes.items() for _ in range(size)]
    randoms.shuffle(groups)
    images = [
        SimpleNamespace(group=group, split="train" if at % 2 else "test", at=at)
        for at, group in enumerate(groups)
    ]
    n_images = Counter(image.split for image in images)
    samples, largest = _choose(
        SimpleNamespace(rows=len(images), n_images=n_images, images=lambda: iter(images))
    )
    assert [(size, images[0].group) for size, images in largest] == [
        (44, 2500),
        (43, 3),
        (42, 4999),
        (41, 4998),
        (40, 7),
    ]
    assert all(1 <= len(images) <= 6 and len({image.group for image in images}) == 1 for _, images in largest)
    assert [len(samples[split]) for split in SPLITS] == [24, 0, 24]
    steps = {b.at - a.at for a, b in pairwise(samples["train"])}
    assert max(steps) - min(steps) <= 2


def test_two_builds_give_one_page(tmp_path):
    for number in range(30):
        drawing(number).save(tmp_path / f"{number}.png")
    table = write_csv(
        tmp_path, [(f"{number}.png", f"drawing {number}", f"{number}", "") for number in range(30)]
    )
    first, report = page_of(table, tmp_path / "a")
    assert page_of(table, tmp_path / "b")[0].source == first.source
    assert report["rejects"] == 0
    assert "No group has two images." in first.text


def test_a_page_without_warnings_and_one_of_images_that_were_not_decoded(tmp_path):
    for number in range(9):
        drawing(number).save(tmp_path / f"{number}.png")
    splits = ("train", "val", "test")
    table = write_csv(
        tmp_path, [(f"{number}.png", f"drawing {number}", "", splits[number % 3]) for number in range(9)]
    )
    page, _ = page_of(table, tmp_path / "checked")
    assert "No problems were found." in page.text
    page, _ = page_of(table, tmp_path / "undecoded", check=Checking(skip_decode=True))
    assert "Images were not decoded (--skip-decode)" in page.text
    assert "Not searched: the images were not decoded." in page.text
    assert len(page.thumbnails) == 9
