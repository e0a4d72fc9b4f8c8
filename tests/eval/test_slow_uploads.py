"""Uploads to a real server: one that is slow to decode keeps no other request waiting."""

import signal
import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest
import slow_images
from conftest import noise_image, png
from evil import encoded, noise
from test_serve import ask, expected, running

from benchmarks.serve import started
from eval.search import serve
from eval.search.query import image_query
from eval.search.serve import UPLOADS_AT_ONCE, app, open_columns

IMAGE = {"content-type": "image/png"}


@pytest.fixture(scope="module")
def columns(icon_index, narrow_index):
    return open_columns([icon_index, narrow_index])


@pytest.fixture
def url(columns, monkeypatch) -> Iterator[str]:
    """A server that gives each upload one or two seconds of CPU time, with its children started."""
    monkeypatch.setattr(serve, "UPLOAD_SECONDS", 1)
    with running(app(columns)) as url:
        for _ in range(UPLOADS_AT_ONCE):
            assert ask(url, "/api/search", png(noise_image()), IMAGE)[0] == 200
        yield url


def test_a_slow_upload_keeps_no_other_request_waiting(url):
    found = []
    slow = slow_images.scans(100, 7000, 7000)  # 100 kB that take four seconds
    thread = threading.Thread(target=lambda: found.append(ask(url, "/api/search", slow, IMAGE)))
    thread.start()
    answers = [
        ask(url, "/api/search", {"text": "a bell", "k": 3})[0],
        ask(url, "/api/search", {"like": 3, "k": 3})[0],
        ask(url, "/api/search", png(noise_image(20)), IMAGE)[0],
        urllib.request.urlopen(f"{url}/thumbnail/0").status,
    ]
    assert (answers, found) == ([200] * 4, [])
    thread.join()
    [(status, _, answer)] = found
    assert (status, list(answer)) == (400, ["error"])
    assert "the image: slow to decode (it takes more than 1 second" in answer["error"]
    for number in range(2 * UPLOADS_AT_ONCE):  # all children answer, the one that was killed too
        assert ask(url, "/api/search", png(noise_image(20 + number)), IMAGE)[0] == 200


def test_as_many_slow_uploads_as_children_keep_no_search_of_a_text_waiting(url):
    found = []
    slow = slow_images.scans(100, 7000, 7000)
    threads = [
        threading.Thread(target=lambda: found.append(ask(url, "/api/search", slow, IMAGE)[0]))
        for _ in range(UPLOADS_AT_ONCE)
    ]
    for thread in threads:
        thread.start()
    assert (ask(url, "/api/search", {"text": "a bell", "k": 3})[0], found) == (200, [])
    for thread in threads:
        thread.join()
    assert found == [400] * len(threads)


UPLOADED = {
    "scans": slow_images.scans(883),
    "chunks": slow_images.chunks(9, b"iCCP", slow_images.packed(1 << 20)),
    "tags": slow_images.tags(1000, 1 << 20),
    "comments": slow_images.comments(20_000),
}


@pytest.mark.parametrize("name", UPLOADED)
def test_what_is_slow_to_open_is_refused_by_its_parts(name, url):
    status, _, answer = ask(url, "/api/search", UPLOADED[name], IMAGE)
    assert (status, "the image: slow to decode (" in answer["error"]) == (400, True), answer


def test_ordinary_uploads_of_every_format_find_what_a_query_finds(url, columns):
    for data in (
        encoded(noise(40, 30, "RGBA")),
        encoded(noise(40, 30, "L"), "JPEG"),
        encoded(noise(40, 30, seed=2), "JPEG", progressive=True),
        encoded(noise(40, 30, seed=3), "WEBP"),
        encoded(noise(40, 30, seed=4), "TIFF"),
        slow_images.frames(1000),
        slow_images.pages(1000),
    ):
        status, _, answer = ask(url, "/api/search?k=5", data, IMAGE)
        assert status == 200
        assert answer["results"] == [expected(each, image_query(each.clip, data, ""), 5) for each in columns]


@pytest.mark.slow
def test_a_separate_server_ends_while_it_decodes(icon_index, capfd):
    with started(icon_index) as (server, host):
        answer = []
        upload = slow_images.frames(1, data=b"\1a" * 900_000)
        assert ask(f"http://{host}", "/api/search", upload, IMAGE)[0] == 200  # the worst that passes
        slow = encoded(noise(2500, 2500), "JPEG2000")
        thread = threading.Thread(target=lambda: answer.append(try_to_ask(f"http://{host}", slow)))
        thread.start()
        time.sleep(1)
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
        thread.join()
    assert answer in ([0], [503])
    assert "Traceback" not in capfd.readouterr().err


def try_to_ask(url: str, data: bytes) -> int:
    try:
        return ask(url, "/api/search", data, IMAGE)[0]
    except (OSError, ValueError):
        return 0  # the server closed the connection
