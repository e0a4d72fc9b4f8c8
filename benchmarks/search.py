"""Time of a search without the encoder, and of making an index compared with the model's forward.

  python -m benchmarks.search nearest
      100 thousand x 768, one thread: faiss and torch; --n 1000000 --approximate for an inverted file,
      --dims 192 for the index after `python -m eval compress`
  python -m benchmarks.search embed MODEL --data SHARDS
      `python -m eval embed` and its forward alone, in turns

The first makes an index of random features in a temporary folder; search time does not depend on the values.
"""

import contextlib
import io
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import tyro

from data_prep.cli import run_commands
from data_prep.errors import exit_on_user_error
from data_prep.tables import markdown_table
from eval.embed import load_for_eval, precision_of
from eval.options import Inference
from eval.search import nearest as nearest_module
from eval.search.command import compress
from eval.search.command import embed as embed_corpus
from eval.search.index import FORMAT, Index
from eval.search.indexing import SCHEMA
from eval.search.nearest import Nearest
from train.world import World

INFERENCE = Inference()


def nearest(
    n: int = 100_000,
    d: int = 768,
    k: int = 50,
    queries: int = 30,
    approximate: bool = False,
    dims: int | None = None,
) -> None:
    """Milliseconds of a query, median and slowest, on one thread, its groups joined."""
    torch.set_num_threads(1)
    if nearest_module.faiss:
        nearest_module.faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = random_index(Path(folder), n, d)
        if dims:
            compress(made, Path(folder) / "small", dims=dims)
        index = Index(Path(folder) / "small" if dims else made)
        asked = F.normalize(torch.randn(queries, d, generator=torch.Generator().manual_seed(1)), dim=-1)
        ways = (
            {"faiss": Nearest(index), "torch": Nearest(index, use_faiss=False)}
            if nearest_module.faiss
            else {"torch": Nearest(index)}
        )
        if approximate:
            begun = time.perf_counter()
            ways["approximate"] = Nearest(index, approximate=True)
            recall = ways["approximate"].recall()
            print(
                f"approximate: made and measured in {time.perf_counter() - begun:.0f} s, recall@10"
                f" {recall:.3f} of exact"
            )
        rows = []
        for name, way in ways.items():
            way.top(asked[:1], k)
            seconds = []
            for query in asked:
                begun = time.perf_counter()
                way.top(query[None], k)
                seconds.append(time.perf_counter() - begun)
            rows.append([name, f"{1000 * np.median(seconds):.1f}", f"{1000 * max(seconds):.1f}"])
    columns = ["", "median ms", "slowest ms"]
    what = f"{n} x {dims or d} {index.stored.dtype}, the {k} best groups, one thread"
    print(f"{what}\n\n{markdown_table(columns, rows)}")


def random_index(folder: Path, n: int, d: int = 0, model: str = "none") -> Path:
    """An index without images, of random features in clusters, four images in a group.

    Args:
        d: dimensions; those of the model where it is one that opens.
    """
    sha256 = ""
    if model != "none":
        clip = load_for_eval(model, INFERENCE, World())
        d, sha256 = clip.config["model_cfg"]["embed_dim"], clip.fingerprint()
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(max(1, n // 500), d, generator=generator)
    features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, (n, d))
    for start in range(0, n, 1 << 16):
        count = min(1 << 16, n - start)
        near = centers[torch.randint(len(centers), (count,), generator=generator)]
        features[start : start + count] = F.normalize(
            near + torch.randn(count, d, generator=generator), dim=-1
        ).half()
    features.flush()
    numbers = np.arange(n)
    known = {
        "key": numbers.astype(str),
        "path": numbers.astype(str),
        "split": np.full(n, "train"),
        "group": numbers // 4,
        "captions": [[f"image {number}"] for number in range(n)],
    }
    pq.write_table(
        pa.table({name: pa.array(column, SCHEMA[name]) for name, column in known.items()}),
        folder / "metadata.parquet",
    )
    np.save(folder / "thumbnails.npy", np.zeros(n + 1, np.int64))
    (folder / "thumbnails.bin").write_bytes(b"")
    manifest = {
        "index_format": FORMAT,
        "model": model,
        "model_sha256": sha256,
        "data": "random",
        "n": n,
        "d": d,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def embed(
    model: Annotated[str, tyro.conf.Positional], data: Path, turns: int = 3, inference: Inference = INFERENCE
) -> None:
    """Images per second of `eval embed`, as printed, and of the forward of as many random images."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clip = load_for_eval(model, inference, World(device=device))
    pixels = torch.randint(
        0, 256, (inference.batch_size, 3, *clip.image_size), dtype=torch.uint8, device=device
    )
    rates = {"embed": [], "forward": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(turns):
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                embed_corpus(model, data, Path(folder) / "index", overwrite=True, inference=inference)
            count, rate = re.match(
                r"(\d+) images \(\d+ embedded now, ([\d.]+)/s\)", output.getvalue()
            ).groups()
            rates["embed"].append(float(rate))
            with torch.inference_mode():
                clip.towers.image_features(pixels)
                begun = time.perf_counter()
                batches = min(200, int(count) // inference.batch_size + 1)
                for _ in range(batches):
                    features = clip.towers.image_features(pixels)
                features.cpu()
            rates["forward"].append(batches * inference.batch_size / (time.perf_counter() - begun))
    middle = {name: float(np.median(values)) for name, values in rates.items()}
    rows = [
        [name, f"{middle[name]:.1f}", ", ".join(f"{rate:.1f}" for rate in of_turns)]
        for name, of_turns in rates.items()
    ]
    columns = ["images/s", "median", "of each turn"]
    how = (
        f"{precision_of(clip)}, {inference.readers} workers, {torch.get_num_threads()} threads, {device.type}"
    )
    print(f"{model}, batch {inference.batch_size}, {how}")
    share = middle["embed"] / middle["forward"]
    print(f"\n{markdown_table(columns, rows)}\n\nembed reaches {share:.1%} of its forward")


if __name__ == "__main__":
    commands = {name: f"benchmarks.search:{name}" for name in ("nearest", "embed")}
    exit_on_user_error(lambda: run_commands("python -m benchmarks.search", __doc__, commands))
