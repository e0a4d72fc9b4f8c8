"""Tars behind URLs are indexed by their headers, and the index is that of the same tars on this machine."""

import io
import os
import random
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import assert_mistake, call_here, png
from PIL import Image
from runs import assert_bit_equal, no_validation, recipe, trained
from stores import s3, upload
from test_index import write_tars

import data_prep.__main__
from data_prep.build.pipeline import Checking, Parallelism, index
from data_prep.build.split import SPLITS
from data_prep.errors import UserError
from data_prep.inputs.rows import Input
from data_prep.inputs.tars import read_tar
from data_prep.review.gallery import Gallery
from data_prep.shards import Shards, altered, read_manifest
from data_prep.store import cache
from data_prep.store.reader import FAR, MAX_BLOCK, MIN_BLOCK, StoreReader
from data_prep.store.remote import file_at
from data_prep.verify import verify
from train.data.loader import TrainPairs
from train.data.order import Order
from train.recipe import Augment, Captions

MAIN = data_prep.__main__.main
TEXTS = {"jpg": b"\xff\xd8\xff", "txt": b"thing "}


@pytest.fixture(scope="module")
def bucket():
    with s3() as files:
        yield files


@pytest.fixture(autouse=True)
def _cache(tmp_path):
    before = cache.chosen()
    cache.choose(str(tmp_path / "cache"), 0)
    yield
    cache.choose(str(before.folder), before.max_bytes / 1e9)


@pytest.fixture(scope="module")
def tars(bucket, tmp_path_factory) -> list[str]:
    """Two tars, which are in the bucket as well."""
    folder = tmp_path_factory.mktemp("tars")
    files, _ = write_tars(folder, n=60)
    for file in files:
        bucket.put_file(file, f"bucket/tars/{Path(file).name}")
    return files


def run(sources, out, **options) -> dict:
    return index(sources, out, check=Checking(max_rejects=0.5), parallelism=Parallelism(1), **options)


def write_tar(path: Path, members: dict[str, bytes]) -> bytes:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path.read_bytes()


def samples(folder: Path) -> dict:
    """By split and number: all that a reader gets of each sample, and where its image is."""
    found = {}
    counts = read_manifest(folder)["splits"]
    for split in (split for split in SPLITS if counts[split]["samples"]):
        shards = Shards(folder, split)
        for n in range(len(shards)):
            sample = shards.read(n)
            known = [sample.key, sample.captions, sample.image, int(shards.groups[n])]
            found[split, n] = [*known, shards._offsets[n, :2].tolist()]
    return found


def test_the_index_and_what_training_reads_are_those_of_local_tars(tars, tmp_path, capsys):
    local = run(tars, tmp_path / "local")
    checked = run(["s3://bucket/tars/*.tar"], tmp_path / "checked", full_check=True)
    unread = run(["s3://bucket/tars/*.tar"], tmp_path / "unread")
    assert checked == local
    assert samples(tmp_path / "checked") == samples(tmp_path / "local")
    for file in [*(tmp_path / "local").rglob("*.jsonl"), *(tmp_path / "local").rglob("*.tsv")]:
        assert file.read_bytes() == (tmp_path / "checked" / file.relative_to(tmp_path / "local")).read_bytes()
    # those that only a decoder rejects
    assert unread["records"] == local["records"] + local["rejects"]
    by_key = {
        name: {each[0]: each[1:3] for each in samples(tmp_path / name).values()}
        for name in ("unread", "local")
    }
    assert by_key["local"].items() <= by_key["unread"].items()
    assert len(by_key["unread"]) == unread["images"]
    assert any("--full-check reads them" in warning for warning in unread["warnings"])
    here, there = Shards(tmp_path / "local", "train"), Shards(tmp_path / "checked", "train")
    gallery = Gallery(tmp_path / "checked", "train", there.entries)
    assert [gallery.image(n) for n in range(len(here))] == [here.read(n).image for n in range(len(here))]
    there.verify()
    order = Order(here.shard_sizes, 4, 0)
    pairs = [TrainPairs(each, order, (16, 16), Augment(), Captions()) for each in (here, there)]
    for n in range(len(here)):
        one, other = pairs[0][n], pairs[1][n]
        assert torch.equal(one.image, other.image)
        assert (one.caption, one.group) == (other.caption, other.group)


