"""A real S3 API on the loopback: moto's server, which s3fs asks as it asks any other."""

import http.client
import http.server
import logging
import os
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

from data_prep.store.remote import store_of

BUCKET = "bucket"


@contextmanager
def s3() -> Iterator[fsspec.AbstractFileSystem]:
    """An S3 with the empty bucket `bucket`, which this process and its children find by their environment."""
    from moto.server import ThreadedMotoServer  # slow to import
    from s3fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    ours = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    forget_connections()
    # moto keeps its objects for the life of the process
    urllib.request.urlopen(
        urllib.request.Request(f"{ours['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")
    )
    try:
        files = S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
        files.mkdir(BUCKET)
        yield files
    finally:
        server.stop()
        forget_connections()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def forget_connections() -> None:
    """So that this process asks the S3 that its environment names now."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    store_of.cache_clear()


def objects(files: fsspec.AbstractFileSystem, folder: str) -> dict[str, bytes]:
    """Every object below `bucket/folder`, by its name below it."""
    found = files.find(folder)
    return {name.removeprefix(f"{folder}/"): files.cat_file(name) for name in found}


class Proxy:
    """Passes requests on to the S3 of s3(), and counts, delays, limits or refuses them on the way.

    Attributes:
        latency_s: before each answer.
        bytes_per_s: of all answers together; 0 for no limit.
        refuse: called with the path of a GET; whether it is answered by 503.
        sent: bytes of answers to GETs, by path.
    """

    def __init__(self, latency_s: float = 0, bytes_per_s: float = 0, refuse=lambda path: False):
        self.latency_s, self.bytes_per_s, self.refuse = latency_s, bytes_per_s, refuse
        self.sent: Counter[str] = Counter()
        self.n_refused, self._free_at, self._lock = 0, 0.0, threading.Lock()

    def account(self, path: str, n_bytes: int) -> None:
        """Count an answer, and wait until the line has sent it."""
        with self._lock:
            self.sent[path] += n_bytes
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + (n_bytes / self.bytes_per_s if self.bytes_per_s else 0)
            wait = self._free_at - now
        time.sleep(wait + self.latency_s)


@contextmanager
def proxied(proxy: Proxy) -> Iterator[Proxy]:
    """The S3 of s3() is reached through `proxy`."""
    target = os.environ["AWS_ENDPOINT_URL"]

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            path = urllib.parse.urlsplit(self.path).path
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.command == "GET" and proxy.refuse(path):
                proxy.n_refused += 1
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            connection = http.client.HTTPConnection(target.removeprefix("http://"))
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            proxy.account(path, len(data) if self.command == "GET" else 0)
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in (
                    "content-length",
                    "transfer-encoding",
                    "connection",
                    "date",
                    "server",
                ):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else len(data)
            self.send_header("Content-Length", str(length or 0))
            self.end_headers()
            with suppress(ConnectionError):  # the client was killed
                self.wfile.write(data)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # clients are killed
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_port}"
    forget_connections()
    try:
        yield proxy
    finally:
        os.environ["AWS_ENDPOINT_URL"] = target
        forget_connections()
        server.shutdown()
        server.server_close()


def upload(files: fsspec.AbstractFileSystem, folder: Path, name: str) -> str:
    """Put a local folder into the bucket; its URL."""
    files.put(f"{folder}/", f"{BUCKET}/{name}/", recursive=True)
    return f"s3://{BUCKET}/{name}"
