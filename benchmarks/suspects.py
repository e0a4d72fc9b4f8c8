"""How well `eval suspects` finds wrong captions: 5 % of the training pairs get each other's captions.

    python -m benchmarks.suspects --data SHARDS --models MODEL [MODEL ...]

AUROC and precision among the first 100, of the CLIP score alone and of the list, which asks neighbours too.
"""

from pathlib import Path

import numpy as np
import tyro
from scipy.stats import rankdata

from data_prep.shards import Shards
from data_prep.tables import markdown_table
from eval.bases.projections import Pairs
from eval.bases.rank import features_of_pairs
from eval.embed import load_for_eval
from eval.options import Inference
from eval.suspects.score import distances_of, features_of, lemon, numbers_of
from train.world import World

SHARE, FIRST = 0.05, 100


def planted(pairs: Pairs, seed: int) -> tuple[Pairs, np.ndarray]:
    """The pairs with SHARE of the images given the captions of another of them, of another group; and which,
    bool [n_images].
    """
    rng = np.random.default_rng(seed)
    swapped = rng.permutation(len(pairs.texts))[: max(2, round(SHARE * len(pairs.texts)))]
    texts, is_wrong = list(pairs.texts), np.zeros(len(pairs.texts), bool)
    for one, other in zip(swapped, np.roll(swapped, 1), strict=True):
        if pairs.groups[one] != pairs.groups[other] and not {*pairs.texts[one]} & {*pairs.texts[other]}:
            texts[one], is_wrong[one] = pairs.texts[other], True
    return pairs._replace(texts=texts), is_wrong


def auroc(scores: np.ndarray, is_wrong: np.ndarray) -> float:
    """The probability that a wrong pair scores higher than a right one."""
    n_wrong = int(is_wrong.sum())
    ranks = rankdata(scores)[is_wrong].sum()
    return (ranks - n_wrong * (n_wrong + 1) / 2) / (n_wrong * (len(scores) - n_wrong))


def main(
    data: Path, models: tuple[str, ...], seeds: tuple[int, ...] = (0, 1, 2), split: str = "train"
) -> None:
    """Print the table."""
    shards, inference, world, rows = Shards(data, split), Inference(workers=0), World(), []
    for model in models:
        clip = load_for_eval(model, inference, world)
        pairs, _ = features_of_pairs(clip, shards, len(shards), world, inference)
        found: dict[str, list] = {}
        for seed in seeds:
            changed, is_wrong = planted(pairs, seed)
            numbers = numbers_of(changed)
            features = features_of(changed, numbers)
            distances = distances_of(features)
            wrong = is_wrong[numbers.image]
            for name, scores in (
                ("CLIP score", distances),
                ("the list", lemon(features, numbers.image, distances)),
            ):
                order = np.argsort(-scores.numpy(), kind="stable")[:FIRST]
                found.setdefault(name, []).append((auroc(scores.numpy(), wrong), wrong[order].mean()))
        for name, figures in found.items():
            cells = [f"{np.mean(column):.3f}" for column in zip(*figures, strict=True)]
            rows.append([model, name, *cells])
    print(markdown_table(["base", "score", "AUROC", f"precision at {FIRST}"], rows, left=2))


if __name__ == "__main__":
    tyro.cli(main)
