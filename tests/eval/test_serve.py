"""The search page's server: its results are those of Nearest, and every mistake gets a message."""

import http.client
import json
import shutil
import socket
import struct
import threading
import time
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import uvicorn
from conftest import assert_mistake, call_here, noise_image, png
from starlette.applications import Starlette
from test_indexing import empty_index

import eval.__main__
from benchmarks.serve import load, started, table
from data_prep.web import MAX_BODY_BYTES
from eval.search.index import Index, filter_rows
from eval.search.nearest import Nearest
from eval.search.query import image_query, text_query
from eval.search.serve import MAX_TEXT, SEARCHES_AT_ONCE, app, open_columns

JSON = {"content-type": "application/json"}


@contextmanager
def running(served: Starlette) -> Iterator[str]:
    """The address of a real server, in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(served, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def ask(
    url: str, path: str, body: bytes | dict | None = None, headers: dict | None = None, method: str = ""
) -> tuple[int, dict, dict]:
    """Status, headers, and the answer's JSON."""
    if isinstance(body, dict):
        body, headers = json.dumps(body).encode(), {**JSON, **(headers or {})}
    request = urllib.request.Request(url + path, body, headers or {}, method=method or None)
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, dict(answer.headers), json.loads(answer.read())


@pytest.fixture(scope="module")
def columns(icon_index, narrow_index):
    return open_columns([icon_index, narrow_index])


@pytest.fixture(scope="module")
def url(columns) -> Iterator[str]:
    with running(app(columns)) as url:
        yield url


def expected(column, features: torch.Tensor, k: int, rows=None, grouped=True) -> list[dict]:
    hits = Nearest(column.index, use_faiss=False).top(features, k, rows, grouped)[0]
    return [{**hit._asdict(), "score": pytest.approx(hit.score, abs=1e-5), "words": []} for hit in hits]


def test_it_finds_what_nearest_finds_with_each_model(url, columns):
    first, (name, ((value, count), *_)) = columns[0].index, next(iter(columns[0].index.choices().items()))
    rows, drawn = filter_rows(first, [f"{name}={value}"]), png(noise_image())
    _, _, by_text = ask(
        url, "/api/search", {"text": "bell outline", "k": 7, "filters": [f"{name}={value}"], "grouped": False}
    )
    assert by_text["results"] == [
        expected(each, text_query(each.clip, ["bell outline"]), 7, rows, False) for each in columns
    ]
    assert by_text["searched"] == count == rows.sum()

    address = f"/api/search?k=5&filter={urllib.parse.quote(f'{name}={value}')}&grouped=true"
    _, _, by_image = ask(url, address, drawn, {"content-type": "image/png"})
    assert by_image["results"] == [
        expected(each, image_query(each.clip, drawn, ""), 5, rows) for each in columns
    ]

    _, _, like = ask(url, "/api/search", {"like": 9, "k": 6})
    others = first.group_of != first.group_of[9]
    assert like["results"] == [
        expected(each, torch.from_numpy(each.index.features[[9]]).float(), 6, others) for each in columns
    ]
    _, _, like_one = ask(url, "/api/search", {"like": 9, "k": 6, "grouped": False})
    assert like_one["searched"] == len(first) - 1

    for found in (by_text, by_image, like):
        numbers = {hit["number"] for hits in found["results"] for hit in hits} | (
            {9} if found is like else set()
        )
        assert found["images"] == {str(row["number"]): row for row in first.rows(sorted(numbers))}
    assert {hits["number"] for hits in by_text["results"][0]} != {
        hits["number"] for hits in by_text["results"][1]
    }


