"""Run by test_every_command.py, also under torchrun: the commands of eval without such a test of their own.

python tests/every_command.py MODEL SHARDS IMAGES OUT: IMAGES has train/ and val/; the results go to OUT as
JSON.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import train.world
from eval.classify.command import linear_probe, zeroshot
from eval.compare.command import compare, confusion
from eval.compositionality.command import compositionality
from eval.options import Inference
from eval.search import indexing
from eval.search.command import embed


def every_command(model: str, shards: Path, images: Path, out: Path) -> None:
    options = {"inference": Inference(batch_size=7, workers=0)}
    zeroshot((model, "demo-vit:none"), images, "val", json=out / "zeroshot.json", **options)
    probe = {"split": "val", "cache": out / "cache", "json": out / "linear_probe.json"}
    linear_probe(model, images, **probe, **options)
    confusion((model,), shards, "val", json=out / "confusion.json", **options)
    compositionality(model, shards, "val", n=1, json=out / "compositionality.json", **options)
    more = {"labelled": images, "labelled_split": "val", "wise_ft": (0.5,)}
    compare((model, model), shards, "val", out / "compare", **more, **options)
    indexing.BLOCK_IMAGES = 28  # so that each rank embeds several blocks
    embed(model, shards, out / "index", **options)


if __name__ == "__main__":
    with train.world.joined_world() as world:
        # A process group cannot be made again once it was destroyed, so all commands share this one.
        train.world.joined_world = lambda: nullcontext(world)
        every_command(sys.argv[1], *map(Path, sys.argv[2:]))
