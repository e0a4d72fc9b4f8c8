"""A corpus becomes an index (eval/index.py), each picture exactly once, on any number of ranks.

    .INDEX.begun/begun.json        what this is of: model, data, options
    .INDEX.begun/block-000012.npz  features, thumbnails and metadata of some pictures, whole or not there
    INDEX/                         blocks joined in order, by the first rank, when all are there

A rank takes every world_size-th block that is missing, so a call that was killed goes on where it was, on
more or fewer ranks.
Batches are cut by number within a block: the features are the same bit for bit in any world.
"""

import csv
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro

from data_prep.atomic import atomic_file, atomic_folder, check_replaceable
from data_prep.errors import NotFinite, UserError
from data_prep.progress import progress
from data_prep.report.summary import write_json
from eval.embed import load_for_eval
from eval.options import Inference
from eval.search.corpus import THUMBNAIL_PX, Corpus, Pictures, ShardsCorpus, corpus_at, together
from eval.search.index import FORMAT, OWN_COLUMNS
from train.data.loader import loader
from train.model.clip import Clip
from train.world import World, joined_world

BLOCK = 2048  # pictures, about
INFERENCE = Inference(precision="bf16" if torch.cuda.is_available() else "fp32")
SCHEMA = {"key": pa.string(), "split": pa.string(), "group": pa.int64(), "captions": pa.list_(pa.string())}


