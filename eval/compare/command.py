"""The commands `python -m eval compare` and `confusion`; light at the top, so that --help answers at once."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from data_prep.cli import OptionalOutputFile, OptionalShards, OutputFolder, Shards
from data_prep.errors import UserError
from data_prep.terminal import say
from eval.options import INFERENCE, TABLE, Inference, LabelledTable, Split

Models = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL [MODEL ...]")]
OptionalData = Annotated[str | None, tyro.conf.arg(metavar="DATA")]
Alphas = Annotated[tuple[float, ...], tyro.conf.arg(metavar="ALPHA [ALPHA ...]")]
OptionalAlpha = Annotated[float | None, tyro.conf.arg(metavar="ALPHA")]


def compare(
    models: Models,
    data: Shards,
    split: Split = "test",
    out: OutputFolder = Path("comparison"),
    retention_set: OptionalShards = None,
    retention_split: Split = "test",
    labelled: OptionalData = None,
    labelled_split: Split = "test",
    table: LabelledTable = TABLE,
    templates: str = "simple",
    wise_ft: Alphas = (),
    save: OptionalAlpha = None,
    inference: Inference = INFERENCE,
) -> None:
    """Compare models on the same data: a page, a Markdown table, JSON, plots.

    Differences are from the first model.

      python -m eval compare demo-vit:none runs/icons --data data/icons/shards --out comparison
      python -m eval compare BASE runs/mine --data shards --retention-set general --wise-ft 0 0.4 0.8 1

    Args:
        models: The base model first, then those that were fine-tuned from it: as in retrieval.
        data: Folder of shards.
        split: train, val or test.
        out: Folder to write compare.html, compare.md, compare.json and the plots as PNG to.
        retention_set: Shards of a general data set, to measure forgetting.
        retention_split: Split of the retention set.
        labelled: Labelled images to classify as well, in any format that zeroshot reads.
        labelled_split: Split of the labelled images, where they have splits.
        table: How a table of labelled images is read.
        templates: Sentences for class names, as in zeroshot.
        wise_ft: Weights of the last model in mixtures with the first, like 0 0.2 0.4 0.6 0.8 1 (WiSE-FT).
        save: Write the mixture with this weight as a model to OUT/wise_ft; it loads as
            local-dir:OUT/wise_ft.
        inference: How models are run.
    """
    if len(models) < 2:
        raise UserError(
            "compare: expected two models or more, the base first; one model alone: python -m eval retrieval"
        )
    for option, alphas in (("--wise-ft", wise_ft), ("--save", () if save is None else (save,))):
        if wrong := [alpha for alpha in alphas if not 0 <= alpha <= 1]:
            raise UserError(f"{option} {wrong[0]:g}: must be from 0, the first model, to 1, the last")
    from data_prep.atomic import check_replaceable, local_paths
    from eval.classify.templates import read_templates
    from eval.compare.compare import (
        Inputs,
        add_wise_ft,
        evaluate_all,
        read_inputs,
        result_of,
        write_comparison,
    )
    from train.model.source import check_models
    from train.world import joined_world

    def prepare() -> Inputs:
        check_models(models)
        if save is not None:
            check_replaceable(out / "wise_ft", "model", overwrite=True, inputs=local_paths(*models))
        shards = (data, split), (retention_set, retention_split)
        return read_inputs(*shards, (labelled, labelled_split, table), read_templates(templates), world)

    with joined_world() as world:
        inputs = world.all_or_raise(prepare)
        evaluated = evaluate_all(models, inputs, inference, world)
        result = result_of(evaluated, inputs, templates)
        if wise_ft or save is not None:
            folder = out / "wise_ft"
            add_wise_ft(result, (models[0], models[-1]), wise_ft, save, folder, inputs, inference, world)
        if world.is_first:
            say(write_comparison(out, result, evaluated, inputs.shards))
            if save is None and (out / "wise_ft").is_dir():
                say(f"warning: {out / 'wise_ft'} is the mixture of an earlier comparison", file=sys.stderr)
            say(f"page: {out / 'compare.html'}")


def confusion(
    models: Models,
    data: Shards,
    split: Split = "test",
    k: int = 9,
    columns: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN [COLUMN ...]")] = ("caption",),
    seed: int = 0,
    json: OptionalOutputFile = None,
    page: OptionalOutputFile = None,
    inference: Inference = INFERENCE,
) -> None:
    """Accuracy of each image's caption against k random captions of other groups, and hub captions.

      python -m eval confusion runs/icons demo-vit:none --data data/icons/shards --page out.html

    A hub is a caption that ranks first for many images of other groups.

    Args:
        models: Each NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder.
        data: Folder of shards.
        split: train, val or test.
        k: Wrong captions for each image.
        columns: Columns to take the texts from: caption, or another column that data_prep kept.
        seed: Of the draw of wrong captions, which is the same for all models.
        json: File to write the result to.
        page: HTML file to write: the table, softmax heatmaps on one scale, and the images that hubs rank
            first for.
        inference: How models are run.
    """
    from data_prep.atomic import write_json
    from data_prep.tables import text_of
    from eval.compare.confusion import Questions, ask, questions, read_columns, result_of
    from eval.compare.confusion_page import confusion_parts, write_confusion_page
    from eval.embed import open_shards
    from train.model.source import check_models
    from train.world import joined_world

    def prepare() -> Questions:
        if not models:
            raise UserError("confusion: no MODEL given; name one or more")
        check_models(models)
        shards = open_shards(data, split, world)
        return questions(shards, read_columns(shards, columns), k, seed)

    with joined_world() as world:
        asked = world.all_or_raise(prepare)
        answers = [ask(model, asked, inference, world) for model in models]
        result = result_of(answers, asked, f"{data}, {split}", k, seed)
        if world.is_first:
            say(text_of(confusion_parts(result)))
            if json:
                write_json(json, result)
            if page:
                write_confusion_page(page, result, asked.shards)
                say(f"page: {page}; plot: {page.with_suffix('.png')}")
