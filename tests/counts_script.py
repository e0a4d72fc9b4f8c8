"""Run under torchrun by test_measures: the counts of retrieval on random features with ties, as JSON."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from eval.retrieval.ranking import Relevance, positions, ranks
from train.world import World, joined_world


def counts(world: World, tile: int) -> dict[str, list]:
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randint(0, 3, (n, 6), generator=generator).float() for n in (57, 83))
    groups = np.arange(57) // 3
    text_of = np.concatenate([np.arange(83), np.arange(57)])
    group_of = np.concatenate([np.arange(83) % 19, groups])
    relevance = Relevance(groups, text_of, group_of)
    found = {}
    for name, of_queries in zip(("image", "text"), ranks(images, texts, relevance, world, tile), strict=True):
        for count in ("above", "tied", "matching"):
            found[f"{name} {count}"] = getattr(of_queries, count).tolist()
    above, tied = positions(images, texts, *relevance.all_pairs(), world, tile=tile)
    return found | {"pairs above": above.tolist(), "pairs tied": tied.tolist()}


if __name__ == "__main__":
    with joined_world() as world:
        found = counts(world, 6)
        if world.is_first:
            Path(sys.argv[1]).write_text(json.dumps(found))
