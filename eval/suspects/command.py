"""The command `python -m eval suspects`; light at the top, so that --help answers at once."""

import sys
from typing import Annotated

import tyro

from data_prep.cli import Model, OutputFile, Shards
from data_prep.errors import UserError
from eval.options import INFERENCE, Inference, Split


def suspects(
    model: Annotated[Model, tyro.conf.Positional],
    data: Shards,
    csv: OutputFile,
    split: Split = "train",
    most: int = 500,
    max_images: int = 100_000,
    inference: Inference = INFERENCE,
) -> None:
    """List the captions of a data set that are probably wrong, the worst first, for a person to look at.

      python -m eval suspects ViT-B-32:laion2b_s34b_b79k --data data/icons/shards --csv suspects.csv
      python -m data_prep review data/icons/shards --suspects suspects.csv

    Three reasons: a caption does not fit its image (by the model, and by the captions and images of its
    neighbours); a caption is near to images of many groups; two groups look like one thing.

    Args:
        model: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder. Not one that was trained on this
            data: it has learned the errors.
        data: Folder of shards.
        csv: File to write the list to.
        split: train, val or test.
        most: Rows for each reason.
        max_images: Images that are compared, drawn without regard to their order; time grows with the square.
        inference: How models are run.
    """
    if most < 1:
        raise UserError(f"--most {most}: must be at least 1")
    if max_images < 2:
        raise UserError(f"--max-images {max_images}: must be at least 2, as images are compared")
    from data_prep.sheets import check_csv, write_csv
    from data_prep.suspects import COLUMNS
    from data_prep.tables import Table, counted, text_of
    from data_prep.terminal import say
    from eval.bases.rank import features_of_pairs
    from eval.embed import load_for_eval, open_shards
    from eval.suspects.find import REASONS, find, remarks
    from train.run.records import run_trained_on
    from train.world import joined_world

    check_csv("--csv", csv, COLUMNS)

    def prepare() -> tuple:
        return open_shards(data, split, world), load_for_eval(model, inference, world)

    with joined_world() as world:
        shards, clip = world.all_or_raise(prepare)
        pairs, chosen = features_of_pairs(clip, shards, max_images, world, inference)
        if world.is_first:
            if run := run_trained_on(model, shards.fingerprint):
                say(
                    f"warning: {run} was trained on {data}, and has learned its errors: fewer of them stand"
                    " out; pass the model that it began with",
                    file=sys.stderr,
                )
            rows, n_pairs, known = find(pairs, shards, chosen, most)
            write_csv(csv, COLUMNS, ([row[name] for name in COLUMNS] for row in rows), is_input=True)
            counts = [
                [reason, why, f"{sum(row['reason'] == reason for row in rows):,}"]
                for reason, why in REASONS.items()
            ]
            table = Table(["reason", "what it means", "listed"], counts, left=2)
            say(text_of([table, *remarks(n_pairs, known)]))
            say(f"\n{counted(len(rows), 'row')} of {counted(len(chosen), 'image')}: {csv}")
            say(f"look at them: python -m data_prep review {data} --suspects {csv}")
