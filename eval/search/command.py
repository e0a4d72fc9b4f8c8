"""The commands embed, search, serve, site, compress and export: options. Torch is imported when they run."""

from pathlib import Path
from typing import Annotated

import tyro

from data_prep.atomic import check_replaceable, local_paths, write_json
from data_prep.cli import (
    Index,
    Model,
    OptionalFile,
    OptionalFolder,
    OptionalOutputFile,
    OutputFile,
    ShardsOrImages,
)
from data_prep.errors import UserError
from data_prep.terminal import say
from eval.options import INFERENCE, Inference, Split

OneModel = Annotated[Model, tyro.conf.Positional]
OneIndex = Annotated[Index, tyro.conf.Positional]
Indexes = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INDEX [INDEX ...]")]


def embed(
    model: OneModel,
    data: ShardsOrImages,
    out: Index,
    split: Split = "",
    overwrite: bool = False,
    inference: Inference = INFERENCE,
) -> None:
    """Make an index of the images of a corpus, for search, serve, cluster and export.

    Runs on one GPU or CPU, or under torchrun on several. A stopped command resumes when it is repeated.

      python -m eval embed runs/icons --data data/icons/shards --out indexes/icons
      torchrun --nproc_per_node 6 -m eval embed runs/icons --data photos/ --out indexes/photos

    Args:
        model: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder.
        data: Folder of shards, or of images (captions may be in a .txt beside each image).
        out: Folder to write; it appears when it is complete.
        split: Of shards: train, val or test; by default all splits.
        overwrite: Replace an index at --out.
        inference: How the model is run.
    """
    from eval.search.indexing import make_index
    from train.world import joined_world

    with joined_world() as world:
        make_index(model, data, out, split, overwrite, inference, world)


def search(
    index: OneIndex,
    text: str = "",
    image: Annotated[Path | None, tyro.conf.arg(metavar="IMAGE")] = None,
    queries_csv: OptionalFile = None,
    out: OptionalOutputFile = None,
    k: int = 10,
    filter: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN=VALUE")] = (),
    all_variants: bool = False,
    json: OptionalOutputFile = None,
    approximate: bool = False,
    vectors_only: bool = False,
    model: Model = "",
) -> None:
    """Find images by a sentence or by an image: the k nearest by cosine, one of each group of variants.

    Variants are images of one group in the data, such as sizes or recolorings of one icon. Words of four
    or more characters with a digit (part numbers) and words in quotation marks (names) are looked up in
    captions, columns and file names; images that have them come first.

      python -m eval search indexes/icons --text "a bell with a slash" --filter split=test
      python -m eval search indexes/icons --text 'the red valve AX-4711 by "Kowalski"'
      python -m eval search indexes/icons --image bell.png --k 20 --all-variants
      python -m eval search indexes/icons --queries-csv queries.csv --out found.csv

    Args:
        index: Folder that `python -m eval embed` made.
        text: A sentence to search with.
        image: An image to search with.
        queries_csv: CSV of many queries with a column text, or image (paths relative to the CSV), or both.
        out: CSV to write the results of --queries-csv to. A query that fails has a row with its `problem`,
            and does not change the exit code, 0.
        k: Number of images to find.
        filter: Search only images with this value in this column; several filters must all match.
        all_variants: List all images of a group, not only the best one.
        json: File to write the results to.
        approximate: Use an approximate index (inverted file) for more than a million images. It is made on
            first use, and its recall is measured and printed.
        vectors_only: Rank by cosine alone; look no words up.
        model: The model of the index, if it has moved since the index was made; or another one with its image
            tower, such as `python -m eval align` writes.
    """
    if bool(text) + (image is not None) + (queries_csv is not None) != 1:
        raise UserError("pass one of --text, --image and --queries-csv")
    if (queries_csv is None) != (out is None):
        raise UserError(
            "--queries-csv and --out belong together: pass both, or use --json for a single query"
        )
    if k < 1:
        raise UserError(f"--k {k}: must be at least 1")
    from eval.search.index import filter_rows, open_index

    opened = open_index(index)
    rows = filter_rows(opened, filter)
    # With torch: what cannot work has been refused before.
    from data_prep.sheets import check_csv
    from eval.classify.features import read_file
    from eval.search import query
    from eval.search.nearest import Nearest
    from eval.search.words import Words

    check_csv("--out", out, query.CSV_COLUMNS)
    data = read_file(image, "--image") if image else b""
    queries = list(query.read_queries(queries_csv)) if queries_csv else []
    nearest, words = Nearest(opened, approximate), None if vectors_only else Words(opened)
    searcher = query.Searcher(opened, opened.model(model), nearest, k, rows, not all_variants, words)
    if approximate:
        say(f"approximate index: recall@10 {searcher.nearest.recall():.3f} against exact search")
    if queries_csv:
        say(query.write_results(searcher, queries, queries_csv.parent, out))
        return
    if text:
        features = query.text_query(searcher.clip, [text])
    else:
        features = query.image_query(searcher.clip, data, f"--image {image}")
    (results,) = searcher.find(features, [text])
    say(query.table(results))
    if searcher.words and (unknown := searcher.words.unknown(text)):
        say(f"no image has {', '.join(unknown)}")
    if json:
        asked = {"text": text} if text else {"image": str(image)}
        described = {"index": str(index), "model": model or searcher.index.manifest["model"], **asked}
        write_json(json, {**described, "filter": list(filter), "results": results})