def test_a_tar_that_is_replaced_later_is_noticed(bucket, tmp_path, capsys):
    members = {f"{n}.{kind}": TEXTS[kind] + b"%d" % n for n in range(9) for kind in TEXTS}
    data = write_tar(tmp_path / "a.tar", members)
    bucket.pipe_file("bucket/other/a.tar", data)
    run(["s3://bucket/other/a.tar"], tmp_path / "out")
    entry = read_manifest(tmp_path / "out")["splits"]["train"]["shards"][0]
    assert (entry["file"], entry["bytes"], entry["sha256"]) == ("s3://bucket/other/a.tar", len(data), "")
    capsys.readouterr()
    verify(tmp_path / "out")
    assert "not checked: the bytes of 1 tar behind URLs" in capsys.readouterr().out
    bucket.pipe_file("bucket/other/a.tar", data[:-1] + b"\1")
    (problem,) = altered(tmp_path / "out", entry)
    assert "s3://bucket/other/a.tar: replaced since it was indexed" in problem


def test_a_reader_is_a_file(bucket):
    rng = random.Random(0)
    data = rng.randbytes(3 * MAX_BLOCK + 12345)
    bucket.pipe_file("bucket/random", data)
    here = io.BytesIO(data)
    there = StoreReader(*file_at("s3://bucket/random"), len(data))
    at = 0
    for _ in range(200):
        at = max(0, at + rng.choice([0, 0, 512, -700, 5000, MIN_BLOCK, FAR, FAR + 99999])) % (len(data) + 999)
        n = rng.choice([0, 1, 512, 8192, MIN_BLOCK + 1, MAX_BLOCK + 1])
        assert (there.seek(at), there.tell()) == (here.seek(at), at)
        assert there.read(n) == here.read(n)
        at = here.tell()
        assert there.tell() in (at, max(at, 0))
    there.seek(0)
    assert there.read() == data


def test_small_images_cost_a_request_per_megabyte_and_large_ones_are_passed_over(bucket, tmp_path):
    """And the rows are those of a tar that is read whole."""
    rng = random.Random(0)
    start = png(Image.new("RGB", (9, 9)))
    for name, n, size in (("small", 1200, 5000), ("large", 12, 600_000)):
        members = {}
        for number in range(n):
            members[f"{number:05d}.png"] = start + rng.randbytes(size)
            members[f"{number:05d}.txt"] = f"thing {number}".encode()
        members["extra.without.an.image.json"] = b"{}"
        data = write_tar(tmp_path / f"{name}.tar", members)
        bucket.pipe_file(f"bucket/{name}.tar", data)
        fetched = Counter()
        rows = list(read_tar(Input(f"s3://bucket/{name}.tar", fetched=fetched)))
        whole = list(read_tar(Input(str(tmp_path / f"{name}.tar"))))
        assert [row._replace(data=None, length=None) for row in rows] == [
            row._replace(data=None) for row in whole
        ]
        assert [row.length for row in rows] == [len(row.data) for row in whole]
        assert all(here.data.startswith(there.data) for there, here in zip(rows, whole, strict=True))
        if name == "small":
            assert fetched["requests"] <= len(data) / MAX_BLOCK + 5
        else:
            assert fetched["requests"] <= n + 2
            assert fetched["bytes"] <= (n + 2) * MIN_BLOCK


def test_odd_tars_are_read_as_they_are_here(bucket, tmp_path):
    """Names of 150 characters, s.seg.png beside s.jpg, an image not named like one, members of no sample."""
    start = png(Image.new("RGB", (9, 9)))
    members = {
        f"{'long/' * 30}a.png": start,
        f"{'long/' * 30}a.txt": b"long",
        "s.jpg": b"\xff\xd8\xff" + bytes(9000),
        "s.seg.png": start,
        "s.json": b'{"caption": "with a mask", "score": 1}',
        "c.img": start,
        "c.cap": b"other",
        "README": b"hello",
        "d.gif": b"GIF89a" + bytes(20),
        "d.txt": b"a gif",
    }
    bucket.pipe_file("bucket/odd.tar", write_tar(tmp_path / "odd.tar", members))
    for extensions in ({}, {"caption_ext": "cap"}, {"image_ext": "seg.png"}):
        found = []
        for source, more in (
            (str(tmp_path / "odd.tar"), {}),
            ("s3://bucket/odd.tar", {"fetched": Counter()}),
        ):
            ignored = []
            options = {"ignore": lambda *each, ignored=ignored: ignored.append(each), **extensions, **more}
            rows = [row._replace(data=None, length=None) for row in read_tar(Input(source, **options))]
            found.append((rows, ignored))
        assert found[0] == found[1]
    report = run(["s3://bucket/odd.tar"], tmp_path / "out")
    assert report["reasons"]["not PNG, JPEG or WebP"] == 1


