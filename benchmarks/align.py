"""Maps from a new model's text features to an old model's image features: what part of the gain each keeps.

    python -m benchmarks.align --old MODEL --new MODEL --data SHARDS [--max-images 1000]

All are fitted on train, with the best ridge on val by R@10 text to image; the table is of test. The gain is
that of the new model with vectors of its own over the old model with its own.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from data_prep.shards import Shards
from data_prep.tables import markdown_table
from eval.align.fit import RIDGES, bilinear_maps
from eval.bases.projections import Pairs
from eval.embed import Embedded, embed, load_for_eval
from eval.options import Inference
from eval.retrieval.score import evaluate_features
from train.world import World

SPLITS, R1, R10 = ("train", "val", "test"), "text_to_image/R@1", "text_to_image/R@10"


def ridge_map(inputs: torch.Tensor, targets: torch.Tensor, ridge: float) -> torch.Tensor:
    """Ridge regression of targets [n, e] on inputs [n, d], fp64 [d, e]."""
    inputs, targets = inputs.double(), targets.double()
    n, d = inputs.shape
    return torch.linalg.solve(inputs.T @ inputs + ridge * n / d * torch.eye(d), inputs.T @ targets)


def candidates(
    old: Embedded, new: Embedded, texts: list[list[int]]
) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Each kind of map, fitted with each ridge: fp64 [d_new, d_old]."""
    image_of = np.repeat(np.arange(len(texts)), list(map(len, texts)))
    captions = np.concatenate(texts)
    own = np.unique(captions)
    images, texts_new = (old.image_features, new.image_features), new.text_features
    pairs = Pairs(old.image_features, texts_new, texts, np.arange(len(texts)))
    regressions = {
        "text of new -> text of old": (texts_new[own], old.text_features[own]),
        "image of new -> image of old": images[::-1],
        "text of new -> image of old": (texts_new[captions], old.image_features[image_of]),
    }
    if texts_new.shape[1] == old.text_features.shape[1]:
        yield "none", [torch.eye(texts_new.shape[1])]
    for name, given in regressions.items():
        yield name, [ridge_map(*given, ridge) for ridge in RIDGES]
    yield "image of old -> image of new, transposed", [ridge_map(*images, ridge).T for ridge in RIDGES]
    yield "all scores at once (`eval align`)", bilinear_maps(pairs, RIDGES)


def main(old: str, new: str, data: Path, max_images: int = 20_000) -> None:
    world, inference = World(), Inference(workers=0)
    shards = {split: Shards(data, split) for split in SPLITS}
    chosen = np.random.default_rng(0).permutation(len(shards["train"]))[:max_images]
    shards["train"] = shards["train"].only(np.isin(np.arange(len(shards["train"])), chosen))
    ends = []
    for model in (old, new):
        clip = load_for_eval(model, inference, world)
        ends.append({split: embed(clip, of, world, inference) for split, of in shards.items()})

    def figures(split: str, embedded: Embedded) -> tuple[float, float]:
        metrics = evaluate_features(embedded, shards[split].groups, world)["metrics"]
        return metrics[R1], metrics[R10]

    def mapped(split: str, matrix: torch.Tensor) -> tuple[float, float]:
        texts = F.normalize(ends[1][split].text_features @ matrix.float(), dim=1)
        return figures(split, replace(ends[0][split], text_features=texts))

    low, high = (figures("test", end["test"]) for end in ends)
    rows = [["old model, old vectors", low], ["new model, new vectors", high]]
    number_of = {text: number for number, text in enumerate(ends[0]["train"].captions.texts)}
    texts = [
        [number_of[text] for text in shards["train"].captions(image)] for image in range(len(shards["train"]))
    ]
    for name, maps in candidates(ends[0]["train"], ends[1]["train"], texts):
        rows.append([name, mapped("test", max(maps, key=lambda matrix: mapped("val", matrix)[1]))])
    cells = [
        [
            name,
            *(f"{100 * value:.1f} %" for value in found),
            f"{(found[1] - low[1]) / (high[1] - low[1]):.0%}",
        ]
        for name, found in rows
    ]
    print(markdown_table(["map", "R@1", "R@10", "of the gain in R@10"], cells))


if __name__ == "__main__":
    tyro.cli(main)