def test_texts_that_wait_form_one_batch(columns):
    column, texts, batches = columns[0], [f"text {number}" for number in range(9)], []
    hook = column.clip.towers.model.transformer.register_forward_hook(
        lambda module, given, out: batches.append(len(out))
    )
    features = {}
    threads = [
        threading.Thread(target=lambda text=text: features.update({text: column.text(text)}))
        for text in [*texts, texts[0]]
    ]
    busy = threading.Event()
    column.forward.submit(busy.wait)
    for thread in threads:
        thread.start()
    while len(column._waiting) < len(threads):
        time.sleep(0.01)
    busy.set()
    for thread in threads:
        thread.join()
    assert batches == [len(texts)]
    column.text(texts[3])
    assert batches == [len(texts)]
    hook.remove()
    for text in texts:
        assert torch.allclose(features[text], text_query(column.clip, [text]), atol=1e-6)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"k": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        ({}, "pass one of: text, like"),
        ({"text": "a", "like": 1}, "pass one of: text, like"),
        ({"text": 7}, "text: must be a text of 1 to"),
        ({"text": " \n"}, "text: must be a text of 1 to"),
        ({"text": None}, "not null"),
        ({"text": "a" * (MAX_TEXT + 1)}, f"1 to {MAX_TEXT} characters"),
        ({"text": "\ud800"}, "text: must be a text"),
        ({"like": "3"}, "like: must be the number"),
        ({"like": True}, "like: must be the number"),
        ({"like": -1}, "like: must be from 0 to"),
        ({"like": 10**6}, "not 1000000"),
        ({"text": "a", "k": 0}, "k: must be a whole number from 1 to 100"),
        ({"text": "a", "k": 101}, "k: must be a whole number"),
        ({"text": "a", "k": 2.0}, "k: must be a whole number"),
        ({"text": "a", "grouped": "yes"}, "grouped: must be true or false"),
        ({"text": "a", "vectors_only": 1}, "vectors_only: must be true or false"),
        ({"text": "a", "filters": "set=x"}, "filters: must be a list"),
        ({"text": "a", "filters": [1]}, "filters: must be a list"),
        ({"text": "a", "filters": ["x="] * 21}, "at most 20"),
        ({"text": "a", "filters": ["colour=red"]}, "no column 'colour'"),
        ({"text": "a", "filters": ["colour"]}, "must be COLUMN=VALUE"),
        ({"text": "a", "model": "other"}, "no such field"),
    ],
    ids=lambda each: None if isinstance(each, str) else str(each)[:24],
)
def test_mistakes_get_messages(url, body, words):
    status, _, answer = ask(url, "/api/search", body, JSON)
    assert (status, list(answer)) == (400, ["error"])
    assert words in answer["error"]


def test_uploads_that_are_not_images(url):
    for data, words in (
        (b"", "empty file"),
        (b"GIF89a", "the image: "),
        (png(noise_image())[:900], "truncated"),
        (b"<svg/>", "SVG"),
    ):
        status, _, answer = ask(url, "/api/search", data, {"content-type": "image/png"}, "POST")
        assert (status, words in answer["error"]) == (400, True), answer
    for address in ("?k=x", "?k=", "?grouped=1", "?text=a", "?like=1", "?filter=colour%3Dred", "?other=1"):
        status, _, answer = ask(
            url, f"/api/search{address}", png(noise_image()), {"content-type": "image/png"}
        )
        assert (status, list(answer)) == (400, ["error"]), address


