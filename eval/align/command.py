"""The command `python -m eval align`; light at the top, so that --help answers at once."""

from typing import Annotated

import tyro

from data_prep.cli import Folder, Index, Model, OptionalOutputFile, Shards
from data_prep.errors import UserError
from eval.options import INFERENCE, Inference, Split


def align(
    index: Annotated[Index, tyro.conf.Positional],
    model: Annotated[Model, tyro.conf.Positional],
    data: Shards,
    out: Folder,
    split: Split = "test",
    max_images: int = 20_000,
    overwrite: bool = False,
    json: OptionalOutputFile = None,
    inference: Inference = INFERENCE,
) -> None:
    """Search an index of another model's features with a new model: a linear map, fitted in seconds.

      python -m eval align indexes/base runs/icons --data data/icons/shards --out aligned
      python -m eval search indexes/base --model local-dir:aligned --text "a bell with a slash"

    --out is an ordinary model: the text tower of MODEL, whose projection contains the map, and the image
    tower of the index's model, bit for bit. No vector of the index is read or written. The table says what
    part of the new model's gain is kept, and what only embedding all images again gives.

    Args:
        index: Folder that `python -m eval embed` made with the old model.
        model: The new model: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder.
        data: Folder of shards; the map is fitted on its training split, its ridge on val.
        out: Folder to write the aligned model to.
        split: Split that the old, the aligned and the new model are compared on.
        max_images: Images of the training split to fit on; each is embedded once, by the old model.
        overwrite: Replace a model at --out that this command wrote before.
        json: File to write the comparison to.
        inference: How models are run.
    """
    if max_images < 1:
        raise UserError(f"--max-images {max_images}: must be at least 1")
    if split == "train":
        raise UserError("--split train: the map is fitted on it; pass test")
    from data_prep.atomic import write_json
    from data_prep.tables import text_of
    from data_prep.terminal import say
    from eval.align.align import align_index, parts
    from train.world import joined_world

    with joined_world() as world:
        result = align_index(index, model, data, out, split, max_images, overwrite, inference, world)
        if world.is_first:
            say(text_of(parts(result)))
            if json:
                write_json(json, result)
