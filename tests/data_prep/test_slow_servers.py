"""Servers of images that send much, or nothing: what is held and waited for is bounded."""

import functools
import http.server
import threading
import time

import pytest
from conftest import noise_images

from data_prep.build import scan
from data_prep.build.pipeline import Checking, Parallelism, Reading, build
from data_prep.images import BadImage
from data_prep.inputs import image_server, locations
from data_prep.inputs.locations import ImageLocation, read_all

N_IMAGES = 20


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    # With the default of 5, a client of many connections at once waits a second to send one again.
    request_queue_size = 128


class _Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        if "silent" in self.path:
            self.server.ended.wait(60)
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """The URL of images of 12 kB each."""
    noise_images(tmp_path, N_IMAGES)
    handler = functools.partial(_Handler, directory=str(tmp_path))
    with _Server(("127.0.0.1", 0), handler) as running:
        running.ended = threading.Event()
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.ended.set()
        running.shutdown()


def places(server: str, names) -> list[ImageLocation]:
    return [ImageLocation(server, name) for name in names]


def test_images_of_many_bytes_are_fetched_in_pieces(server, tmp_path):
    names = [f"{number}.png" for number in range(N_IMAGES)]
    contents = [(tmp_path / name).read_bytes() for name in names]
    rest, pieces = places(server, names), []
    while rest:
        pieces.append(list(read_all(rest, max_bytes=4 * max(map(len, contents)))))
        rest = rest[len(pieces[-1]) :]
    assert [data for piece in pieces for data in piece] == contents
    assert all(1 <= len(piece) <= 5 for piece in pieces)
    assert list(read_all(places(server, names))) == contents


@pytest.mark.parametrize("processes", [1, 2])
def test_pieces_change_no_row(server, tmp_path, monkeypatch, processes):
    table = tmp_path / "a.csv"
    lines = [f"{number}.png,text {number}" for number in range(N_IMAGES)] + ["none.png,no file"]
    table.write_text("\n".join(["image,caption", *lines]) + "\n")
    found = []
    for folder, max_bytes in (("whole", scan.CHUNK_BYTES), ("pieces", 20_000)):
        monkeypatch.setattr(scan, "CHUNK_BYTES", max_bytes)
        check, reading = Checking(max_rejects=0.5), Reading(images=server)
        build([str(table)], tmp_path / folder, reading, check, parallelism=Parallelism(processes))
        of_out = sorted(path for path in (tmp_path / folder).rglob("*") if path.suffix in (".tar", ".csv"))
        found.append({path.name: path.read_bytes() for path in of_out})
    assert found[0] == found[1]
    assert b"missing file" in found[0]["rejects.csv"]


def test_a_silent_server_holds_up_nothing_else(server, tmp_path, monkeypatch):
    monkeypatch.setattr(image_server, "SILENT_S", 3)
    monkeypatch.setattr(locations, "PIECE_S", 1)
    names = [*(f"silent{number}.png" for number in range(40)), "0.png"]
    rest, pieces, started = places(server, names), [], time.monotonic()
    while rest:
        pieces.append(list(read_all(rest, max_bytes=1 << 26)))
        rest = rest[len(pieces[-1]) :]
    found = [data for piece in pieces for data in piece]
    assert found.pop() == (tmp_path / "0.png").read_bytes()
    assert {type(data) for data in found} == {BadImage}
    assert {data.reason for data in found} == {"not fetched"}
    assert "no byte for 3 seconds" in str(found[0])
    assert len(pieces) > 1  # progress is seen
    assert time.monotonic() - started < 40  # not 40 times 3: three rounds of 16
