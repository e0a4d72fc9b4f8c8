"""A plan becomes shards, or an index of existing tars. What a killed build has written completely is kept."""

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import xxhash

from data_prep.atomic import atomic_file, write_json
from data_prep.build.plan import Plan, PlannedImage
from data_prep.build.scan import in_order
from data_prep.build.split import SPLITS
from data_prep.build.target import LocalTarget, StoreTarget, is_written
from data_prep.errors import UserError
from data_prep.images import BadImage
from data_prep.inputs.locations import ImageLocation, read_local
from data_prep.inputs.storage import sizes_of
from data_prep.progress import progress
from data_prep.shard_index import sample_hash, write_index
from data_prep.shards import Member, as_json, sha256_of, shard_entry, write_shard
from data_prep.store.remote import Store, is_url


class Changed(UserError):
    """An image is not the one that was checked."""


class Totals:
    """What the manifest says of a split's captions."""

    def __init__(self):
        self.captions, self.weights = 0, set()

    def add(self, image: PlannedImage) -> None:
        """Count the captions of an image."""
        self.captions += len(image.captions)
        weights = self.weights.union(image.weights or [1.0])
        self.weights = {min(weights), max(weights)}

    def entry(self) -> dict:
        """Their number, and the smallest and largest weight, where there are any."""
        weights = {} if self.weights <= {1.0} else {"weights": [min(self.weights), max(self.weights)]}
        return {"captions": self.captions, **weights}


def write_shards(target: LocalTarget | StoreTarget, plan: Plan, settings: dict, processes: int) -> dict:
    """Write, and upload to a store, every shard that is not there yet.

    Args:
        settings: see pipeline.SETTINGS.

    Returns:
        The `splits` of the manifest.
    """
    folder = target.work
    shards = _shard_paths(folder, plan, settings["write"])
    totals = {split: Totals() for split in SPLITS}
    paths = [path for split in SPLITS for path in shards[split]]
    target.begin(paths)
    entries = {path: entry for path in paths if (entry := target.entry(path))}
    jobs = _shard_jobs(plan, shards, totals, entries.keys())
    written = in_order(_Writer(target.store), jobs, processes, None)
    missing = len(paths) - len(entries)
    for path, [entry] in progress(written, total=missing, desc="writing shards", unit="shard"):
        target.add(path, entry)
        entries[path] = entry
    splits = {}
    for split in SPLITS:
        of_split = [entries[path] for path in shards[split]]
        n_images = plan.n_images[split]
        splits[split] = {"samples": n_images, **totals[split].entry(), "shards": of_split}
        assert sum(entry["samples"] for entry in of_split) == n_images, (split, of_split)
        # open_clip_train reads this file beside the tars for the number of samples.
        write_json(
            folder / split / "sizes.json", {path.name: entries[path]["samples"] for path in shards[split]}
        )
    return splits


