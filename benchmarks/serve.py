"""What the search page's server bears: many people at once, who search for sentences and now and then for a
picture.

    python -m benchmarks.serve INDEX

Each client asks, waits for the answer, and asks again; no two sentences are likely to be equal, so that the
server's memory of texts is of no help. The server is a process of its own, on the same machine as the
clients."""

import http.client
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from data_prep.errors import UserError, exit_on_user_error
from eval.search.index import Index, not_empty


def bench(
    indexes: Annotated[tuple[Path, ...], tyro.conf.Positional],
    clients: int = 50,
    seconds: float = 60,
    pictures: float = 0.1,
    k: int = 24,
) -> tuple[dict, str]:
    """Ask a server of these indexes for a while; counts and latencies, and of what.

    Args:
        indexes: As of `python -m eval serve`.
        clients: How many ask at once.
        seconds: For how long.
        pictures: Share of the searches that send a picture.
        k: Results wanted of each.
    """
    index = not_empty(Index(indexes[0]))
    with started(*indexes) as (_, host):
        found = load(host, index, clients, seconds, pictures, k)
    return found, f"{clients} clients, {seconds:g} s, {len(index):,} pictures, {len(indexes)} models"


@contextmanager
def started(*arguments) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server in a process of its own, and its "host:port"; it is ended at last.

    Args:
        arguments: of `python -m eval serve`.

    Raises:
        UserError: it did not start; it has said why.
    """
    line = [sys.executable, "-m", "eval", "serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server:
        try:
            said = server.stdout.readline()
            if "http://" not in said:
                raise UserError("the server did not start; what it said stands above")
            yield server, said.split("http://")[1].split()[0]
        finally:
            if server.poll() is None:
                server.send_signal(signal.SIGINT)


def load(host: str, index: Index, clients: int, seconds: float, pictures: float, k: int) -> dict:
    """A number of clients, each in a thread; see `summary`."""
    end, asked = time.monotonic() + seconds, [[] for _ in range(clients)]
    threads = [
        threading.Thread(target=client, args=(host, index, seed, end, pictures, k, each))
        for seed, each in enumerate(asked)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return summary([each for one in asked for each in one], seconds)


def client(host: str, index: Index, seed: int, end: float, pictures: float, k: int, asked: list) -> None:
    """Ask until `end`; (kind, seconds, whether it was answered with results) of each search goes to `asked`."""
    rng, connection = random.Random(seed), http.client.HTTPConnection(host, timeout=120)
    while time.monotonic() < end:
        number = rng.randrange(len(index))
        if rng.random() < pictures:
            kind, address, body, sent = "picture", f"/api/search?k={k}", index.thumbnail(number), "image/webp"
        else:
            words = " ".join(index.rows([number])[0]["captions"]).split()[:8]
            kind, address, sent = "text", "/api/search", "application/json"
            body = json.dumps({"text": f"{' '.join(words)} {rng.randrange(10**6)}", "k": k})
        started = time.monotonic()
        try:
            connection.request("POST", address, body, {"content-type": sent})
            answer = connection.getresponse()
            good = answer.status == 200 and len(json.loads(answer.read())["results"][0]) > 0
        except (OSError, ValueError, http.client.HTTPException):
            good = False
            connection.close()  # the next request opens a new one
        asked.append((kind, time.monotonic() - started, good))
    connection.close()


def summary(asked: list[tuple[str, float, bool]], seconds: float) -> dict:
    """Counts, and latencies in ms of the searches that were answered; of all and by kind."""
    found = {"requests": len(asked), "errors": sum(not good for *_, good in asked), "seconds": seconds}
    for kind in ("text", "picture"):
        good = [1e3 * took for name, took, good in asked if name == kind and good] or [0.0]
        of_kind = [good for name, _, good in asked if name == kind]
        p50, p95, slowest = np.percentile(good, [50, 95, 100]).tolist()
        latencies = {"p50_ms": p50, "p95_ms": p95, "slowest_ms": slowest}
        found[kind] = {"requests": len(of_kind), "errors": len(of_kind) - sum(of_kind), **latencies}
    return found


def table(found: dict, title: str) -> str:
    lines = [
        title,
        "",
        "| | requests | a second | errors | p50 ms | p95 ms | slowest ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in ("text", "picture"):
        one = found[kind]
        numbers = " | ".join(f"{one[name]:.0f}" for name in ("p50_ms", "p95_ms", "slowest_ms"))
        lines.append(
            f"| {kind} | {one['requests']} | {one['requests'] / found['seconds']:.1f} | {one['errors']} |"
            f" {numbers} |"
        )
    return "\n".join([*lines, "", json.dumps(found)])


if __name__ == "__main__":
    exit_on_user_error(lambda: print(table(*tyro.cli(bench))))
