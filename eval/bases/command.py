"""The command `python -m eval bases`; light at the top, so that --help answers at once."""

from typing import Annotated

import tyro

from data_prep.cli import OptionalOutputFile, Shards
from data_prep.errors import UserError
from eval.options import INFERENCE, Inference, Split

Models = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL [MODEL ...]")]


def bases(
    models: Models,
    data: Shards,
    split: Split = "val",
    max_images: int = 20_000,
    json: OptionalOutputFile = None,
    inference: Inference = INFERENCE,
) -> None:
    """Which model to start from: several on your own data, before any is trained.

      python -m eval bases ViT-B-32:laion2b_s34b_b79k ViT-B-16-SigLIP2:webli --data data/icons/shards

    Each model is scored as it is (zero-shot), and with two square matrices fitted to its cached features of
    the training split, which takes a minute or two: a model that is good after the fit has features to work
    with.

    Args:
        models: Each NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder.
        data: Folder of shards.
        split: Split to score on. Not the one that the trained model is tested on: a choice is a fit too.
        max_images: Images of the training split to fit on; each is embedded once.
        json: File to write the result to.
        inference: How models are run.
    """
    if not models:
        raise UserError("bases: no MODEL given; name those that you consider")
    if split == "train":
        raise UserError(
            "--split train: the matrices are fitted to that split, so it would rank models by what they"
            " memorize; pass val or test"
        )
    if max_images < 1:
        raise UserError(f"--max-images {max_images}: must be at least 1")
    from data_prep.atomic import write_json
    from data_prep.tables import text_of
    from data_prep.terminal import say
    from eval.bases.rank import evaluate_base, parts, rank_bases
    from eval.embed import open_shards
    from train.model.source import check_models
    from train.world import joined_world

    def prepare() -> tuple:
        check_models(models)
        return open_shards(data, "train", world), open_shards(data, split, world)

    with joined_world() as world:
        train, val = world.all_or_raise(prepare)
        found = [evaluate_base(model, train, val, max_images, inference, world) for model in models]
        result = {"data": f"{data}, {split}", "data_sha256": val.fingerprint} | rank_bases(
            *map(list, zip(*found, strict=True))
        )
        if world.is_first:
            say(text_of(parts(result)))
            if json:
                write_json(json, result)