def _shard_paths(folder: Path, plan: Plan, writing: dict) -> dict[str, list[Path]]:
    """The tars of each split; folders are created, and partial files removed."""
    shards = {}
    for split in SPLITS:
        (folder / split).mkdir(exist_ok=True)
        for partial in (folder / split).glob(".*.partial"):
            partial.unlink()
        n_images = plan.n_images[split]
        n_shards = max(-(-n_images // writing["images_per_shard"]), min(writing["min_shards"], n_images))
        shards[split] = [folder / split / f"{split}-{number:06d}.tar" for number in range(n_shards)]
    return shards


def _shard_jobs(
    plan: Plan, shards: dict[str, list[Path]], totals: dict[str, "Totals"], done: Collection[Path]
) -> Iterator[tuple]:
    """(path, [(path, its samples)]) of each shard that is not done. Shards of a split differ by one image at
    most.

    Args:
        totals: of each split; they are counted here.
    """
    pending: dict[str, list] = {split: [] for split in SPLITS}
    seen, finished = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    for image in plan.images():
        split = image.split
        totals[split].add(image)
        seen[split] += 1
        location = plan.locate(plan.parts[image.part], image)
        pending[split].append((location, image.content, _member(image)))
        if seen[split] * len(shards[split]) >= plan.n_images[split] * (finished[split] + 1):
            path = shards[split][finished[split]]
            if path not in done:
                yield path, [(path, pending[split])]
            pending[split], finished[split] = [], finished[split] + 1
    assert not any(pending.values()), {split: len(samples) for split, samples in pending.items()}


def _member(image: PlannedImage) -> Member:
    """The sample of an image, without the image's bytes."""
    meta = {
        "key": image.key,
        "image": image.image,
        "captions": image.captions,
        "group": image.group_name,
        "width": image.width,
        "height": image.height,
    }
    if image.weights:
        meta["weights"] = image.weights
    if image.columns:
        meta["columns"] = json.loads(image.columns)
    return Member(image.key, b"", image.extension, image.captions, meta, image.group)


class _Writer(NamedTuple):
    """What a worker does with each shard; the store is None for a local folder."""

    store: Store | None

    def __call__(self, jobs: list[tuple[Path, list]]) -> list[dict]:
        return [self._written(path, samples) for path, samples in jobs]

    def _written(self, path: Path, samples: list) -> dict:
        if is_written(path):  # a kill came before it was uploaded
            entry = shard_entry(path)
        else:
            entry = write_shard(path, (_complete(*sample) for sample in samples))
        for kind in ("index", "file") if self.store else ():
            self.store.put(path.parent.parent / entry[kind], entry[kind])
        return entry


def _complete(location: ImageLocation, content: bytes, member: Member) -> Member:
    """The sample with its image, which must be the one that was checked."""
    data = read_local(location)
    if isinstance(data, BadImage) or xxhash.xxh3_128_digest(data) != content:
        change = data.reason if isinstance(data, BadImage) else "its bytes differ"
        raise Changed(f"{location.root}: {location.name} changed after it was checked ({change})")
    member.meta["sha256"] = hashlib.sha256(data).hexdigest()
    return member._replace(image=data)


def index_in_place(folder: Path, out: Path, plan: Plan, settings: dict) -> dict:
    """Write, per split and tar, an index of its images, and a .jsonl of what KEY.json is in our own shards.

    Args:
        out: the final name of `folder`; the tars' paths in the manifest are relative to it.

    Returns:
        The `splits` of the manifest.
    """
    totals, entries = {split: Totals() for split in SPLITS}, {split: [] for split in SPLITS}
    for split in SPLITS:
        (folder / split).mkdir(exist_ok=True)
    tars = list(settings["inputs"])
    sizes = sizes_of(tars)
    for number, tar in enumerate(progress(tars, desc="writing indexes", unit="tar", delay=2)):
        rows, metas = {split: [] for split in SPLITS}, {split: bytearray() for split in SPLITS}
        for image in plan.images(container=number):
            meta = as_json(_member(image).meta).encode()
            json_offset = len(metas[image.split])
            where = [image.offset, image.length, json_offset, len(meta), 0, 0]
            # an image that was not read has no hash, and so has its sample
            digest = sample_hash(image.content, meta) if image.content else 0
            rows[image.split].append([image.key, image.group, *where, digest])
            metas[image.split] += meta + b"\n"
            totals[image.split].add(image)
        for split in SPLITS:
            if rows[split]:
                path = folder / split / f"{number:06d}-{Path(tar).stem}"
                entry = _write_index(path, rows[split], metas[split])
                entry |= _tar_entry(tar, out, settings["inputs"][tar]) | {"bytes": sizes[tar]}
                entries[split].append(entry)
    return {
        split: {"samples": plan.n_images[split], **totals[split].entry(), "shards": entries[split]}
        for split in SPLITS
    }


def _tar_entry(tar: str, out: Path, digest: str) -> dict:
    """What the manifest says about a tar. The content of one behind a URL has no sha256: `version` is of what
    its store says of it, see Store.version.
    """
    if not is_url(tar):
        return {"file": os.path.relpath(tar, out), "sha256": digest}
    return {"file": tar, "sha256": "", "version": digest}


def _write_index(path: Path, rows: list[list], metas: bytes) -> dict:
    """Write the index of one tar's samples in one split.

    Returns:
        The manifest's entry, without what it says about the tar.
    """
    index, json_file = path.with_name(f"{path.name}.index.tsv"), path.with_name(f"{path.name}.jsonl")
    write_index(index, rows)
    with atomic_file(json_file) as partial:
        partial.write_bytes(metas)
    return {
        "index": f"{path.parent.name}/{index.name}",
        "json": f"{path.parent.name}/{json_file.name}",
        "samples": len(rows),
        "index_sha256": sha256_of(index),
        "json_sha256": sha256_of(json_file),
    }
