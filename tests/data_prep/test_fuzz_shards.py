"""Shards of changed manifests, indexes and samples; and requests to the review page that shows them."""

import json
import shutil
from pathlib import Path

import fuzz
import pytest
from conftest import noise_images
from damage import as_an_older_build

from data_prep.build.pipeline import Checking, Parallelism, Reading, Splitting, build
from data_prep.build.resume import check_ours, read_settings
from data_prep.review.gallery import Gallery
from data_prep.review.server import Review, app
from data_prep.shards import Shards, read_manifest, sha256_of
from data_prep.verify import verify


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    build(
        [str(noise_images(folder, 6, groups=3))],
        folder / "out",
        Reading(group_column="group"),
        Checking(),
        Splitting(val=0, test=0),
        Parallelism(1),
        min_shards=1,
    )
    return folder / "out"


@pytest.fixture
def copy(shards, memory_folder) -> Path:
    return Path(shutil.copytree(shards, memory_folder / "shards"))


def read_all(folder: Path, with_review: bool = True) -> None:
    """All that training, evaluation and review read."""
    manifest = read_manifest(folder)
    for split in [name for name, entry in manifest["splits"].items() if entry["samples"]]:
        opened = Shards(folder, split)
        for number in range(min(2, len(opened))):
            sample = opened.read(number)
            assert sample.captions == opened.captions(number)
            sample.path.encode()
        opened.background  # noqa: B018 a property
        if not with_review:
            continue
        gallery = Gallery(folder, split, manifest["splits"][split]["shards"])
        gallery.groups()
        for number in range(min(2, len(gallery))):
            json.dumps(gallery.meta(number), allow_nan=False)
            gallery.image(number)
        list(gallery.search("red", False, 0, 1.0))


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_manifest(count, copy):
    file = copy / "manifest.json"
    whole = json.loads(file.read_text())

    def act(data: bytes) -> None:
        file.write_bytes(data)
        read_all(copy, with_review=len(data) % 4 == 0)  # which takes most of the time

    fuzz.check(
        count, fuzz.json_files(whole, {**whole, "inputs": {}}), act, valid=[json.dumps(whole).encode()]
    )


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_index(count, copy):
    file = next(copy.glob("train/*.index.tsv"))
    whole = file.read_bytes()
    manifest = json.loads((copy / "manifest.json").read_text())
    older = b"".join(line.rpartition(b"\t")[0] + b"\n" for line in whole.splitlines())

    def act(data: bytes) -> None:
        file.write_bytes(data)
        manifest["splits"]["train"]["shards"][0]["index_sha256"] = sha256_of(file)  # its maker writes both
        (copy / "manifest.json").write_text(json.dumps(manifest))
        read_all(copy, with_review=len(data) % 4 == 0)  # which takes most of the time

    def changed(choices: fuzz.Choices) -> bytes:
        some = choices.of([whole, older])
        if choices.number() % 2:
            return fuzz.edited(some, choices)
        lines = [line.split(b"\t") for line in some.split(b"\n")]
        row = choices.of(lines[1:-1])
        row[choices.number() % len(row)] = str(
            choices.of([10**20, -1, 1 << 62, 1 << 40, "x", "", 0, 1.5])
        ).encode()
        return b"\n".join(map(b"\t".join, lines))

    fuzz.check(count, fuzz.made_by(changed), act, valid=[whole, older])


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_json_of_a_sample(count, copy):
    """KEY.json, in the place that the index says; the index has no hash of it."""
    opened = Shards(as_an_older_build(copy), "train")
    file, (offset, size) = opened._jsons[0], opened._offsets[0, 2:].tolist()
    tar = file.read_bytes()
    meta = json.loads(tar[offset : offset + size])

    def act(data: bytes) -> None:
        with open(file, "r+b") as opened:
            opened.seek(offset)
            opened.write(data[:size].ljust(size))
        read_all(copy, with_review=len(data) % 4 == 0)  # which takes most of the time

    fuzz.check(count, fuzz.json_files(meta, {"captions": ["a"]}), act, valid=[json.dumps(meta).encode()])


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_settings_of_an_unfinished_build(count, copy):
    whole = json.loads((copy / "manifest.json").read_text())
    file = copy / "settings.json"

    def act(data: bytes) -> None:
        file.write_bytes(data)
        check_ours(copy)
        read_settings(copy)

    fuzz.check(count, fuzz.json_files(whole), act, valid=[json.dumps(whole).encode()])


@pytest.mark.parametrize("count", fuzz.COUNTS[:1])
def test_what_verify_and_review_open(count, copy):
    file = copy / "manifest.json"
    whole = json.loads(file.read_text())

    def act(data: bytes) -> None:
        file.write_bytes(data)
        verify(copy)
        review = Review(copy, copy / "decisions.csv", {})
        review.store.close()
        review.status(None)

    fuzz.check(count, fuzz.json_files(whole), act, valid=[json.dumps(whole).encode()])


JSON = (b"content-type", b"application/json")
PATHS = [
    "/api/status",
    "/api/groups",
    "/api/group",
    "/api/decisions",
    "/image/train/0",
    "/image/x/1",
    "/image/train/-1",
]
PATHS += [
    "/",
    "/api/decide",
    "/api/remove",
    "/api/undo",
    "/image/train/99999999999999999999",
    "/image/train/0\0",
    "/x",
]
QUERIES = [
    b"split=train&start=0",
    b"split=train&group=1&start=1",
    b"text=red&several=1&split=train",
    b"px=64",
]
QUERIES += [b"text=0123456789abcdef", b"sort=size&min_images=2&split=train"]


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_requests_to_review(count, copy):
    opened = Shards(copy, "train")
    meta = opened.meta(0)
    bodies = [
        {"split": "train", "number": 0, "key": opened.key(0), "action": "drop"},
        {"split": "train", "number": 0, "key": opened.key(0), "action": "add", "new_caption": "more"},
        {
            "split": "train",
            "number": 0,
            "key": opened.key(0),
            "action": "edit",
            "caption": meta["captions"][0],
        },
    ]
    bodies[2]["new_caption"] = "new"
    served = app(copy, copy / "decisions.csv")
    ask = fuzz.Asked(served)

    def request(choices: fuzz.Choices) -> tuple:
        if choices.number() % 4:
            path = choices.of(["/api/decide", "/api/decide", "/api/remove", "/api/undo"])
            return "POST", path, b"", [JSON], fuzz.changed_json(choices.of(bodies), choices)
        headers = [(b"origin", b"http://127.0.0.1")] if choices.number() % 2 else []
        query = fuzz.edited(choices.of(QUERIES), choices)
        return choices.of(["GET", "GET", "POST"]), choices.of(PATHS), query, headers, b""

    def act(values: tuple) -> None:
        status, body = ask(*values)
        assert status < 500
        assert status == 200 or json.loads(body)["error"]

    assert ask("POST", "/api/decide", b"", [JSON], json.dumps(bodies[0]).encode())[0] == 200
    fuzz.check(count, fuzz.made_by(request, 60), act)
    served.state.on_end()
