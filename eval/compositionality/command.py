"""The command `python -m eval compositionality`; light at the top, so that --help answers at once."""

from typing import Annotated

import tyro

from data_prep.cli import Model, OptionalOutputFile, OptionalShards
from data_prep.errors import UserError
from data_prep.terminal import say
from eval.options import INFERENCE, Inference, Split


def compositionality(
    model: Annotated[Model, tyro.conf.Positional],
    data: OptionalShards = None,
    split: Split = "test",
    n: int = 10,
    seed: int = 0,
    json: OptionalOutputFile = None,
    page: OptionalOutputFile = None,
    inference: Inference = INFERENCE,
) -> None:
    """Counting, color-shape binding and relations on drawings, and swapped words in your own captions.

      python -m eval compositionality runs/icons --data data/icons/shards --page out.html

    Args:
        model: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder.
        data: Folder of shards, for the swapped words; without it they are left out.
        split: train, val or test.
        n: Drawings of each number, at constant total area and at constant shape area; 10 n pairs of binding,
            and of relations.
        seed: Of the drawings and of the swaps.
        json: File to write the result to.
        page: HTML file to write: the tables, and examples of the drawings.
        inference: How models are run.
    """
    from data_prep.atomic import write_json
    from data_prep.tables import text_of
    from eval.compositionality.page import result_parts, write_compositionality_page
    from eval.compositionality.score import draw, evaluate_drawings, evaluate_swaps
    from eval.compositionality.swaps import swaps_of
    from eval.embed import load_for_eval, open_shards
    from train.world import joined_world

    def prepare() -> tuple:
        if n < 1:
            raise UserError(f"--n {n}: must be at least 1")
        shards = open_shards(data, split, world) if data else None
        swaps = swaps_of(shards, seed) if shards else []
        return shards, swaps, load_for_eval(model, inference, world)

    with joined_world() as world:
        shards, swaps, clip = world.all_or_raise(prepare)
        drawings = draw(n, seed)
        result = {"model": model, "weights_sha256": clip.fingerprint(), "seed": seed, "n": n}
        result |= evaluate_drawings(clip, drawings, world, inference)
        if shards:
            result |= {"data": f"{data}, {split}", "data_sha256": shards.fingerprint}
            result["swaps"] = evaluate_swaps(clip, shards, swaps, world, inference)
        if world.is_first:
            say(text_of(result_parts(result)))
            if json:
                write_json(json, result)
            if page:
                write_compositionality_page(page, result, drawings, swaps)
                say(f"page: {page}")