def test_plain_http_and_names_with_a_space(bucket, tars, tmp_path):
    bucket.put_file(tars[0], "bucket/tars of mine/a b.tar")
    web = os.environ["AWS_ENDPOINT_URL"]
    assert_mistake(call_here(MAIN, "index", f"{web}/bucket/tars/00000.tar", "--out", tmp_path / "out"), "403")
    bucket.chmod("bucket/tars of mine/a b.tar", acl="public-read")
    run([f"{web}/bucket/tars%20of%20mine/a%20b.tar"], tmp_path / "http")
    run(["s3://bucket/tars of mine/a b.tar"], tmp_path / "s3")
    over_http, over_s3 = (
        [each[1:3] for each in samples(tmp_path / name).values()] for name in ("http", "s3")
    )
    assert sorted(over_http) == sorted(over_s3)


def test_a_data_set_on_the_hub_is_pinned_to_its_commit(hub, tars, tmp_path):
    hub.put("datasets/me/tars", {f"data/{Path(tar).name}": Path(tar).read_bytes() for tar in tars})
    run(["hf://datasets/me/tars/data/*.tar"], tmp_path / "hub")
    run(["s3://bucket/tars/*.tar"], tmp_path / "s3")
    assert samples(tmp_path / "hub") == samples(tmp_path / "s3")
    commit = hub.repos["datasets/me/tars"].head
    entry = read_manifest(tmp_path / "hub")["splits"]["train"]["shards"][0]
    assert entry["file"] == f"hf://datasets/me/tars@{commit}/data/00000.tar"


def test_an_index_behind_a_url_names_no_other_url(bucket, tars, tmp_path):
    run(["s3://bucket/tars/*.tar"], tmp_path / "out")
    bucket.put(f"{tmp_path / 'out'}/", "bucket/stranger/", recursive=True)
    with pytest.raises(UserError, match="is no name of a file below it"):
        Shards("s3://bucket/stranger", "train")


def test_each_damaged_or_missing_tar_is_named(bucket, tars, tmp_path):
    data = Path(tars[0]).read_bytes()
    header = tarfile.TarInfo("a.png")
    header.size = 1 << 50
    for name, content in {
        "cut": data[:-12000],
        "bomb": header.tobuf(tarfile.GNU_FORMAT),
        "none": b"<html>",
    }.items():
        bucket.pipe_file(f"bucket/damaged/{name}.tar", content)
    result = call_here(MAIN, "index", "s3://bucket/damaged/*.tar", "--out", tmp_path / "out")
    assert_mistake(
        result,
        "damaged/cut.tar: cannot be read",
        "damaged/bomb.tar",
        "damaged/none.tar: cannot be read (byte 0",
    )
    for source, words in {
        "s3://bucket/tars/none.tar": "s3://bucket/tars/none.tar: no such file",
        "s3://bucket/none/*.tar": "no file matches this pattern",
        "s3://no-such-bucket/*.tar": "no file matches this pattern",
        "https://me:secret@host/a.tar": "https://***@host/a.tar: has a password or signature",
    }.items():
        assert_mistake(call_here(MAIN, "index", source, "--out", tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


def test_several_tars_are_read_at_once_and_in_order(bucket, tmp_path, capsys):
    tars = []
    for number in range(20):
        words = {n: b"%d of %d" % (n, number) for n in range(5)}
        members = {f"{n}.{kind}": TEXTS[kind] + words[n] for n in words for kind in TEXTS}
        tars.append(str(tmp_path / f"{number:02d}.tar"))
        bucket.pipe_file(f"bucket/many/{number:02d}.tar", write_tar(Path(tars[-1]), members))
    check = {"check": Checking(skip_decode=True), "parallelism": Parallelism(1)}
    index(tars, tmp_path / "local", **check)
    capsys.readouterr()
    index(["s3://bucket/many/*.tar"], tmp_path / "stored", **check)
    assert "20 tars behind URLs: 20 requests, 0.4 MB read" in capsys.readouterr().out
    assert samples(tmp_path / "stored") == samples(tmp_path / "local")


@pytest.mark.slow
def test_a_run_on_tars_behind_urls_is_that_on_local_ones(
    bucket, tiny_model, icon_shards, tmp_path, one_thread
):
    """Icons of equal pixels are in one group already, so no image must be read to find the same groups."""
    url = upload(bucket, icon_shards, "icons")
    tars = sorted(map(str, icon_shards.glob("*/*.tar")))
    urls = [f"{url}/{Path(tar).parent.name}/{Path(tar).name}" for tar in tars]
    for name, sources in {"local": tars, "stored": urls}.items():
        run(sources, tmp_path / name)
        more = {"cache_dir": str(tmp_path / "cache"), "epochs": 1}
        trained(recipe(tiny_model, tmp_path / name, tmp_path / f"{name}-run", **more), no_validation)
    assert_bit_equal(tmp_path / "local-run", tmp_path / "stored-run")
