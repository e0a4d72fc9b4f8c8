"""What an image server may be asked for: no table and no server reaches the services of this machine."""

import functools
import http.server
import socketserver
import threading
import time
from pathlib import Path

import pytest
from conftest import noise_images
from yarl import URL

from data_prep.build.pipeline import Checking, Parallelism, Reading, build
from data_prep.images import BadImage
from data_prep.inputs import image_server
from data_prep.inputs.image_server import NotFetched, is_public, next_target
from data_prep.inputs.locations import ImageLocation, read_all


class _Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers.get("Authorization")))
        if self.path.startswith("/endless"):
            self.send_response(200)
            self.end_headers()
            while not server.ended:
                try:
                    self.wfile.write(bytes(1 << 16))
                except OSError:
                    return
        elif place := server.places.get(self.path):
            self.send_response(302)
            self.send_header("Location", place)
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


class _Server(http.server.ThreadingHTTPServer):
    """Files of a folder, and answers that send on: `places` from path to URL."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.asked, self.places, self.ended = [], {}, False
        self.host = f"127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *_):
        self.ended = True
        self.shutdown()
        socketserver.BaseServer.__exit__(self)


@pytest.fixture
def servers(tmp_path):
    """The server that a person names, and another one on this machine that nobody has named."""
    noise_images(tmp_path, 3)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes((tmp_path / "0.png").read_bytes())
    with _Server(tmp_path) as named, _Server(tmp_path) as other:
        yield named, other


def fetched(root: str, *names: str) -> list:
    return list(read_all([ImageLocation(root, name) for name in names]))


def test_a_server_may_send_on_within_itself(servers, tmp_path):
    named, _ = servers
    named.places |= {"/images/a.png": "/1.png", "/images/b.png": f"http://{named.host}/images/a.png"}
    named.places["/images/c.png"] = "../2.png"
    bytes_of = [(tmp_path / f"{number}.png").read_bytes() for number in (0, 1, 1, 2)]
    assert fetched(f"http://{named.host}/images", "0.png", "a.png", "b.png", "c.png") == bytes_of
    named.asked.clear()
    root = f"http://me:word@{named.host}/images"
    assert fetched(root, "b.png") == [bytes_of[1]]
    assert [password for _, password in named.asked] == ["Basic bWU6d29yZA=="] * 3


def test_a_server_sends_nobody_to_another_service_of_this_machine(servers):
    named, other = servers
    port = other.server_port
    hosts = (f"127.0.0.1:{port}", f"localhost:{port}", f"127.1:{port}", f"2130706433:{port}")
    hosts += (f"[::ffff:127.0.0.1]:{port}", f"me:word@127.0.0.1:{port}", f"0.0.0.0:{port}")
    places = [f"http://{host}/1.png" for host in hosts] + [f"//127.0.0.1:{port}/1.png"]
    places += ["file:///etc/passwd", "ftp://127.0.0.1/a", "data:image/png;base64,AAAA", "http://", "http://["]
    named.places |= {f"/images/{number}.png": place for number, place in enumerate(places)}
    started = time.monotonic()
    results = fetched(f"http://{named.host}/images/", *(f"{number}.png" for number in range(len(places))))
    assert time.monotonic() - started < 3  # no second attempt, which would wait
    for place, result in zip(places, results, strict=True):
        assert isinstance(result, BadImage), place
        assert result.reason == "not fetched", (place, result)
        assert "word" not in result.detail
    assert other.asked == []


def test_a_server_that_does_not_end_is_left(servers, monkeypatch):
    named, _ = servers
    monkeypatch.setattr(image_server, "MAX_BYTES", 1 << 20)
    named.places["/images/a.png"] = "/images/a.png"
    results = fetched(f"http://{named.host}/", "images/a.png", "endless.png")
    assert [result.reason for result in results] == ["not fetched"] * 2
    assert [result.detail.split(": ", 1)[1] for result in results] == [
        "its server sends on more than 10 times",
        "more than 1 MiB",
    ]


def test_a_table_reaches_no_service_that_was_not_named(servers, tmp_path):
    """With --images http://, for any host; of a named one, all is read."""
    _, other = servers
    rows = [f"http://{host}:{other.server_port}/1.png" for host in ("127.0.0.1", "localhost", "127.1")]
    (tmp_path / "rows.csv").write_text(
        "image,caption\n" + "".join(f"{url},caption {number}\n" for number, url in enumerate(rows))
    )
    with pytest.raises(Exception, match=r"3 x not fetched\n.*no public address; to read from it, pass --im"):
        build(
            [str(tmp_path / "rows.csv")],
            tmp_path / "out",
            Reading(images="http://"),
            Checking(max_rejects=0.9),
            parallelism=Parallelism(1),
        )
    assert other.asked == []
    report = build(
        [str(tmp_path / "rows.csv")],
        tmp_path / "named",
        Reading(images=f"http://127.0.0.1:{other.server_port}/"),
        Checking(max_rejects=0.9),
        parallelism=Parallelism(1),
    )
    assert report["images"] == 1


def test_a_password_of_a_url_is_not_recorded(servers, tmp_path):
    """Neither of --images nor of the table; the shards are given away."""
    named, _ = servers
    (tmp_path / "rows.csv").write_text("image,caption\n0.png,a\n1.png,b\nnone.png,c\n../x.png,d\n")
    build(
        [f"http://me:secret-word@{named.host}/rows.csv"],
        tmp_path / "out",
        Reading(images=f"http://me:secret-word@{named.host}"),
        Checking(max_rejects=0.9),
        parallelism=Parallelism(1),
    )
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert f"http://***@{named.host}".encode() in (tmp_path / "out" / "manifest.json").read_bytes()
    assert [path for path in files if b"secret-word" in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("before", "place", "after"),
    [
        ("https://a.example/x/1.png", "https://cdn.example/1.png", "https://cdn.example/1.png"),
        ("http://a.example/x/1.png", "https://a.example/1.png", "https://a.example/1.png"),
        ("http://a.example/x/1.png", "http://www.a.example/1.png", "http://www.a.example/1.png"),
        ("https://me:word@a.example/1.png", "/2.png", "https://me:word@a.example/2.png"),
        ("https://me:word@a.example/1.png", "https://b.example/2.png", "https://b.example/2.png"),
        ("https://me:word@a.example/1.png", "https://a.example:1/2.png", "https://a.example:1/2.png"),
        ("https://a.example/1.png", "http://a.example/1.png", None),
        ("https://a.example/1.png", "http://b.example/1.png", None),
        ("https://a.example/1.png", "javascript:alert(1)", None),
    ],
)
def test_where_a_server_may_send_on_to(before, place, after):
    if after:
        assert str(next_target(URL(before), place)) == after
    else:
        with pytest.raises(NotFetched):
            next_target(URL(before), place)


def test_public_addresses():
    for address in ("93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34"):
        assert is_public(address)
    private = (
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
    )
    for address in (
        *private,
        "::1",
        "fe80::1%eth0",
        "fd00::1",
        "::ffff:127.0.0.1",
        "224.0.0.1",
        "255.255.255.255",
    ):
        assert not is_public(address)
