"""The commands `python -m eval retrieval` and `leaks`; light at the top, so that --help answers at once."""

from typing import Annotated

import tyro

from data_prep.cli import Model, OptionalFile, OptionalOutputFile, OutputFile, Shards
from data_prep.terminal import say
from eval.options import INFERENCE, Inference, Split


def retrieval(
    model: Annotated[Model, tyro.conf.Positional],
    data: Shards,
    split: Split = "test",
    json: OptionalOutputFile = None,
    against: OptionalFile = None,
    page: OptionalOutputFile = None,
    queries: OptionalFile = None,
    slice: str = "",
    robustness: bool = False,
    inference: Inference = INFERENCE,
) -> None:
    """Retrieval image to text, text to image and image to image: R@k, ranks, MRR, mAP, nDCG@10, intervals.

      python -m eval retrieval runs/icons --data data/icons/shards --json out.json --page out.html
      python -m eval retrieval runs/icons --data shards --against out.json --queries queries.jsonl --slice set

    Args:
        model: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder.
        data: Folder of shards.
        split: train, val or test.
        json: File to write the result to; beside it the scores of each query, for --against.
        against: Result of another model on the same data, to print beside this one with paired differences.
        page: HTML file to write: the figures, and images found by random captions; beside it a PNG of R@k.
        queries: JSONL file of sentences that are no captions, with the images that each should find:
            {"text": ..., "keys": [...]}.
        slice: Column of the data_prep input; R@1 is also shown for each of its values.
        robustness: Also query with downscaled, blurred and cropped images; embeds the images nine more times.
        inference: How models are run.
    """
    from eval.embed import embed, load_for_eval, open_shards, precision_of
    from eval.retrieval.queries import read_queries
    from eval.retrieval.robustness import curves
    from eval.retrieval.run import evaluate_split, read_baseline, report
    from train.world import joined_world

    if page:  # only a page needs matplotlib
        from eval.retrieval.page import write_retrieval_page

    def prepare() -> tuple:
        """The cheap checks first, so that a mistake is reported before a model is loaded."""
        shards = open_shards(data, split, world)
        baseline = read_baseline(against, shards) if against else None
        query_file = read_queries(queries, shards) if queries else None
        return shards, baseline, query_file, load_for_eval(model, inference, world)

    with joined_world() as world:
        shards, baseline, query_file, clip = world.all_or_raise(prepare)
        embedded = embed(clip, shards, world, inference)
        figures, scores = evaluate_split(clip, shards, embedded, query_file, slice, inference, world)
        source = {
            "model": model,
            "weights_sha256": clip.fingerprint(),
            "precision": precision_of(clip),
            "data": f"{data}, {split}",
            "data_sha256": shards.fingerprint,
        }
        result = source | figures
        if robustness:
            result["robustness"] = curves(clip, shards, embedded, world, inference)
        if world.is_first:
            report(result, scores, against, baseline, json)
            if page:
                write_retrieval_page(page, embedded, shards, result, baseline)
                say(f"\npage: {page}; plot: {page.with_suffix('.png')}")


def leaks(
    model: Annotated[Model, tyro.conf.Positional],
    data: Shards,
    csv: OutputFile,
    threshold: float = 0.97,
    inference: Inference = INFERENCE,
) -> None:
    """List images of val and test whose nearest training image, by a model's image features, is nearly the
    same.

      python -m eval leaks ViT-B-32:laion2b_s34b_b79k --data data/icons/shards --csv leaks.csv

    An audit of the groups; nothing is changed. The audit of data_prep compares pixels, and misses images that
    were drawn again.

    Args:
        model: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder; better one that was not trained on
            this data.
        data: Folder of shards.
        csv: File to write the pairs to, the most similar first.
        threshold: Smallest cosine of image features that is listed; a good value depends on the model.
        inference: How models are run.
    """
    from data_prep.shards import read_manifest
    from data_prep.sheets import check_csv
    from eval.embed import embed_images, load_for_eval, open_shards
    from eval.retrieval.leaks import HEADER, nearest, write_leaks
    from eval.retrieval.leaks import leaks as leaks_of
    from train.world import joined_world

    check_csv("--csv", csv, HEADER)

    def prepare() -> tuple:
        return open_shards(data, "train", world), load_for_eval(model, inference, world)

    with joined_world() as world:
        train, clip = world.all_or_raise(prepare)
        train_features, rows, counts = embed_images(clip, train, world, inference), [], []
        for split in ("val", "test"):
            if read_manifest(data)["splits"][split]["samples"]:
                shards = world.all_or_raise(lambda split=split: open_shards(data, split, world))
                cosines, numbers = nearest(embed_images(clip, shards, world, inference), train_features)
                rows += leaks_of(shards, train, cosines, numbers, threshold)
                counts.append(f"{int((cosines >= threshold).sum())} of {len(shards)} images of {split}")
        if world.is_first:
            write_leaks(csv, sorted(rows, key=lambda row: -float(row[3])))
            say(f"{', '.join(counts)} have a training image with a cosine of {threshold} or more: {csv}")
