"""A model gets its numbers.

  python -m eval retrieval runs/icons --data data/icons/shards --split val --json out.json
      finds texts by images, images by texts and images by images: R@1, 5, 10, ranks, MRR, mAP, nDCG, with
      intervals
  python -m eval zeroshot runs/icons ViT-B-32:laion2b_s34b_b79k --data pictures/ --templates icons
      classifies pictures by sentences on their classes; with --show IMAGE --captions ... one picture, looked
      at closely
  python -m eval probe runs/icons --data pictures/ --save head/
      trains a linear head and a small network on the frozen features
  python -m eval confusion runs/icons demo-vit:none --data data/icons/shards --page out.html
      asks each image for its caption among others, shows heatmaps, and captions that steal images
  python -m eval compare demo-vit:none runs/icons --data data/icons/shards --out comparison
      a page and a table: paired differences, what got better and worse, forgetting, mixtures of weights
  python -m eval probes runs/icons --data data/icons/shards
      counting, binding, relations and swapped words, on drawings that are made on the spot
  python -m eval leaks ViT-B-32:laion2b_s34b_b79k --data data/icons/shards --csv leaks.csv
      lists images of val and test that have a twin in train, as this model sees them

  python -m eval embed runs/icons --data data/icons/shards --out indexes/icons
      makes an index of a corpus, for the four below; also under torchrun
  python -m eval search indexes/icons --text "a bell with a slash"
      finds pictures by a sentence, by a picture (--image FILE), or many (--batch queries.csv --out found.csv)
  python -m eval serve indexes/base indexes/icons
      opens a page to search in: sentences, pictures, filters, models side by side
  python -m eval export indexes/icons --out icons.sql
      writes an index for pgvector (.sql), as .parquet or as .npy
  python -m eval cluster indexes/icons --page clusters.html --label set
      what is in a corpus: clusters with names and a map of them, and near duplicates

MODEL is a run folder (its best checkpoint), NAME:PRETRAINED as open_clip knows them (ViT-B-32:none for random
weights), hf-hub:ID or local-dir:PATH. Under torchrun the ranks share the work. Each command has --help.
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from data_prep.errors import UserError, exit_on_user_error
from data_prep.shards import Shards, read_manifest
from eval.classify.linear_probe import probe
from eval.classify.zeroshot import zeroshot
from eval.cluster.clusters import cluster
from eval.compare.compare import compare
from eval.compare.confusion import confusion
from eval.compositionality.scenes import probes
from eval.embed import embed, embed_images, embed_texts, load_for_eval
from eval.options import INFERENCE, Inference
from eval.retrieval.leaks import leaks as leaks_of
from eval.retrieval.leaks import nearest, write_leaks
from eval.retrieval.page import write_page
from eval.retrieval.queries import read_queries, slices
from eval.retrieval.robustness import curves
from eval.retrieval.robustness import table as degraded_table
from eval.retrieval.score import Queries, differences, examine, queries_file, read_json, table, write_json
from eval.search.export import export
from eval.search.indexing import embed as embed_corpus
from eval.search.query import search
from eval.search.serve import serve
from train.model.clip import Clip
from train.world import World, joined_world


def retrieval(
    model: Annotated[str, tyro.conf.Positional],
    data: Path,
    split: str = "val",
    json: Path | None = None,
    against: Path | None = None,
    page: Path | None = None,
    queries: Path | None = None,
    slice: str = "",
    degrade: bool = False,
    inference: Inference = INFERENCE,
) -> None:
    """R@1, 5, 10, ranks, MRR, mAP and nDCG@10 with 95 % intervals: image to text, text to image, image to
    image.

    Args:
        model: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder.
        data: Folder of shards.
        split: train, val or test.
        json: File to write the result to.
        against: A result of another model on the same data, to print beside this one, with paired
            differences.
        queries: JSONL of sentences that are no captions, each with the images it should find: {"text": ...,
            "keys": [...]}.
        slice: Column of the data_prep input; R@1 is printed for each of its values.
        degrade: Ask with images that were shrunk, blurred and cut off as well; nine times the work.
        page: HTML file to write: the figures, and for some captions the pictures that they find; beside it a
            PNG.
        inference: How models are run.
    """
    with joined_world() as world:
        shards, other, clip = world.all_or_raise(
            lambda: prepare(model, data, split, against, inference, world)
        )
        embedded = embed(clip, shards, world, inference)
        asked, unseen = None, None
        if queries:
            asked = read_queries(queries, shards)
            unseen = (embed_texts(clip, asked.texts, world, inference), asked.query_of, asked.image_of)
        found, each = examine(embedded, shards.groups, world, unseen)
        if slice:
            found["slices"] = slices(each.values, embedded, shards, slice)
        names = {
            "weights_sha256": clip.fingerprint(),
            "data": f"{data}, {split}",
            "data_sha256": shards.fingerprint,
        }
        result = {"model": model, **names, **found}
        if asked:
            result["queries_without_images"] = asked.missing
        if degrade:
            result["degraded"] = curves(clip, shards, embedded, world, inference)
        if world.is_first:
            if against and queries_file(against).is_file():
                result["differences"] = differences(Queries.load(queries_file(against)), each)
            print(table(result, other))
            if degrade:
                print(degraded_table(result["degraded"], result["metrics"]["image_to_text/R@1"]))
            if json:
                write_json(json, result)
                each.save(queries_file(json))
            if page:
                write_page(
                    page, embedded, shards, [other, result] if other else [result], table(result, other)
                )
                print(f"pictures of what it finds: {page}; its figures: {page.with_suffix('.png')}")


def leaks(
    model: Annotated[str, tyro.conf.Positional],
    data: Path,
    csv: Path,
    threshold: float = 0.97,
    inference: Inference = INFERENCE,
) -> None:
    """Lists images of val and test whose nearest training image, by a model's image features, is nearly the
    same.

    An audit: nothing is changed. To look at it is to know whether the groups are right; data_prep's own audit
        compares
    pixels, and misses what was drawn again.

    Args:
        model: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder; better one that was not trained on
            this data.
        data: Folder of shards.
        csv: File to write the pairs to, the most similar first.
        threshold: Cosine of image features from which on a pair is listed; it depends on the model.
        inference: How models are run.
    """
    with joined_world() as world:
        train, _, clip = world.all_or_raise(lambda: prepare(model, data, "train", None, inference, world))
        train_features, rows, counts = embed_images(clip, train, world, inference), [], {}
        for split in ("val", "test"):
            if read_manifest(data)["splits"][split]["samples"]:
                shards = Shards(data, split)
                cosines, numbers = nearest(embed_images(clip, shards, world, inference), train_features)
                rows += leaks_of(shards, train, cosines, numbers, threshold)
                counts[split] = f"{int((cosines >= threshold).sum())} of {len(shards)} images of {split}"
        if world.is_first:
            write_leaks(csv, sorted(rows, key=lambda row: -float(row[3])))
            print(
                f"{', '.join(counts.values())} have a training image with a cosine of {threshold} or more:"
                f" {csv}"
            )


def prepare(
    model: str, data: Path, split: str, against: Path | None, inference: Inference, world: World
) -> tuple[Shards, dict | None, Clip]:
    """The split, verified, the result to compare with, and the model; the cheap ones first, so that a mistake
    costs no time.
    """
    shards = Shards(data, split)
    shards.verify(world.rank, world.world_size)
    other = read_json(against) if against else None
    if other and (other["n_images"], other.get("data_sha256")) != (len(shards), shards.fingerprint):
        made = f"{other.get('data')}, {other['n_images']} images"
        raise UserError(
            f"{against}: made on other data ({made}) than {data}, {split}; compare on the same data"
        )
    return shards, other, load_for_eval(model, inference, world)


def main() -> None:
    if len(sys.argv) == 1:
        print(__doc__.strip())
        return
    commands = {"retrieval": retrieval, "zeroshot": zeroshot, "probe": probe, "confusion": confusion}
    commands |= {"compare": compare, "probes": probes, "leaks": leaks}
    commands |= {
        "embed": embed_corpus,
        "search": search,
        "serve": serve,
        "cluster": cluster,
        "export": export,
    }
    tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="python -m eval",
        description=__doc__,
        config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes),
    )


if __name__ == "__main__":
    exit_on_user_error(main)
