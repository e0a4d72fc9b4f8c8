"""The review page, over HTTP and in a real browser: its answers equal the shards and the CSV."""

import contextlib
import io
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from urllib.parse import urlencode

import numpy as np
import pytest
import uvicorn
from browser import chromium, expect, opened, overflow_px
from conftest import assert_mistake, call_here, noise_images
from PIL import Image

import data_prep.__main__
from data_prep import web
from data_prep.build.decisions import Decision, read_decisions
from data_prep.build.pipeline import Parallelism, Reading, Splitting, build
from data_prep.errors import UserError
from data_prep.review.gallery import Groups
from data_prep.review.server import app
from data_prep.shards import Shards

EVIL = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


JSON = {"content-type": "application/json"}


@contextlib.contextmanager
def reviewing(shards, decisions, suspects=None):
    """The page's url, get_json(path, ...) -> JSON, and post(path, ...) -> (status, JSON)."""
    listening = web.socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app(shards, decisions, suspects=suspects), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"

    def get(path, **query) -> bytes:
        with urllib.request.urlopen(f"{url}/{path}?{urlencode(query)}") as answer:
            return answer.read()

    def post(path, headers=(), **payload) -> tuple[int, dict]:
        request = urllib.request.Request(
            f"{url}/{path}", json.dumps(payload).encode(), {**JSON, **dict(headers)}
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    try:
        yield SimpleNamespace(
            url=url, get=get, post=post, get_json=lambda path, **query: json.loads(get(path, **query))
        )
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def decided(path) -> list[Decision]:
    return list(read_decisions(path)[0].values())


def all_pages(page, **query) -> list[dict]:
    groups, start = [], 0
    while start is not None:
        answer = page.get_json("api/groups", **query, start=start)
        groups, start = groups + answer["groups"], answer["next"]
    return groups


@pytest.fixture
def page(icon_shards, tmp_path):
    with reviewing(icon_shards, tmp_path / "decisions.csv") as page:
        wait_for_indexes(page)
        yield page


def wait_for_indexes(page) -> None:
    """Until the server has read all indexes, which it does in a thread."""
    while any(split["n_read"] < split["images"] for split in page.get_json("api/status")["splits"].values()):
        time.sleep(0.01)


def test_every_group_and_every_image_is_listed_once(page, icon_shards):
    shards = Shards(icon_shards, "train")
    sizes = Counter(shards.groups.tolist())
    tiles = all_pages(page, split="train")
    assert [tile["group"] for tile in tiles] == list(dict.fromkeys(shards.groups.tolist()))
    assert {tile["group"]: tile["n_images"] for tile in tiles} == sizes
    largest = all_pages(page, split="train", sort="size", min_images=2)
    assert [tile["n_images"] for tile in largest] == sorted(
        (size for size in sizes.values() if size > 1), reverse=True
    )
    seen = []
    for tile in tiles:
        for image in page.get_json("api/group", split="train", group=tile["group"])["images"]:
            meta = shards.meta(image["number"])
            seen.append(image["number"])
            assert {name: image[name] for name in ("key", "image", "width")} == {
                name: meta[name] for name in ("key", "image", "width")
            }
            assert image["captions"] == [{"caption": caption, "new": None} for caption in meta["captions"]]
            assert shards.groups[image["number"]] == tile["group"]
    assert sorted(seen) == list(range(len(shards)))
    status = page.get_json("api/status")["splits"]["train"]
    assert status == {"images": len(shards), "n_read": len(shards), "groups": len(sizes)}


def test_searches_find_what_reading_all_finds(page, icon_shards):
    shards = Shards(icon_shards, "train")
    metas = [shards.meta(number) for number in range(len(shards))]

    def groups(fits):
        return list(dict.fromkeys(int(shards.groups[at]) for at, meta in enumerate(metas) if fits(meta)))

    def found(**query):
        return [tile["group"] for tile in all_pages(page, split="train", **query)]

    words = Counter(word for meta in metas for word in meta["captions"][0].split())

    def holds(word, meta):
        return any(word in text.casefold() for text in (*meta["captions"], meta["image"]))

    for word in (*[word for word, _ in words.most_common(3)], "no such caption"):
        assert found(text=word.upper()) == groups(lambda meta, word=word: holds(word, meta))
    assert found(several=1) == groups(lambda meta: len(meta["captions"]) > 1)
    (tile,) = all_pages(page, split="val", text=metas[7]["key"])  # whichever split it is in
    assert (tile["split"], tile["number"]) == ("train", 7)
    assert all_pages(page, split="val", text="0" * 16) == []


def test_images_are_shown_unchanged(page, icon_shards):
    shards = Shards(icon_shards, "val")
    for number in range(3):
        stored = Image.open(io.BytesIO(shards.read(number).image)).convert("RGB")
        shown = Image.open(io.BytesIO(page.get(f"image/val/{number}", px=1024)))
        assert shown.format == "WEBP"
        assert np.array_equal(np.asarray(stored), np.asarray(shown.convert("RGB")))
    sizes = [
        Image.open(io.BytesIO(page.get(f"image/val/{number}", px=32))).size for number in range(len(shards))
    ]
    assert max(map(max, sizes)) == 32
    for path in (
        f"image/val/{len(shards)}",
        "image/none/0",
        "image/val/../../manifest.json",
        "manifest.json",
    ):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            page.get(path)


def test_a_decision_is_in_the_file_before_it_is_answered(page, icon_shards, tmp_path):
    file, shards = tmp_path / "decisions.csv", Shards(icon_shards, "train")
    metas = [shards.meta(number) for number in range(4)]

    def tell(at, action, caption="", new_caption="", **more):
        payload = {"split": "train", "number": at, "key": metas[at]["key"], "action": action}
        return page.post("api/decide", **{**payload, "caption": caption, "new_caption": new_caption, **more})

    first = metas[1]["captions"][0]
    assert tell(0, "drop")[0] == 200
    status, answer = tell(1, "edit", first, "  a better\tone ")
    assert (status, answer["decisions"], answer["image"]["captions"][0]) == (
        200,
        2,
        {"caption": first, "new": "a better one"},
    )
    tell(1, "edit", first, EVIL)
    tell(2, "add", "", 'one more, "quoted"')
    tell(3, "remove", metas[3]["captions"][0])
    expected = [
        Decision(metas[0]["key"], metas[0]["image"], "drop"),
        Decision(metas[1]["key"], metas[1]["image"], "edit", first, EVIL),
        Decision(metas[2]["key"], metas[2]["image"], "add", "", 'one more, "quoted"'),
        Decision(metas[3]["key"], metas[3]["image"], "remove", metas[3]["captions"][0]),
    ]
    assert decided(file) == expected
    assert [decision["action"] for decision in page.get_json("api/decisions")["latest"]] == [
        decision.action for decision in reversed(expected)
    ]
    for (status, answer), words in (
        (tell(2, "add", "", 'one more, "quoted"'), "already has the caption"),
        (tell(2, "add", "", metas[2]["captions"][0]), "already has the caption"),
        (tell(2, "edit", "of another", "new"), "has no caption 'of another'"),
        (tell(2, "edit", metas[2]["captions"][0], " "), "to have no caption, remove it"),
        (tell(2, "burn"), "unknown action 'burn'"),
        (tell(2, "drop", key=metas[1]["key"]), "reload the page"),
        (tell(2, "add", "", "unpaired \ud800"), "unpaired surrogate"),
        (tell(2, "drop", number=10**9), "no image"),
        (tell(2, "drop", split="none"), "no split 'none'; the splits are train, val, test"),
        (tell(2, "add", 7, "x"), "must be strings"),
        (page.post("api/remove", key="1", action="drop"), "16 digits"),
    ):
        assert status in (400, 404, 409)
        assert words in answer["error"]
    assert decided(file) == expected
    page.post("api/undo")
    page.post("api/undo")
    (tile,) = page.post("api/undo")[1]["tiles"]  # the second edit: the first one is there again
    assert (tile["number"], tile["changed"]) == (1, 1)
    assert [decision[2:5] for decision in decided(file)] == [
        ("drop", "", ""),
        ("edit", first, "a better one"),
    ]
    assert page.post("api/remove", key=metas[0]["key"], action="drop")[0] == 200
    assert page.post("api/remove", key=metas[0]["key"], action="drop") == (
        400,
        {"error": "this decision was removed already"},
    )
    for _ in range(3):
        assert page.post("api/undo")[0] == 200
    assert decided(file) == []
    assert page.post("api/undo") == (400, {"error": "there is nothing to undo"})


def test_people_may_edit_the_file_meanwhile(page, icon_shards, tmp_path):
    file, shards = tmp_path / "decisions.csv", Shards(icon_shards, "val")
    payload = {"split": "val", "number": 0, "key": shards.key(0), "action": "drop"}
    by_hand = Decision(shards.key(1), "", "drop", note="I looked at it")
    file.write_bytes(file.read_bytes() + f"{','.join(by_hand)}\r\n".encode())
    assert page.post("api/decide", **payload)[1]["decisions"] == 2
    assert by_hand in decided(file)
    file.write_text(file.read_text().replace("drop", "drap", 1))
    broken = file.read_bytes()
    status, answer = page.post("api/undo")
    assert (status, "decisions.csv:2: unknown action 'drap'" in answer["error"]) == (400, True)
    assert file.read_bytes() == broken  # an invalid file is not overwritten
    file.write_bytes(broken.replace(b"drap", b"drop"))
    assert page.post("api/undo")[1]["decisions"] == 1


def test_posts_at_once_lose_nothing(page, icon_shards, tmp_path):
    file, shards = tmp_path / "decisions.csv", Shards(icon_shards, "train")
    add = {"split": "train", "action": "add"}
    numbers = [number for number in range(25) for _ in range(4)]
    payloads = [
        {**add, "number": number, "key": shards.key(number), "new_caption": f"caption {n}"}
        for n, number in enumerate(numbers)
    ]
    with ThreadPoolExecutor(16) as pool:
        assert {
            status for status, _ in pool.map(lambda payload: page.post("api/decide", **payload), payloads)
        } == {200}
    assert {(decision.key, decision.new_caption) for decision in decided(file)} == {
        (payload["key"], payload["new_caption"]) for payload in payloads
    }
    with ThreadPoolExecutor(16) as pool:
        assert {status for status, _ in pool.map(lambda _: page.post("api/undo"), payloads)} == {200}
    assert decided(file) == []


def test_pages_from_elsewhere_can_neither_write_nor_read(page, icon_shards, tmp_path):
    payload = {"split": "val", "number": 0, "key": Shards(icon_shards, "val").key(0), "action": "drop"}
    for site in ("cross-site", "same-site"):
        for path in ("api/decide", "api/remove", "api/undo"):
            status, answer = page.post(path, {"sec-fetch-site": site}, **payload)
            assert (status, "another page" in answer["error"]) == (403, True)
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(
            urllib.request.Request(f"{page.url}/api/status", headers={"host": "elsewhere.example"})
        )
    for path in ("api/decide", "api/undo"):
        with pytest.raises(urllib.error.HTTPError, match="405"):
            page.get(path)
    assert decided(tmp_path / "decisions.csv") == []
    assert page.post("api/decide", {"sec-fetch-site": "same-origin"}, **payload)[0] == 200


def test_groups_of_a_part_are_those_of_the_whole_so_far():
    """While indexes are being read, groups are listed in the order in which they will stay."""
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 300, 1000)
    for n in (0, 1, 7, 500, 1000):
        groups_so_far, seen = Groups(groups[:n]), groups[:n].tolist()
        order, sizes = list(dict.fromkeys(seen)), Counter(seen)
        assert groups_so_far.listed(False, 1).tolist() == order
        assert groups_so_far.listed(False, 3).tolist() == [group for group in order if sizes[group] >= 3]
        assert groups_so_far.listed(True, 2).tolist() == sorted(
            (group for group in order if sizes[group] >= 2), key=lambda group: -sizes[group]
        )
        for group in (*order[:20], 1000, -1):
            assert groups_so_far.members(group).tolist() == [
                at for at, each in enumerate(seen) if each == group
            ]


