"""Names of images in URLs: none leads out of --images, and each fails alone."""

import csv
import json
import shutil

import pytest
from conftest import noise_images

from data_prep.build.pipeline import Checking, Parallelism, Reading, build
from data_prep.inputs.locations import ImageLocation, leaves_url, read_all
from data_prep.inputs.names import OUTSIDE, Names

LEAVING = ("../secret.png", ".\t./secret.png", ".\n./secret.png", ".\r./secret.png", "..\\secret.png")
LEAVING += ("%2e%2e/secret.png", ".%2E/secret.png", "%252e%252e/secret.png", "a/..%5csecret.png")
LEAVING += ("\x01../secret.png", "a/.\t./../secret.png", "a/%2e.%2fsecret.png", "..%2fsecret.png")


@pytest.mark.parametrize("name", LEAVING)
def test_no_name_leads_out_of_a_url(name):
    for root in ("https://a.example/images", "http://a.example/images/"):
        assert Names(root).resolve(name)[1], name
        assert Names(root).resolve(f"{root.rstrip('/')}/{name}")[1], name


@pytest.mark.parametrize(
    "url",
    [
        "https://a.example/secret.png",
        "https://a.example/images/.\t./secret.png",
        "https://a.example/images/../secret.png",
        "https://a.example/images/%2e%2e/secret.png",
        "https://a.example:1/images/a.png",
        "https://me@a.example/images/a.png",
        "https://b.example/images/a.png",
        "https://a.example/imagesbeside/a.png",
        "https://a.example:99999999/images/a.png",
    ],
)
def test_what_the_client_makes_of_a_url_is_judged(url):
    assert leaves_url("https://a.example/images", url)
    assert not leaves_url("https://", "https://b.example/a.png")
    for name in ("a.png", "ä b.png", "a%20b.png", "100%.png", "a::b.png", "a?size=../x", "..a/b..png"):
        assert not leaves_url("https://a.example/images", ImageLocation("https://a.example/images", name).url)


def test_a_table_names_images_without_the_login_of_their_server():
    names = Names("http://me:word@a.example/base/")
    for url in ("http://a.example/base/img/7.png", "http://me:word@a.example/base/img/7.png", "img/7.png"):
        assert names.resolve(url) == ("img/7.png", None)
    for url in (
        "http://a.example/7.png",
        "http://you@a.example/base/7.png",
        "http://a.example/base/../7.png",
    ):
        assert names.resolve(url)[1].reason == OUTSIDE
    assert Names("http://a.example/base").resolve("http://me@a.example/base/7.png")[1].reason == OUTSIDE


def test_a_name_of_each_kind_fails_alone(served, tmp_path):
    folder, url = served
    noise_images(folder, 6)
    (folder / "images").mkdir(exist_ok=True)
    for number in range(5):
        shutil.move(folder / f"{number}.png", folder / "images" / f"{number}.png")
    shutil.move(folder / "5.png", folder / "secret.png")
    odd = ["a::b.png", "a::file:///etc/passwd", "zip://x::1.png", "::", "simplecache::1.png", "[::1]/a.png"]
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "caption"))
        writer.writerows((name, f"caption {name!r}") for name in (*odd, *LEAVING))
        writer.writerows((f"{number}.png", f"caption {number}") for number in range(5))
    report = build(
        [str(tmp_path / "rows.csv")],
        tmp_path / "out",
        Reading(images=f"{url}/images"),
        Checking(max_rejects=0.9),
        parallelism=Parallelism(1),
    )
    assert (report["images"], report["rejects"]) == (5, len(odd) + len(LEAVING))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert sum(split["samples"] for split in manifest["splits"].values()) == 5


def test_the_first_url_of_a_chunk_does_not_choose_how_the_others_are_read(served):
    folder, url = served
    (folder / "a.bin").write_bytes(b"a")
    locations = [ImageLocation(url, name) for name in ("memory://x::a.bin", "a.bin", "..\\..\\x", "a.bin")]
    read = list(read_all(locations))
    assert read[1] == read[3] == b"a"
    assert not isinstance(read[0], bytes)