def serve(
    indexes: Indexes,
    model: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODEL")] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    approximate: bool = False,
    feedback: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None,
) -> None:
    """Serve a search page: sentences and images find images, with several models side by side.

    It answers only on this machine, unless --host is given.

      python -m eval serve indexes/base indexes/icons
      python -m eval serve indexes/icons --feedback marks.jsonl

    Args:
        indexes: Folders that `python -m eval embed` made, of the same data by different models; each gets a
            column of results.
        model: The models of the indexes, one for each, if they have moved since the indexes were made; or
            others with their image towers, such as `python -m eval align` writes.
        host: Address to listen on; 0.0.0.0 is open to everyone who can reach this machine.
        port: 0 takes a free port.
        approximate: Use an approximate index (inverted file) for more than a million images; it is made on
            first use.
        feedback: JSONL to append marks of results to, right or wrong, for `python -m data_prep build
            --feedback`; on another --host, the printed address then has a random token.
    """
    from data_prep import web
    from data_prep.marks import MarkLog
    from eval.search.index import check_indexes

    check_indexes(indexes, model)
    from eval.search.serve import app, open_columns

    marks = MarkLog(feedback) if feedback else None  # before the models are loaded
    web.serve(app(open_columns(indexes, model, approximate), host, marks), host, port, "search page")


def site(
    indexes: Indexes,
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")],
    model: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODEL")] = (),
    with_images: bool = False,
    packages: OptionalFolder = None,
    overwrite: bool = False,
) -> None:
    """Write the search page as a folder of static files, which any web server serves.

    The browser runs the text tower itself, so sentences find images without a server of ours; nothing is
    loaded from elsewhere. Needs the packages of requirements-export.txt, and npm once.

      python -m eval site indexes/small --out site
      python -m http.server --directory site

    Args:
        indexes: Folders that `python -m eval embed` or `python -m eval compress` made, of the same data by
            different models; each gets a column of results.
        out: Folder to write; it appears when it is complete.
        model: The models of the indexes, one for each, if they have moved since the indexes were made.
        with_images: Add the image towers, so that images find images, too.
        packages: Folder with the npm packages that the page needs (.tgz); else npm fetches them.
        overwrite: Replace a site at --out.
    """
    from eval.search.index import check_indexes

    check_replaceable(out, "site", overwrite, local_paths(*indexes, *model, packages))
    check_indexes(indexes, model)
    from eval.search.site import write_site

    write_site(indexes, out, model, with_images, packages)


def compress(
    index: OneIndex,
    out: Index,
    dims: int | None = None,
    max_loss: float = 0.005,
    model: Model = "",
    overwrite: bool = False,
) -> None:
    """Make a smaller index: the principal axes of its training images, at int8.

    The loss is measured first: captions of the split val, searched in the images of the split. The smaller
    index is one as any other, for search, serve, cluster and export.

      python -m eval compress indexes/icons --out indexes/small
      python -m eval compress indexes/icons --out indexes/small --dims 64

    Args:
        index: Folder that `python -m eval embed` made.
        out: Folder to write; it appears when it is complete.
        dims: Dimensions to keep; by default the fewest on a ladder that are within --max-loss.
        max_loss: The most that text to image R@1 and R@10 may each lose, as a share of the queries.
        model: The model of the index, if it has moved since the index was made.
        overwrite: Replace an index at --out.
    """
    if not 0 <= max_loss <= 1:
        raise UserError(f"--max-loss {max_loss:g}: must be a share from 0 to 1; 0.005 is half a point")
    from eval.search.index import read_manifest

    check_replaceable(out, "index", overwrite, local_paths(index, model))
    read_manifest(index)
    from eval.search.compress import compress_index

    compress_index(index, out, dims, max_loss, model)


def export(index: OneIndex, out: OutputFile, table: str = "images") -> None:
    """Export an index for other programs; the file extension of --out selects the format.

    .sql is for `psql -f`: a table (key, path, split, group_number, captions, columns, image_features
    halfvec) for pgvector 0.7 or newer, with an HNSW index by cosine. .parquet holds the metadata, and
    image_features as lists of float32. .npy holds image_features alone as fp16, with a .csv of keys, paths
    and captions beside it.

      python -m eval export indexes/icons --out icons.sql --table icons
      python -m eval export indexes/icons --out icons.parquet

    Args:
        index: Folder that `python -m eval embed` made.
        out: File to write: .sql, .parquet or .npy.
        table: Name of the table that the .sql creates; it must not exist.
    """
    from eval.search.export import export_index

    export_index(index, out, table)