def test_mistakes_are_sentences(icon_shards, tmp_path):
    main, file = data_prep.__main__.main, tmp_path / "decisions.csv"
    assert_mistake(
        call_here(main, "review", tmp_path / "none", "--decisions", file),
        "no manifest.json",
        "python -m data_prep build",
    )
    assert not file.exists()
    assert_mistake(
        call_here(main, "review", icon_shards, "--decisions", tmp_path / "no" / "a.csv"),
        "cannot be written (No such file",
    )
    assert_mistake(
        call_here(main, "review", icon_shards, "--decisions", tmp_path), "cannot be read (Is a directory)"
    )
    with web.socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_mistake(
            call_here(main, "review", icon_shards, "--decisions", file, "--port", port),
            f"--port {port}: cannot be opened",
        )
    file.write_text("image,why\n")
    with pytest.raises(UserError, match="its header is 'image,why'"):
        app(icon_shards, file)


def test_a_browser_drops_edits_and_undoes(tmp_path):
    """With captions and names that are HTML: they are shown, and do nothing."""
    path = noise_images(tmp_path, 12, groups=4)
    path.write_text(path.read_text().replace("caption 3,", '"' + EVIL.replace('"', '""') + '",'))
    build(
        [str(path)],
        tmp_path / "shards",
        Reading(group_column="group"),
        split=Splitting(val=0, test=0),
        parallelism=Parallelism(1),
    )
    file = tmp_path / "decisions.csv"
    with reviewing(tmp_path / "shards", file) as page, chromium() as browser:
        for options in (
            {"viewport": {"width": 1200, "height": 800}},
            {"viewport": {"width": 390, "height": 800}, "color_scheme": "dark"},
        ):
            with opened(browser, page.url, **options) as shown:
                expect(shown.locator(".tile")).to_have_count(4)
                shown.locator("#text").fill("ONERROR=")
                shown.keyboard.press("Enter")
                expect(shown.locator(".tile")).to_have_count(1)
                shown.locator(".tile").click()
                expect(shown.locator(".image")).to_have_count(3)
                expect(shown.locator(".image.current").get_by_text(EVIL, exact=True)).to_be_visible()
                assert overflow_px(shown) <= 0
                shown.keyboard.press("x")
                expect(shown.locator("#decisions")).to_have_text("1 decision")
                expect(shown.locator(".tile")).to_contain_text("1 dropped")
                shown.keyboard.press("e")
                shown.locator("textarea").fill(f"better {EVIL}")
                shown.keyboard.press("Enter")
                expect(shown.locator("#decisions")).to_have_text("2 decisions")
                expect(shown.locator("#detail ins")).to_have_text(f" better {EVIL}")
                assert [decision[2:5] for decision in decided(file)] == [
                    ("drop", "", ""),
                    ("edit", EVIL, f"better {EVIL}"),
                ]
                assert shown.title() == "Review images"
                shown.keyboard.press("u")
                expect(shown.locator("#decisions")).to_have_text("1 decision")
                shown.keyboard.press("u")
                expect(shown.locator("#decisions")).to_have_text("0 decisions")
                shown.keyboard.press("Escape")
                shown.locator("#text").fill("better")
                shown.keyboard.press("Enter")
                expect(shown.locator("#detail")).to_contain_text("No matches")
                expect(shown.locator("#status")).to_have_text(
                    re.compile("0 groups on this page; searched all")
                )
                assert decided(file) == []
