"""The commands zeroshot and linear-probe: options and help. Torch is imported when they run."""

from pathlib import Path
from typing import Annotated

import tyro

from data_prep.cli import Model, OptionalFile, OptionalOutputFile, OptionalOutputFolder, OutputFolder
from data_prep.errors import UserError
from data_prep.terminal import say
from eval.options import INFERENCE, TABLE, Inference, LabelledTable, Split

Models = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL [MODEL ...]")]
OneModel = Annotated[Model, tyro.conf.Positional]
Labelled = Annotated[str, tyro.conf.arg(metavar="DATA")]
OptionalLabelled = Annotated[str | None, tyro.conf.arg(metavar="DATA")]
OptionalImage = Annotated[Path | None, tyro.conf.arg(metavar="IMAGE")]


def zeroshot(
    models: Models,
    data: OptionalLabelled = None,
    split: Split = "test",
    table: LabelledTable = TABLE,
    names: str = "",
    templates: str = "simple",
    parents: OptionalFile = None,
    image: OptionalImage = None,
    captions: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CAPTION [CAPTION ...]")] = (),
    json: OptionalOutputFile = None,
    out: OptionalOutputFolder = None,
    inference: Inference = INFERENCE,
) -> None:
    """Classify images with the text features of their class names; or compare one image with captions.

    Prints top-1, top-5, mean per class and F1 with 95 % intervals, several models side by side.

      python -m eval zeroshot runs/icons ViT-B-32:laion2b_s34b_b79k --data imagenette/ --split val
      python -m eval zeroshot runs/icons --data labels.csv --images photos/ --templates products --out report/
      python -m eval zeroshot runs/icons --image bell.png --captions "a bell" "a bell with a slash"

    Args:
        models: One or several of: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder.
        data: A folder per class, a table or tar as for data_prep build, a folder of Parquet files as on the
            hub, hf://datasets/USER/NAME, shards, Stanford Cars or imagenette.
        split: Split of the data, where it has splits.
        table: How a table is read.
        names: Class names for the sentences: a text file with a name per line in the order of the classes, a
            JSON file {class: name}, or imagenet for its 1000 classes. By default the names in the data.
        templates: openai (80 templates), simple (7 of them), plain, icons, products, cars, or a text file
            with a template per line that contains {}.
        parents: JSON file {child: parent} of classes that overlap ({"siamese": "cat"}); both levels are
            scored.
        image: An image to compare with --captions, instead of --data.
        captions: Sentences for --image.
        json: File to write the results to.
        out: Folder to write a page, the results, and the confusion matrix as CSV and PNG to; files are named
            by a hash of weights and data.
        inference: How models are run.
    """
    if not models:
        raise UserError("no MODEL given; pass NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder")
    if (data is None) == (image is None) or bool(captions) != bool(image):
        raise UserError("pass either --data DATA, or --image IMAGE with --captions")
    from data_prep.atomic import write_json
    from data_prep.tables import text_of
    from eval.classify import caption_match, zeroshot, zeroshot_page
    from train.world import joined_world

    with joined_world() as world:
        if image:
            result = caption_match.match_captions(image, captions, models, inference, world)
            text = caption_match.table(result)
        else:
            task = world.all_or_raise(
                lambda: zeroshot.read_task(data, split, table, names, templates, parents)
            )
            result = {"models": zeroshot.evaluate_models(models, task, inference, world, out)}
            text = text_of(zeroshot_page.result_parts(result["models"]))
        if world.is_first:
            say(text)
            if json:
                write_json(json, result)


def linear_probe(
    model: OneModel,
    data: Labelled,
    train_split: Split = "train",
    val_split: Split = "",
    split: Split = "test",
    test_data: OptionalLabelled = None,
    table: LabelledTable = TABLE,
    names: str = "",
    templates: str = "simple",
    cache: OutputFolder = Path("runs/features"),
    out: OptionalOutputFolder = None,
    json: OptionalOutputFile = None,
    page: OptionalOutputFile = None,
    inference: Inference = INFERENCE,
) -> None:
    """Train a linear probe and a small MLP on the frozen features of a model; compare both with zero-shot.

    The linear probe is logistic regression on image features; the MLP takes the zero-shot logits.

      python -m eval linear-probe runs/icons --data imagenette/ --split val
      python -m eval linear-probe runs/icons --data train.csv --test-data test.csv --page probe.html

    Args:
        model: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder.
        data: Images with labels to train on, in any format that zeroshot reads.
        train_split: Split of --data to train on, where it has splits.
        val_split: Split of --data that chooses the regularization. By default a fifth of the training images
            of each class; groups of shards are not divided.
        split: Split to test on, where the data has splits.
        test_data: Images with labels to test on; by default --split of --data, if it has splits.
        table: How a table is read.
        names: Class names for the sentences; see zeroshot.
        templates: openai (80 templates), simple (7 of them), plain, icons, products, cars, or a text file
            with a template per line that contains {}.
        cache: Folder that keeps features, named by a hash of weights and images.
        out: Folder to write the heads to; eval.classify.heads.load_head reads them.
        json: File to write results and training history to.
        page: HTML file to write: the table and validation curves; a PNG of the curves is written beside it.
        inference: How the model is run.
    """
    from data_prep.atomic import write_json
    from data_prep.tables import text_of
    from eval.classify import linear_probe, linear_probe_page
    from train.world import joined_world

    with joined_world() as world:
        task = world.all_or_raise(
            lambda: linear_probe.read_task(
                data, (train_split, val_split, split), test_data or data, table, names, templates
            )
        )
        result, heads = linear_probe.evaluate_heads(model, task, inference, world, cache)
        if not world.is_first:
            return
        say(text_of(linear_probe_page.result_parts(result)))
        if out:
            for head in heads:
                head.save(out)
            say(f"heads: {', '.join(str(out / f'{head.kind}.json') for head in heads)}")
        if json:
            write_json(json, result)
        if page:
            linear_probe_page.write_page(page, result)
            say(f"page: {page}")
