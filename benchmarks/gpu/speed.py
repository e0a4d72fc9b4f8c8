"""Whole paths and commands, timed: beside open_clip_train, the small model, a checkpoint, an index.

python -m benchmarks.gpu.speed OUT DEADLINE SHARDS dry|full PART       one of them, in this process
"""

import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks.gpu.record import Record, said
from benchmarks.gpu.sizes import DRY, Sizes
from data_prep.shards import Shards
from train.recipe import Recipe

STEPS_OF_A_TURN, SCRATCH = 40, "scratch"
# Ways to run open_clip_train, by part; ours has a turn in each.
WAYS = {"whole path": ("plain", "grad-checkpointing"), "whole path beside --torchcompile": ("torchcompile",)}


def scratch(record: Record) -> tempfile.TemporaryDirectory:
    """On the disk of the figures; what a process that was ended leaves there is deleted at the end."""
    (record.out / SCRATCH).mkdir(exist_ok=True)
    return tempfile.TemporaryDirectory(dir=record.out / SCRATCH)


def recipe_of(sizes: Sizes, data: str, model: str, batch: int) -> Recipe:
    options = {"global_batch_size": batch, "micro_batch_size": batch, "activation_checkpointing": "none"}
    return Recipe(model, data, "unused", precision=sizes.precision, workers=sizes.workers, **options)


def whole_path(record: Record, sizes: Sizes, data: str, part: str) -> None:
    """The loader, augmentation and step of both trainers, in one turn each."""
    from train.bench import peer
    from train.device import own_device

    device, dry = own_device(), sizes == DRY
    # a rehearsal is over before a model is compiled for a CPU
    ways = [way.replace("torchcompile", "plain") if dry else way for way in WAYS[part]]
    tars = len(Shards(data, "train").entries)  # open_clip_train needs one for each worker
    recipe = recipe_of(replace(sizes, workers=min(sizes.workers, tars)), data, sizes.large, sizes.batch)
    steps = 5 if dry else STEPS_OF_A_TURN
    with scratch(record) as folder:
        for row in peer.whole_path(recipe, steps, device, Path(folder), turns=1, ways=ways):
            record.note(part, f"{row.pop('trainer')} {row.pop('options')}".strip(), **row)


def small_model(record: Record, sizes: Sizes, data: str, part: str) -> None:
    """One row of train.bench on real batches of the shards."""
    from train.bench.rows import in_fresh_process
    from train.bench.timing import measure_step

    recipe = recipe_of(sizes, data, sizes.small, sizes.small_batch)
    record.note(part, recipe.model, **in_fresh_process(measure_step, recipe, sizes.steps))


def checkpoint(record: Record, sizes: Sizes, data: str, part: str) -> None:
    """How long a step waits for a checkpoint: benchmarks.checkpoint's own row."""
    from benchmarks.checkpoint import row

    with scratch(record) as folder:
        found = row(sizes.small, 2, "none", folder, False, data)
    steps = {
        name: median(each[0] for each in found[key])
        for name, key in (
            ("quiet step s", "quiet_steps_s"),
            ("step while writing s", "steps_while_writing_s"),
        )
    }
    kept = ("stall_s", "first_stall_s", "write_s", "synchronous_s", "written_gb")
    record.note(part, found["model"], **{name: found[name] for name in kept}, **steps)


def index(record: Record, sizes: Sizes, data: str, part: str) -> None:
    """Images per second of `eval embed` with the large model."""
    words = ["-m", "eval", "embed", sizes.large, "--data", data, "--out", record.out / "large-index"]
    words += ["--workers", sizes.workers, "--batch-size", sizes.larger, "--overwrite"]
    started = record.start("embed", words)
    result = record.end(started)
    found = re.search(r"([\d.]+)/s\)", said(started))
    record.note(part, sizes.large, **({"images/s": float(found[1])} if found else {}), **result)


PARTS = {
    **dict.fromkeys(WAYS, whole_path),
    "small model": small_model,
    "checkpoint": checkpoint,
    "index": index,
}


def main(out: str, deadline: str, data: str, size: str, part: str) -> None:
    record = Record(Path(out), float(deadline))
    PARTS[part](record, DRY if size == "dry" else Sizes(), data, part)


if __name__ == "__main__":
    main(*sys.argv[1:])