def test_requests_that_are_too_large_or_cut_off_are_refused_and_the_next_is_answered(url, capfd):
    status, _, answer = ask(url, "/api/search", bytes(MAX_BODY_BYTES + 1), {"content-type": "image/png"})
    assert (status, "more than 32 MiB" in answer["error"]) == (413, True)
    status, _, answer = ask(url, "/api/search", b" " * (2 << 20), JSON)
    assert (status, "more than 1 MiB" in answer["error"]) == (413, True)
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as client:
        client.sendall(b"POST /api/search HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\nhalf")
    assert ask(url, "/api/search", {"text": "still here"})[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_only_the_page_and_the_index_are_served(url, columns):
    index = columns[0].index
    _, _, about = ask(url, "/api/about")
    assert (about["n"], [each["name"] for each in about["indexes"]]) == (len(index), ["icons", "narrow"])
    assert about["filters"] == json.loads(json.dumps(index.choices()))
    for number in (0, len(index) - 1):
        for address, kept in (
            (f"?v={about['version']}", "public, max-age=31536000, immutable"),
            ("?v=other", "no-store"),
            ("", "no-store"),
        ):
            with urllib.request.urlopen(f"{url}/thumbnail/{number}{address}") as answer:
                assert answer.read() == index.thumbnail(number)
                assert (answer.headers["content-type"], answer.headers["cache-control"]) == (
                    "image/webp",
                    kept,
                )
    paths = [
        f"/thumbnail/{each}"
        for each in (len(index), -1, "x", "9" * 5000, "../manifest.json", "%2e%2e%2fmanifest.json")
    ]
    for path in [*paths, "/manifest.json", "/serve.html", "/eval/serve.py", "/docs", "/../../etc/passwd"]:
        status, headers, answer = ask(url, path)
        assert (status, list(answer)) == (404, ["error"]), path
        assert "default-src 'none'" in headers["content-security-policy"]
    assert ask(url, "/api/search")[0] == 405
    with urllib.request.urlopen(url) as page:
        assert "default-src 'none'" in page.headers["content-security-policy"]
    client = http.client.HTTPConnection(url.removeprefix("http://"))
    client.request("GET", "/api/about", headers={"host": "evil.example"})
    assert client.getresponse().status == 400
    client.close()


def test_concurrent_searches_get_their_own_answers(url, columns):
    texts, found = [f"icon {number}" for number in range(2 * SEARCHES_AT_ONCE)], {}
    threads = [
        threading.Thread(
            target=lambda text=text: found.update(
                {text: ask(url, "/api/search", {"text": text, "k": 3, "vectors_only": True})}
            )
        )
        for text in texts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for text in texts:
        assert found[text][2]["results"][0] == expected(columns[0], text_query(columns[0].clip, [text]), 3)


def test_an_empty_index(icon_index, tmp_path):
    with running(app(open_columns([empty_index(icon_index, tmp_path / "empty")]))) as url:
        _, _, about = ask(url, "/api/about")
        assert (about["n"], about["message"], about["examples"]) == (0, "This index holds no images.", [])
        for body, headers in ((b'{"text": "a"}', JSON), (png(noise_image()), {"content-type": "image/png"})):
            assert ask(url, "/api/search", body, headers)[::2] == (
                400,
                {"error": "This index holds no images."},
            )
        assert ask(url, "/thumbnail/0")[0] == 404


def test_a_command_that_cannot_serve_says_why(icon_index, narrow_index, tmp_path):
    main, empty = eval.__main__.main, empty_index(icon_index, tmp_path / "empty")
    assert_mistake(call_here(main, "serve"), "no INDEX given")
    assert_mistake(call_here(main, "serve", tmp_path / "none"), "no index there")
    assert_mistake(call_here(main, "serve", icon_index, empty), "holds other images than", "side by side")
    assert_mistake(
        call_here(main, "serve", icon_index, narrow_index, "--model", "demo-vit:none"),
        "1 models for 2 indexes",
    )
    other = Index(narrow_index).manifest["model"]
    assert_mistake(call_here(main, "serve", icon_index, "--model", other), "their features do not compare")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_mistake(call_here(main, "serve", empty, "--port", port), f"--port {port}", "cannot be opened")


@pytest.mark.slow
def test_a_separate_server_under_load_refuses_400_megapixels_by_their_header(icon_index, tmp_path, capfd):
    moved = tmp_path / "moved model"
    shutil.copytree(Index(icon_index).manifest["model"].removeprefix("local-dir:"), moved)
    with started(icon_index, "--model", f"local-dir:{moved}") as (server, host):
        found = load(host, Index(icon_index), clients=4, seconds=1.5, images=0.5, k=24)
        before = peak_mb(server.pid)
        status, _, answer = ask(
            f"http://{host}", "/api/search", huge_png(20_000), {"content-type": "image/png"}
        )
        assert (status, "too many pixels (20000 x 20000" in answer["error"]) == (400, True), answer
        assert peak_mb(server.pid) < before + 20  # as 8-bit gray it is 400 MB
    assert (server.returncode, "Traceback" in capfd.readouterr().err) == (0, False)
    assert (found["errors"], sum(found[kind]["requests"] for kind in ("text", "image"))) == (
        0,
        found["requests"],
    )
    for kind in ("text", "image"):
        assert found[kind]["requests"] > 0
        assert 0 < found[kind]["p50_ms"] <= found[kind]["p95_ms"]
    assert f" {found['text']['requests']} |" in table(found, "")


def huge_png(side: int) -> bytes:
    """A valid PNG of side x side black pixels, one bit each, compressed to a small file."""
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)),
        (b"IDAT", packed),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