def embed(
    model: Annotated[str, tyro.conf.Positional],
    data: Path,
    out: Path,
    split: str = "",
    overwrite: bool = False,
    inference: Inference = INFERENCE,
) -> None:
    """Makes an index of a corpus: what `search`, `serve`, `cluster` and `export` work on.

    Runs on one GPU or CPU, or under torchrun on several; a call that was stopped goes on when it is repeated.

    Args:
        model: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder.
        data: Folder of shards, or of pictures (with captions in a .txt beside each, where there are any).
        out: Folder to write; it appears when it is whole.
        split: Of shards: train, val or test; by default all of them.
        overwrite: Replace `out`, and drop what an earlier call left unfinished, if they are indexes.
        inference: How the model is run.
    """
    with joined_world() as world:
        corpus, clip = world.together(lambda: prepare(model, data, out, split, overwrite, inference, world))
        partial, begun = out.with_name(f".{out.name}.begun"), describe(model, corpus, clip, inference)
        world.together(lambda: begin(partial, begun, overwrite) if world.is_first else None)
        blocks = [
            partial / f"block-{block:06d}.npz" for block in range(-(-len(corpus) // size_of(inference)))
        ]
        missing = [block for block, file in enumerate(blocks) if not file.is_file()]
        world.barrier()  # so that all looked before any writes
        seconds, count = write_blocks(
            blocks, missing[world.rank :: world.world_size], corpus, clip, inference, world
        )
        total = world.sum(torch.tensor([count], dtype=torch.float64)).item()
        seconds = world.max(torch.tensor([seconds], dtype=torch.float64)).item()
        done = world.together(lambda: join(blocks, out, begun) if world.is_first else None)
        if done:
            shutil.rmtree(partial)
            rate = (
                f"{total:.0f} embedded now, {total / seconds:.1f} a second"
                if total
                else "all were embedded before"
            )
            print(f"{done[0]} pictures ({rate}): {out}")
            if done[1]:
                print(f"{done[1]} cannot be read: {out / 'unreadable.csv'}")
            print(
                f"search:  python -m eval search {out} --text '...'      open its page:  python -m eval serve"
                f" {out}"
            )


def prepare(
    model: str, data: Path, out: Path, split: str, overwrite: bool, inference: Inference, world: World
) -> tuple[Corpus, Clip]:
    """The corpus and the model; the cheap ones first, so that a mistake costs no time."""
    check_replaceable(out, "manifest.json", overwrite)
    corpus = corpus_at(data, split)
    for shards in corpus.parts if isinstance(corpus, ShardsCorpus) else ():
        shards.verify(world.rank, world.world_size)
    return corpus, load_for_eval(model, inference, world)


def describe(model: str, corpus: Corpus, clip: Clip, inference: Inference) -> dict:
    """What the manifest says of an index before it is made."""
    of_model = {"model": model, "model_sha256": clip.fingerprint(), "precision": inference.precision}
    of_data = {"data": corpus.place, "data_sha256": corpus.sha256}
    return {
        "index_format": FORMAT,
        **of_model,
        **of_data,
        "block": size_of(inference),
        "thumbnail_px": THUMBNAIL_PX,
    }


def begin(partial: Path, begun: dict, overwrite: bool) -> None:
    """Make the folder of an unfinished index, or find it as it was left.

    Raises:
        UserError: it is of another model or data, or is none.
    """
    file = partial / "begun.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [
            f"{name} ({before.get(name)}, now {begun[name]})"
            for name in begun
            if before.get(name) != begun[name]
        ]
        if not changed:
            print(f"going on with {partial}")
            return
        if not overwrite:
            said = f"{partial}: begun with another {'; '.join(changed)}"
            raise UserError(
                f"{said}. Give the command as it was to go on, or --overwrite True to start again"
            )
        shutil.rmtree(partial)
    elif partial.exists():
        raise UserError(
            f"{partial}: has no begun.json, so it was not made by this command, and is not written to; move"
            " it away"
        )
    partial.mkdir(parents=True)
    write_json(file, begun)


def size_of(inference: Inference) -> int:
    """Pictures in a block: whole batches."""
    return max(1, BLOCK // inference.batch_size) * inference.batch_size


def write_blocks(
    files: Sequence[Path], mine: Sequence[int], corpus: Corpus, clip: Clip, inference: Inference, world: World
) -> tuple[float, int]:
    """This rank's blocks; the seconds that it took, without the start of the processes that read, and how
    many pictures.
    """
    size, n = size_of(inference), len(corpus)
    ranges = [range(block * size, min((block + 1) * size, n)) for block in mine]
    batches = [
        list(each[at : at + inference.batch_size])
        for each in ranges
        for at in range(0, len(each), inference.batch_size)
    ]
    inputs = iter(loader(Pictures(corpus, clip), batches, inference.workers, world, together))
    total, begun = sum(map(len, ranges)), None
    bar = progress(total=total, desc="embedding", unit="picture", smoothing=0.05, disable=not world.is_first)
    with torch.inference_mode(), bar:
        for block, numbers in zip(mine, ranges, strict=True):
            features, thumbnails, known = [], [], []
            for _ in range(0, len(numbers), inference.batch_size):
                pixels, beside = next(inputs)
                begun = begun or time.perf_counter()
                if pixels is not None:
                    features.append(
                        clip.towers.image_features(pixels.to(world.device, non_blocking=True)).half()
                    )
                thumbnails += [one for one, _ in beside if isinstance(one, bytes)]
                known += [each | ({} if isinstance(one, bytes) else {"reason": one}) for one, each in beside]
                bar.update(len(beside))
            write_block(files[block], features, thumbnails, known)
    return (time.perf_counter() - begun if begun else 0.0), total


def write_block(path: Path, features: list[torch.Tensor], thumbnails: list[bytes], known: list[dict]) -> None:
    rows = torch.cat(features).cpu() if features else torch.zeros(0, 0, dtype=torch.float16)
    usable = [each["key"] for each in known if "reason" not in each]
    if len(bad := (~rows.isfinite().all(1)).nonzero()):
        error = NotFinite(
            f"image_features of {len(bad)} pictures are not finite, the first of {usable[bad[0]]}; try"
            " --precision fp32"
        )
        error.shared = False  # no other rank has seen it
        raise error
    with atomic_file(path) as partial, open(partial, "wb") as file:
        sizes = np.array([len(each) for each in thumbnails], np.int64)
        np.savez(
            file,
            features=rows.numpy(),
            sizes=sizes,
            thumbnails=_bytes(b"".join(thumbnails)),
            known=_bytes(json.dumps(known).encode()),
        )


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def join(blocks: Sequence[Path], out: Path, begun: dict) -> tuple[int, int]:
    """Make the index of its blocks: how many pictures it holds, and how many could not be read.

    Raises:
        UserError: none could be read.
    """
    names, unreadable, n, d = set(), [], 0, 0
    for known, arrays in opened(blocks):
        names |= {name for each in known for name in each.get("columns", {})}
        unreadable += [(each["key"], each["reason"]) for each in known if "reason" in each]
        n, d = n + len(arrays["features"]), max(d, arrays["features"].shape[1])
    if not n:
        raise UserError(
            f"{begun['data']}: none of {len(unreadable)} pictures can be read, the first because:"
            f" {unreadable[0][1]}"
        )
    columns = {f"{name} of the data" if name in OWN_COLUMNS else name: name for name in sorted(names)}
    schema = pa.schema([*SCHEMA.items(), *((column, pa.string()) for column in columns)])
    at, sizes = 0, []
    with atomic_folder(out) as folder:
        features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, (n, d))
        with (
            pq.ParquetWriter(folder / "metadata.parquet", schema) as metadata,
            open(folder / "thumbnails.bin", "wb") as thumbnails,
        ):
            for known, arrays in opened(progress(blocks, desc="joining", unit="block", delay=2)):
                rows = [row_of(each, columns) for each in known if "reason" not in each]
                metadata.write_table(pa.Table.from_pylist(rows, schema))
                if rows:
                    features[at : at + len(rows)] = arrays["features"]
                thumbnails.write(arrays["thumbnails"].tobytes())
                sizes.append(arrays["sizes"])
                at += len(rows)
        assert at == n, (at, n)
        features.flush()
        np.save(folder / "thumbnails.npy", np.concatenate([[0], np.cumsum(np.concatenate(sizes))]))
        with open(folder / "unreadable.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("key", "reason"), *unreadable])
        write_json(folder / "manifest.json", {**begun, "n": n, "d": d, "unreadable": len(unreadable)})
    return n, len(unreadable)


def opened(blocks: Sequence[Path]) -> Iterator[tuple[list[dict], dict[str, np.ndarray]]]:
    """What is known of the pictures of each block, and its arrays."""
    for path in blocks:
        with np.load(path, allow_pickle=False) as arrays:
            yield json.loads(arrays["known"].tobytes()), arrays


def row_of(known: dict, columns: dict[str, str]) -> dict:
    """A row of metadata.parquet; `columns`, in the index -> in the data, are texts, as a CSV has them."""
    found = {column: known["columns"].get(name) for column, name in columns.items()}
    texts = {
        column: value if value is None or isinstance(value, str) else json.dumps(value)
        for column, value in found.items()
    }
    return {name: known[name] for name in SCHEMA} | texts
