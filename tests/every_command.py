"""Run by test_every_command.py, under torchrun too: each command of eval that has no such test of its own,
one after the other.

python tests/every_command.py MODEL SHARDS PICTURES OUT: PICTURES has train/ and val/; the results go to OUT
as JSON."""

import sys
from contextlib import nullcontext
from pathlib import Path

import eval.classify.linear_probe
import eval.classify.zeroshot
import eval.compare.compare
import eval.compare.confusion
import eval.compositionality.scenes
from eval.options import Inference
from train.world import joined_world


def every_command(model: str, shards: Path, pictures: Path, out: Path) -> None:
    inference = Inference(batch_size=7, workers=0)
    eval.classify.zeroshot.zeroshot(
        (model, "demo-vit:none"), pictures, "val", json=out / "zeroshot.json", inference=inference
    )
    eval.classify.linear_probe.probe(
        model, pictures, cache=out / "cache", json=out / "probe.json", inference=inference
    )
    eval.compare.confusion.confusion((model,), shards, json=out / "confusion.json", inference=inference)
    eval.compositionality.scenes.probes(model, shards, n=1, json=out / "probes.json", inference=inference)
    more = {"labelled": pictures, "labelled_split": "val", "interpolate": (0.5,)}
    eval.compare.compare.compare(
        (model, model), shards, "val", out=out / "compare", inference=inference, **more
    )


if __name__ == "__main__":
    with joined_world() as world:
        for module in (
            eval.classify.zeroshot,
            eval.classify.linear_probe,
            eval.compare.confusion,
            eval.compositionality.scenes,
            eval.compare.compare,
        ):
            module.joined_world = lambda: nullcontext(
                world
            )  # a group of processes that was taken down cannot be made again
        every_command(sys.argv[1], *map(Path, sys.argv[2:]))
