"""A plan becomes shards, or an index of tars that are there already; what a killed build has written is kept."""

import hashlib
import json
import os
from pathlib import Path

import xxhash

from data_prep.atomic import atomic_file
from data_prep.build.plan import Image, Plan
from data_prep.build.scan import Source, in_order, read_local
from data_prep.build.split import SPLITS
from data_prep.errors import UserError
from data_prep.images import BadImage
from data_prep.progress import progress
from data_prep.report.summary import write_json
from data_prep.shards import Member, as_json, sha256_of, shard_entry, write_index, write_shard


def write_shards(folder: Path, plan: Plan, begun: dict, processes: int) -> dict:
    """Write every shard that is not there yet; the manifest's `splits`."""
    counts, shards, captions = plan.n_images, {}, dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        (folder / split).mkdir(exist_ok=True)
        for left in (folder / split).glob(".*.partial"):
            left.unlink()
        wanted = max(
            -(-counts[split] // begun["write"]["images_per_shard"]),
            min(begun["write"]["min_shards"], counts[split]),
        )
        shards[split] = [folder / split / f"{split}-{number:06d}.tar" for number in range(wanted)]

    def jobs():
        pending: dict[str, list] = {split: [] for split in SPLITS}
        seen, written = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
        for image in plan.images():
            split = image.split
            captions[split] += len(image.captions)
            seen[split] += 1
            pending[split].append(_sample(image, plan.place(plan.parts[image.part], image)))
            if seen[split] * len(shards[split]) >= counts[split] * (written[split] + 1):
                path = shards[split][written[split]]
                if not is_written(path):
                    yield path, [(path, pending[split])]
                pending[split], written[split] = [], written[split] + 1
        assert not any(pending.values()), {split: len(samples) for split, samples in pending.items()}

    def is_written(path: Path) -> bool:
        return path.exists() and path.with_suffix(".index.tsv").exists()

    paths = [path for split in SPLITS for path in shards[split]]
    left = sum(not is_written(path) for path in paths)
    entries = dict(
        progress(
            in_order(_write_all, jobs(), processes, None), total=left, desc="writing shards", unit="shard"
        )
    )
    entries = {path: entries[path][0] if path in entries else shard_entry(path) for path in paths}
    splits = {}
    for split in SPLITS:
        found = [entries[path] for path in shards[split]]
        splits[split] = {"samples": counts[split], "captions": captions[split], "shards": found}
        assert sum(entry["samples"] for entry in found) == counts[split], (split, found)
        # open_clip_train reads this beside the tars, and counts samples by it.
        write_json(
            folder / split / "sizes.json", {path.name: entries[path]["samples"] for path in shards[split]}
        )
    return splits


def _sample(image: Image, source: Source | None) -> tuple[Source | None, bytes, Member]:
    meta = {
        "key": image.key,
        "image": image.image,
        "captions": image.captions,
        "group": image.group_name,
        "width": image.width,
        "height": image.height,
    }
    if image.columns:
        meta["columns"] = json.loads(image.columns)
    return source, image.content, Member(image.key, b"", image.extension, image.captions, meta, image.group)


def _write_all(jobs: list[tuple[Path, list]]) -> list[dict]:
    return [write_shard(path, (_whole(*sample) for sample in samples)) for path, samples in jobs]


def _whole(source: Source, content: bytes, member: Member) -> Member:
    """The member with its image, which must be what was checked."""
    data = read_local(source)
    if isinstance(data, BadImage) or xxhash.xxh3_128_digest(data) != content:
        what = data.reason if isinstance(data, BadImage) else "its bytes are others"
        raise UserError(
            f"{source.root}: {source.name} changed after it was checked ({what}); start again with --overwrite True"
        )
    member.meta["sha256"] = hashlib.sha256(data).hexdigest()
    return member._replace(image=data)


def index_in_place(folder: Path, out: Path, plan: Plan, begun: dict) -> dict:
    """Per split and tar an index of where its images are, and a file of what KEY.json is in shards of our
    own.
    """
    tars = list(begun["inputs"])
    splits = {split: {"samples": plan.n_images[split], "captions": 0, "shards": []} for split in SPLITS}
    for split in SPLITS:
        (folder / split).mkdir(exist_ok=True)
    for at, tar in enumerate(progress(tars, desc="writing indexes", unit="tar", delay=2)):
        rows, metas = {split: [] for split in SPLITS}, {split: bytearray() for split in SPLITS}
        for image in plan.images(held=at):
            meta = as_json(_sample(image, None)[2].meta).encode()
            rows[image.split].append(
                [image.key, image.group, image.at, image.size, len(metas[image.split]), len(meta), 0, 0]
            )
            metas[image.split] += meta + b"\n"
            splits[image.split]["captions"] += len(image.captions)
        for split in SPLITS:
            if rows[split]:
                path = folder / split / f"{at:06d}-{Path(tar).stem}"
                splits[split]["shards"].append(_write_index(path, rows[split], metas[split], tar, out, begun))
    return splits


def _write_index(path: Path, rows: list[list], metas: bytes, tar: str, out: Path, begun: dict) -> dict:
    """The manifest's entry of one tar's samples in one split."""
    index, json_file = path.with_name(f"{path.name}.index.tsv"), path.with_name(f"{path.name}.jsonl")
    write_index(index, rows)
    with atomic_file(json_file) as partial:
        partial.write_bytes(metas)
    return {
        "file": os.path.relpath(tar, out),
        "index": f"{path.parent.name}/{index.name}",
        "json": f"{path.parent.name}/{json_file.name}",
        "samples": len(rows),
        "bytes": os.path.getsize(tar),
        "sha256": begun["inputs"][tar],
        "index_sha256": sha256_of(index),
        "json_sha256": sha256_of(json_file),
    }
