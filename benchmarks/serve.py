"""Load test of the search page's server: many clients search with sentences and images.

    python -m benchmarks.serve INDEX
    python -m benchmarks.serve MODEL --made-up 1000000 --clients 1    random features, sentences only

Each client sends a search, waits for the answer, and sends the next. Sentences differ, so the server's cache
of texts does not help. The server is a separate process on the machine of the clients.
"""

import http.client
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import tyro

from benchmarks.search import random_index
from data_prep.errors import UserError, exit_on_user_error
from data_prep.tables import markdown_table
from eval.search.index import Index, open_index


def bench(
    indexes: Annotated[tuple[str, ...], tyro.conf.Positional],
    made_up: int = 0,
    clients: int = 50,
    seconds: float = 60,
    images: float = 0.1,
    k: int = 24,
) -> tuple[dict, str]:
    """Search a server of these indexes for a while; counts and latencies, and a title.

    Args:
        indexes: As for `python -m eval serve`; the model of an index that is made up.
        made_up: Images of that index, without thumbnails.
        clients: Number of concurrent clients.
        seconds: Duration.
        images: Share of the searches that send an image.
        k: Results of each search.
    """
    with tempfile.TemporaryDirectory() as folder:
        if made_up:
            indexes, images = (str(random_index(Path(folder), made_up, model=indexes[0])),), 0.0
        index = open_index(Path(indexes[0]))
        with started(*indexes) as (server, host):
            result = load(host, index, clients, seconds, images, k)
            memory = psutil.Process(server.pid).memory_full_info()
    title = f"{clients} clients, {seconds:g} s, {len(index):,} images, {len(indexes)} models"
    return (
        result,
        f"{title}; the server has {memory.rss / 1e6:,.0f} MB, {memory.uss / 1e6:,.0f} of them its own",
    )


@contextmanager
def started(*arguments) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server in a separate process, and its "host:port"; it is stopped at the end.

    Args:
        arguments: Of `python -m eval serve`.

    Raises:
        UserError: It did not start; its own message is above.
    """
    command = [sys.executable, "-m", "eval", "serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            if "http://" not in line:
                raise UserError("the server did not start; see its message above")
            yield server, line.split("http://")[1].split()[0]
        finally:
            if server.poll() is None:
                server.send_signal(signal.SIGINT)


def load(host: str, index: Index, clients: int, seconds: float, images: float, k: int) -> dict:
    """The searches of several clients, each in a thread; see `summary`."""
    end, searches = time.monotonic() + seconds, [[] for _ in range(clients)]
    threads = [
        threading.Thread(target=client, args=(host, index, seed, end, images, k, own))
        for seed, own in enumerate(searches)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return summary([search for own in searches for search in own], seconds)


def client(host: str, index: Index, seed: int, end: float, images: float, k: int, searches: list) -> None:
    """Search until `end`; (kind, seconds, whether there were results) of each search goes to `searches`."""
    rng, connection = random.Random(seed), http.client.HTTPConnection(host, timeout=120)
    while time.monotonic() < end:
        number = rng.randrange(len(index))
        if rng.random() < images:
            kind, address, body, content_type = (
                "image",
                f"/api/search?k={k}",
                index.thumbnail(number),
                "image/webp",
            )
        else:
            words = " ".join(index.rows([number])[0]["captions"]).split()[:8]
            kind, address, content_type = "text", "/api/search", "application/json"
            body = json.dumps({"text": f"{' '.join(words)} {rng.randrange(10**6)}", "k": k})
        started = time.monotonic()
        try:
            connection.request("POST", address, body, {"content-type": content_type})
            answer = connection.getresponse()
            good = answer.status == 200 and len(json.loads(answer.read())["results"][0]) > 0
        except (OSError, ValueError, http.client.HTTPException):
            good = False
            connection.close()  # the next request opens a new one
        searches.append((kind, time.monotonic() - started, good))
    connection.close()


def summary(searches: list[tuple[str, float, bool]], seconds: float) -> dict:
    """Counts, and latencies in ms of the answered searches; of all and by kind."""
    result = {"requests": len(searches), "errors": sum(not good for *_, good in searches), "seconds": seconds}
    for kind in ("text", "image"):
        good = [1e3 * took for name, took, good in searches if name == kind and good] or [0.0]
        of_kind = [good for name, _, good in searches if name == kind]
        p50, p95, slowest = np.percentile(good, [50, 95, 100]).tolist()
        latencies = {"p50_ms": p50, "p95_ms": p95, "slowest_ms": slowest}
        result[kind] = {"requests": len(of_kind), "errors": len(of_kind) - sum(of_kind), **latencies}
    return result


def table(result: dict, title: str) -> str:
    columns = ["", "requests", "a second", "errors", "p50 ms", "p95 ms", "slowest ms"]
    rows = [
        [
            kind,
            f"{result[kind]['requests']}",
            f"{result[kind]['requests'] / result['seconds']:.1f}",
            f"{result[kind]['errors']}",
            *(f"{result[kind][name]:.0f}" for name in ("p50_ms", "p95_ms", "slowest_ms")),
        ]
        for kind in ("text", "image")
    ]
    return f"{title}\n\n{markdown_table(columns, rows)}\n\n{json.dumps(result)}"


if __name__ == "__main__":
    exit_on_user_error(lambda: print(table(*tyro.cli(bench))))
