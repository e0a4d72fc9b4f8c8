"""A corpus becomes an index (eval/search/index.py), each image exactly once, on any number of ranks.

    .INDEX.unfinished/.lock             locked by the first rank until it ends
    .INDEX.unfinished/started.json      what is indexed: model, data, options
    .INDEX.unfinished/block-000012.npz  features, thumbnails and metadata of some images, complete or absent
    INDEX/                              the blocks in order, joined by the first rank when all are there

A rank takes every world_size-th missing block, so a stopped command resumes on more or fewer ranks. Batches
are cut by number within a block, so features are the same bit for bit in any world.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from shlex import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data_prep.atomic import (
    atomic_file,
    atomic_folder,
    check_replaceable,
    local_paths,
    locked,
    sweep,
    write_json,
)
from data_prep.errors import NotFinite, UserError
from data_prep.progress import progress
from data_prep.sheets import write_csv
from data_prep.strict_json import parse_json, read_json, strict_json
from data_prep.tables import counted
from data_prep.terminal import say
from eval.arrays import load_arrays
from eval.embed import load_for_eval, pixel_bytes, precision_of
from eval.options import Inference
from eval.search.corpus import THUMBNAIL_PX, Corpus, CorpusImages, ShardsCorpus, collate, open_corpus
from eval.search.index import FORMAT, OWN_COLUMNS, SCHEMA
from train.data.loader import loader
from train.model.clip import Clip
from train.model.source import path_in
from train.world import World

BLOCK_IMAGES = 2048  # about: whole batches
CONTENT, SAME_CONTENT = ("model_sha256", "data_sha256"), {"model", "model_place", "data"}  # other paths
UNREADABLE = ("key", "path", "reason")  # the columns of unreadable.csv


def make_index(
    model: str, data: Path, out: Path, split: str, overwrite: bool, inference: Inference, world: World
) -> None:
    """Embed a corpus, or resume; see eval.search.command.embed."""
    corpus, clip = world.all_or_raise(lambda: prepare(model, data, out, split, overwrite, inference, world))
    unfinished = out.with_name(f".{out.name}.unfinished")
    started = describe(model, corpus, clip, inference, out)

    def begin() -> None:
        check_unfinished(unfinished)
        lock.enter_context(locked(unfinished, "embedding into"))
        sweep(unfinished, is_locked=True)
        # Another command may have finished since prepare().
        check_replaceable(out, "index", overwrite, local_paths(model, data))
        start(unfinished, started)

    with ExitStack() as lock:
        world.all_or_raise(lambda: begin() if world.is_first else None)
        blocks = block_files(unfinished, corpus, inference)
        missing = [block for block, file in enumerate(blocks) if not file.is_file()]
        world.barrier()  # all ranks have listed the missing blocks before any rank writes one
        own = missing[world.rank :: world.world_size]
        seconds, count = write_blocks(blocks, own, corpus, clip, inference, world)
        count = int(world.sum(torch.tensor([count], dtype=torch.float64)).item())
        seconds = world.max(torch.tensor([seconds], dtype=torch.float64)).item()
        described = started | {"image_tower_sha256": clip.fingerprint("image")}
        totals = world.all_or_raise(lambda: join(blocks, out, described) if world.is_first else None)
        if totals:
            shutil.rmtree(unfinished)
            print_summary(out, *totals, count, seconds)


def print_summary(out: Path, n: int, unreadable: int, embedded: int, seconds: float) -> None:
    rate = f"{embedded} embedded now, {embedded / seconds:.1f}/s" if embedded else "all embedded before"
    say(f"{counted(n, 'image')} ({rate}): {out}")
    if unreadable:
        say(f"{counted(unreadable, 'image')} cannot be read: {out / 'unreadable.csv'}")
    index = quote(str(out))
    say(f"search: python -m eval search {index} --text '...'    page: python -m eval serve {index}")


def prepare(
    model: str, data: Path, out: Path, split: str, overwrite: bool, inference: Inference, world: World
) -> tuple[Corpus, Clip]:
    """The corpus and the model; cheap checks come first, so a mistake costs no time."""
    check_replaceable(out, "index", overwrite, local_paths(model, data))
    corpus = open_corpus(data, split)
    for shards in corpus.parts if isinstance(corpus, ShardsCorpus) else ():
        shards.verify(world.rank, world.world_size)
    return corpus, load_for_eval(model, inference, world)


def describe(model: str, corpus: Corpus, clip: Clip, inference: Inference, out: Path) -> dict:
    """The part of the manifest that is known before embedding."""
    return {
        "index_format": FORMAT,
        "model": model,
        "model_place": place_of(model, out),
        "model_sha256": clip.fingerprint(),
        "precision": precision_of(clip),
        "data": os.path.abspath(corpus.place),
        "data_sha256": corpus.sha256,
        "block_size": block_size(inference),
        "thumbnail_px": THUMBNAIL_PX,
    }


def place_of(model: str, out: Path) -> dict[str, str] | None:
    """Where a MODEL with a path is for commands in another folder: relative to the index, which may be moved
    with it, and absolute, for an index that is moved alone.
    """
    if not (parts := path_in(model)):
        return None
    before, path, after = parts
    relative = os.path.relpath(os.path.realpath(path), os.path.realpath(out))
    return {"before": before, "relative": relative, "absolute": os.path.abspath(path), "after": after}


def check_unfinished(unfinished: Path) -> None:
    """Refuse a folder that this command did not make.

    Raises:
        UserError: It is not an unfinished index.
    """
    if not unfinished.exists() or (unfinished / "started.json").is_file():
        return
    # Hidden files are allowed: the lock, and what another command is writing at this moment.
    if not unfinished.is_dir() or any(not entry.name.startswith(".") for entry in unfinished.iterdir()):
        raise UserError(
            f"{unfinished}: has no started.json, so it was not made by this command and is not overwritten;"
            " move it away"
        )


def start(unfinished: Path, started: dict) -> None:
    """Make the folder of an unfinished index, or resume the one that is there if it is of the same."""
    file = unfinished / "started.json"
    if file.is_file():
        before = read_json(file, dict, "delete this folder, and run the same command again")
        changed = [name for name, value in started.items() if before.get(name) != value]
        if set(changed) <= SAME_CONTENT and all(before.get(name) == started[name] for name in CONTENT):
            say(f"resuming {unfinished}")
            return
        if n_blocks := len(list(unfinished.glob("block-*.npz"))):
            what = ", ".join(changes(before, started, changed))
            say(f"{unfinished}: of another {what}; starting again, without its {n_blocks} blocks of images")
        for entry in unfinished.iterdir():
            if not entry.name.startswith("."):  # the lock stays: it is held
                entry.unlink()
    write_json(file, started)


def changes(before: dict, started: dict, changed: Sequence[str]) -> list[str]:
    """What differs, in words; a hash tells a person nothing, so only what it is of is named."""
    texts = []
    for name in changed:
        if name == "model_place":  # said by its name
            continue
        if not name.endswith("_sha256"):
            texts.append(f"{name} ({before.get(name)}, now {started[name]})")
        elif (what := name.removesuffix("_sha256")) not in changed:
            texts.append(f"content of {started[what]}")
    return texts


def block_size(inference: Inference) -> int:
    """Images in a block: whole batches."""
    return max(1, BLOCK_IMAGES // inference.batch_size) * inference.batch_size


def block_files(unfinished: Path, corpus: Corpus, inference: Inference) -> list[Path]:
    count = -(-len(corpus) // block_size(inference))
    return [unfinished / f"block-{block:06d}.npz" for block in range(count)]


def write_blocks(
    files: Sequence[Path], own: Sequence[int], corpus: Corpus, clip: Clip, inference: Inference, world: World
) -> tuple[float, int]:
    """Write this rank's blocks; seconds without the start of the workers, and the number of images that
    could be read.
    """
    size, batch_size, n = block_size(inference), inference.batch_size, len(corpus)
    ranges = [range(block * size, min((block + 1) * size, n)) for block in own]
    batches = [
        list(numbers[first : first + batch_size])
        for numbers in ranges
        for first in range(0, len(numbers), batch_size)
    ]
    batch_bytes = pixel_bytes(clip, batch_size)
    inputs = iter(loader(CorpusImages(corpus, clip), batches, inference.readers, world, collate, batch_bytes))
    total, readable, started = sum(map(len, ranges)), 0, None
    bar = progress(total=total, desc="embedding", unit="image", smoothing=0.05, disable=not world.is_first)
    with torch.inference_mode(), bar:
        for block, numbers in zip(own, ranges, strict=True):
            features, thumbnails, metadata = [], [], []
            for _ in range(0, len(numbers), batch_size):
                pixels, samples = next(inputs)
                started = started or time.perf_counter()
                if pixels is not None:
                    pixels = pixels.to(world.device, non_blocking=True)
                    features.append(clip.towers.image_features(pixels).half())
                for thumbnail, of_image in samples:
                    if isinstance(thumbnail, bytes):
                        thumbnails.append(thumbnail)
                        metadata.append(of_image)
                    else:
                        metadata.append({**of_image, "reason": thumbnail})
                bar.update(len(samples))
            write_block(files[block], features, thumbnails, metadata)
            readable += len(thumbnails)
    return (time.perf_counter() - started if started else 0.0), readable


def write_block(
    path: Path, features: list[torch.Tensor], thumbnails: list[bytes], metadata: list[dict]
) -> None:
    """Write a block.

    Args:
        features: fp16 [b, d] of the readable images.
        metadata: Of all images; unreadable ones have a "reason".

    Raises:
        NotFinite: A feature is not finite; the first such image is named.
    """
    rows = torch.cat(features).cpu() if features else torch.zeros(0, 0, dtype=torch.float16)
    names = [of_image["path"] or of_image["key"] for of_image in metadata if "reason" not in of_image]
    if len(bad := (~rows.isfinite().all(1)).nonzero()):
        error = NotFinite(
            f"image_features of {len(bad)} images are not finite, the first of {names[bad[0]]}; try"
            " --precision fp32"
        )
        error.shared = False  # only this rank has seen it
        raise error
    with atomic_file(path) as partial, open(partial, "wb") as file:
        np.savez(
            file,
            features=rows.numpy(),
            sizes=np.array(list(map(len, thumbnails)), np.int64),
            thumbnails=_bytes(b"".join(thumbnails)),
            metadata=_bytes(strict_json(metadata).encode()),
        )


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def read_blocks(blocks: Sequence[Path]) -> Iterator[tuple[list[dict], dict[str, np.ndarray]]]:
    """The metadata of each block, and its arrays."""
    for path in blocks:
        try:
            arrays = load_arrays(path)
            metadata = parse_json(arrays["metadata"].tobytes())
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: damaged ({error}); delete it, and run the same command again") from None
        yield metadata, arrays


def join(blocks: Sequence[Path], out: Path, started: dict) -> tuple[int, int]:
    """Make the index of the blocks; the number of images in it, and of unreadable images.

    Raises:
        UserError: No image can be read.
    """
    names, unreadable, n, d = set(), [], 0, 0
    for metadata, arrays in read_blocks(blocks):
        names |= {name for of_image in metadata for name in of_image.get("columns", {})}
        unreadable += [
            [of_image[name] for name in UNREADABLE] for of_image in metadata if "reason" in of_image
        ]
        n, d = n + len(arrays["features"]), max(d, arrays["features"].shape[1])
    if not n:
        raise UserError(
            f"{started['data']}: none of {len(unreadable)} images can be read; the first: {unreadable[0][-1]}"
        )
    columns = {f"{name} of the data" if name in OWN_COLUMNS else name: name for name in sorted(names)}
    with atomic_folder(out, "index") as folder:
        write_arrays(folder, blocks, columns, n, d)
        write_csv(folder / "unreadable.csv", UNREADABLE, unreadable)
        write_json(folder / "manifest.json", {**started, "n": n, "d": d, "unreadable": len(unreadable)})
    return n, len(unreadable)


def write_arrays(folder: Path, blocks: Sequence[Path], columns: dict[str, str], n: int, d: int) -> None:
    """Write features, metadata and thumbnails, a block at a time."""
    schema = pa.schema([*SCHEMA.items(), *((column, pa.string()) for column in columns)])
    row, sizes = 0, []
    features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, (n, d))
    with (
        pq.ParquetWriter(folder / "metadata.parquet", schema) as writer,
        open(folder / "thumbnails.bin", "wb") as thumbnails,
    ):
        for metadata, arrays in read_blocks(progress(blocks, desc="joining", unit="block", delay=2)):
            rows = [table_row(of_image, columns) for of_image in metadata if "reason" not in of_image]
            writer.write_table(pa.Table.from_pylist(rows, schema))
            if rows:
                features[row : row + len(rows)] = arrays["features"]
            thumbnails.write(arrays["thumbnails"].tobytes())
            sizes.append(arrays["sizes"])
            row += len(rows)
    assert row == n, (row, n)
    features.flush()
    np.save(folder / "thumbnails.npy", np.concatenate([[0], np.cumsum(np.concatenate(sizes))]))


def table_row(metadata: dict, columns: dict[str, str]) -> dict:
    """A row of metadata.parquet.

    Args:
        columns: Name in the index -> name in the data; their values are written as text, as in a CSV.
    """
    row = {name: metadata[name] for name in SCHEMA}
    for column, name in columns.items():
        value = metadata["columns"].get(name)
        row[column] = value if value is None or isinstance(value, str) else strict_json(value)
    return row
