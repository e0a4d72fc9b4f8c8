"""Time and memory to start on many samples: 10 million in 10 thousand shards, on a made-up index.

    python -m benchmarks.start                    makes the shards in data/start (1.1 GB), and measures
    python -m benchmarks.start --samples 1000000 --shards 1000

Indexes and manifest are as `data_prep build` writes them, keys, groups, sizes and hashes random; tars are
sparse files without content, so no sample can be decoded. What training does with them before its first
batch is measured, in a process of its own; then workers of its loader, which is train.data.loader's: the
unique set size of each (what would be free if it ended) after it has read the bytes of all samples of a
window of shards, and of positions around the end of an epoch.
"""

import gc
import importlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
import tyro
from torch.utils.data import Dataset

from data_prep.atomic import write_json
from data_prep.progress import progress
from data_prep.shard_index import key_text, write_index
from data_prep.shards import FORMAT, Shards, sha256_of
from train.data.loader import RankPositions, loader
from train.data.order import WINDOW_SHARDS, Order
from train.world import World

BATCH, WORKERS = 4096, 2
IMAGE_BYTES, JSON_BYTES = (4_000, 40_000), (200, 400)  # the smallest and largest


def make(folder: Path, samples: int, shards: int) -> None:
    """Shards of equal size, as their indexes and manifest have them."""
    if (folder / "manifest.json").is_file():
        return
    (folder / "train").mkdir(parents=True, exist_ok=True)
    rng, each, entries = np.random.default_rng(0), samples // shards, []
    for number in progress(range(shards), desc="making", unit="shard"):
        name = folder / "train" / f"train-{number:06d}"
        sizes = np.stack(
            [rng.integers(*IMAGE_BYTES, each), rng.integers(*JSON_BYTES, each), rng.integers(20, 90, each)], 1
        )
        blocks = 512 + -(-sizes // 512) * 512
        offsets = (blocks.cumsum() - blocks.ravel()).reshape(sizes.shape) + 512
        keys, hashes = np.sort(rng.integers(1, 1 << 63, each)), rng.integers(1, 1 << 63, each)
        groups = rng.integers(0, samples // 3, each)
        pieces = np.stack([offsets, sizes], 2).reshape(each, 6).tolist()
        rows = zip(keys.tolist(), groups.tolist(), pieces, hashes.tolist(), strict=True)
        write_index(
            name.with_suffix(".index.tsv"),
            [[key_text(key), group, *piece, sample] for key, group, piece, sample in rows],
        )
        with open(name.with_suffix(".tar"), "wb") as tar:
            tar.truncate(int(blocks.sum()) + 1024)
        entries.append(
            {
                "file": f"train/{name.name}.tar",
                "index": f"train/{name.name}.index.tsv",
                "samples": each,
                "bytes": int(blocks.sum()) + 1024,
                "sha256": f"{number:064x}",
                "index_sha256": sha256_of(name.with_suffix(".index.tsv")),
            }
        )
    splits = {"train": {"samples": each * shards, "captions": each * shards, "shards": entries}}
    write_json(folder / "manifest.json", {"format": FORMAT, "splits": splits})


class Reads(Dataset):
    """By position, the unique set size of the process after it has read the bytes of the sample there."""

    def __init__(self, shards: Shards, order: Order):
        self.shards, self.order = shards, order

    def __getitem__(self, position: int) -> torch.Tensor:
        number = self.order.sample_at(position)
        shard = int(np.searchsorted(self.shards._ends, number, side="right"))
        self.shards._bytes(self.shards._tars[shard], *self.shards._offsets[number, :2].tolist())
        assert self.shards.key(number)
        assert self.shards.groups[number] >= 0
        assert self.shards._hashes[number]
        if position % BATCH < BATCH - 1:
            return torch.tensor(0)
        gc.collect()
        return torch.tensor(psutil.Process().memory_full_info().uss)


def measure(folder: Path, found: dict) -> None:
    """Called in a process of its own, which has imported what training imports."""
    timed(found, "open the shards", lambda: found.update(shards=Shards(folder, "train")))
    shards = found.pop("shards")
    timed(found, "verify (none has to be hashed)", shards.verify)
    order = Order(shards.shard_sizes, BATCH, 0)
    timed(found, "order of the first batch", lambda: order.numbers(np.arange(BATCH)))
    found["peak, MB"] = peak_mb()
    window = int(np.sort(shards.shard_sizes)[-WINDOW_SHARDS:].sum())
    end = order.samples_per_epoch
    for name, first, last in (
        ("of a window", 0, 2 * window),  # all of two, so that each worker meets the end of one
        ("around the end of an epoch", end - 4 * BATCH, end + 4 * BATCH),
    ):
        positions = RankPositions(first // BATCH * BATCH, last, BATCH, World())
        used = loader(Reads(shards, order), list(positions), WORKERS, World())
        found[f"USS of a reader, {name}, MB"] = max(int(batch.max()) for batch in used) / 1e6
    timed(found, "order of a whole epoch, all at once", lambda: order.numbers(np.arange(end)))


def timed(found: dict, name: str, act: Callable[[], object]) -> None:
    started, used = time.perf_counter(), time.process_time()
    act()
    found[f"{name}, s"] = time.perf_counter() - started
    found[f"{name}, CPU s"] = time.process_time() - used


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measured(folder: Path) -> None:
    """In a process of its own: prints a line of JSON."""
    for module in ("train.loop", "eval.validation"):  # what a training process has imported
        importlib.import_module(module)
    found = {"with all imported, MB": peak_mb()}
    measure(folder, found)
    print(json.dumps(found))


def main(samples: int = 10_000_000, shards: int = 10_000, folder: Path = Path("data/start")) -> None:
    """Make the shards, measure, print a table and a line of JSON.

    Args:
        folder: Where they are made; they are kept and used again.
    """
    folder = folder.absolute() / f"{samples}-{shards}"
    make(folder, samples, shards)
    code = f"from pathlib import Path; from benchmarks.start import measured; measured(Path({str(folder)!r}))"
    found = json.loads(
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout
    )
    print("| | |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:.2f} |")
    print(json.dumps({"samples": samples, "shards": shards, **found}))


if __name__ == "__main__":
    tyro.cli(main)
