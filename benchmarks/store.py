"""Pairs per second of the training loader on shards behind a URL, to those on the same shards here.

    python -m benchmarks.store --out OUT
    python -m benchmarks.store --shares    what a node of several fetches of a shard, computed

OUT gets icons and photo-like JPEGs (those of benchmarks.loader). A server of range requests on the loopback
sends at most 100 MB/s together, each answer 20 ms late; the first epoch fetches, the second one finds all in
the cache. Shards here and there take turns, with one worker each; medians. The server uses the same cores.
"""

import functools
import http.server
import multiprocessing
import os
import re
import shutil
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np
import open_clip
import torch

from benchmarks.data_prep import draw_icon, draw_photo, make
from benchmarks.loader import BATCH, MODEL, SIZE_PX, build
from data_prep.cli import run_command
from data_prep.shards import Shards
from data_prep.store.cache import Cache, CachedFile, choose, runs
from data_prep.store.remote import Store
from train.data.loader import TrainPairs, train_loader
from train.data.order import Order
from train.recipe import Augment, Captions
from train.world import World

RATE, LATENCY_S = 100e6, 0.02
EPOCHS = 2


class Files(http.server.SimpleHTTPRequestHandler):
    """A folder by range requests, at a limited rate."""

    protocol_version = "HTTP/1.1"
    free_at, lock = 0.0, threading.Lock()

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        size = path.stat().st_size
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        last = min(last, size - 1)
        with Files.lock:
            Files.free_at = max(time.monotonic(), Files.free_at) + (last + 1 - first) / RATE
            wait = Files.free_at - time.monotonic()
        time.sleep(wait + LATENCY_S)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        with open(path, "rb") as file:
            self.wfile.flush()
            os.sendfile(self.connection.fileno(), file.fileno(), first, last + 1 - first)
        return None

    def log_message(self, *_) -> None:
        pass


def serve(folder: Path, port) -> None:
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Files, directory=str(folder))
    )
    port.value = server.server_port
    server.serve_forever()


def epochs(place: Path | str, tokenizer) -> list[float]:
    """Pairs per second of each epoch; the start of the worker is not counted."""
    shards = Shards(place, "train")
    order = Order(shards.shard_sizes, BATCH, 0)
    pairs = TrainPairs(shards, order, (SIZE_PX, SIZE_PX), Augment(), Captions())
    batches = iter(train_loader(pairs, tokenizer, 0, EPOCHS * order.samples_per_epoch, World(), workers=1))
    next(batches)
    seconds = []
    for epoch in range(EPOCHS):
        n, started = order.steps_per_epoch - (epoch == 0), time.perf_counter()
        for _ in range(n):
            next(batches)
        seconds.append(n * BATCH / (time.perf_counter() - started))
    batches.close()
    return seconds


def print_shares() -> None:
    """What one of several nodes fetches of a shard of 1,000 images, when each reads its share of them."""
    print("| bytes of an image | nodes | of the shard | requests | requests per image of its own |")
    print("|---|---|---|---|---|")
    random = np.random.default_rng(0)
    for n_bytes in (5_000, 30_000, 100_000, 300_000):
        # three members in a tar, each after a header and filled up to 512 bytes
        sizes = random.lognormal(np.log(n_bytes), 0.5, 1000).astype(np.int64)
        ends = np.cumsum((sizes + 511) // 512 * 512 + 3 * 512 + 2 * 512)
        file = CachedFile(
            Store("s3://none"), "shard.tar", int(ends[-1]) + 1024, "0" * 64, Cache(Path("none"))
        )
        for nodes in (2, 8):
            own = random.random(1000) < 1 / nodes
            pieces = np.stack([ends - sizes - 2048, sizes + 1024], axis=1)[own]
            requests = list(runs(file._blocks_of(pieces)))
            share = file.bytes_of(pieces) / file.size
            print(
                f"| {n_bytes:,} | {nodes} | {min(1, share):.0%} | {len(requests)} |"
                f" {len(requests) / own.sum():.2f} |"
            )


def main(
    out: Path | None = None, turns: int = 3, icons: int = 6000, photos: int = 3000, shares: bool = False
) -> None:
    """Print a row for each kind of images.

    Args:
        out: folder for the images, the shards and the cache.
        shares: print the other table.
    """
    if shares:
        return print_shares()
    assert out is not None, "pass --out"
    torch.set_num_threads(1)
    tokenizer = open_clip.get_tokenizer(MODEL)
    port = multiprocessing.Value("i", 0)
    server = multiprocessing.Process(target=serve, args=(out, port), daemon=True)
    out.mkdir(parents=True, exist_ok=True)
    server.start()
    print("| images | MB | here, pairs/s | first epoch, of that | second epoch |\n|---|---|---|---|---|")
    kinds = ("icons", icons, draw_icon, "png"), ("photos", photos, draw_photo, "jpg")
    for name, n, draw, extension in kinds:
        make(out / name, draw, n, extension)
        build(out / name, out / f"{name}-shards")
        size = sum(path.stat().st_size for path in (out / f"{name}-shards" / "train").glob("*.tar"))
        here, there = [], []
        for turn in range(turns):
            here.append(epochs(out / f"{name}-shards", tokenizer))
            choose(str(out / f"cache-{turn}"), 0)
            there.append(epochs(f"http://127.0.0.1:{port.value}/{name}-shards", tokenizer))
            shutil.rmtree(out / f"cache-{turn}")
        local = median(min(each) for each in here)
        first, second = (median(each[epoch] / local for each in there) for epoch in range(EPOCHS))
        print(f"| {name} | {size / 1e6:.0f} | {local:.0f} | {first:.2f} | {second:.2f} |", flush=True)
    server.kill()
    return None


if __name__ == "__main__":
    run_command(main, "python -m benchmarks.store")
