"""The parts of `python -m eval retrieval`: the result to compare with, the figures, and the report."""

from pathlib import Path

from data_prep.atomic import write_json
from data_prep.errors import UserError
from data_prep.shards import Shards
from data_prep.tables import text_of
from data_prep.terminal import say
from eval.embed import Embedded, embed_texts
from eval.options import Inference
from eval.retrieval.queries import QueryFile, slices
from eval.retrieval.score import (
    ExtraQueries,
    QueryScores,
    differences,
    evaluate_full,
    queries_file,
    read_json,
)
from eval.retrieval.table import result_parts
from train.model.clip import Clip
from train.world import World


def read_baseline(path: Path, shards: Shards) -> dict:
    """The result of --against.

    Raises:
        UserError: it was made on other data.
    """
    baseline = read_json(path)
    if (baseline["n_images"], baseline.get("data_sha256")) != (len(shards), shards.fingerprint):
        raise UserError(
            f"--against {path}: made on other data ({baseline.get('data')}, {baseline['n_images']} images)"
            f" than {shards.folder}, {shards.split}; compare results on the same data"
        )
    return baseline


def evaluate_split(
    clip: Clip,
    shards: Shards,
    embedded: Embedded,
    query_file: QueryFile | None,
    slice: str,
    inference: Inference,
    world: World,
) -> tuple[dict, QueryScores]:
    """The metrics with their intervals, and what each query scores; also of --queries and --slice."""
    extra = None
    if query_file:
        text_features = embed_texts(clip, query_file.texts, world, inference)
        extra = ExtraQueries(text_features, query_file.query_of, query_file.image_of)
    figures, scores = evaluate_full(embedded, shards.groups, world, extra)
    if slice:
        figures["slices"] = slices(scores.values, embedded, shards, slice)
    if query_file:
        figures["queries_without_images"] = query_file.missing
    return figures, scores


def report(
    result: dict, scores: QueryScores, against: Path | None, baseline: dict | None, json: Path | None
) -> None:
    """Add the paired differences to the result, print the tables, and write the JSON."""
    if against and queries_file(against).is_file():
        result["differences"] = differences(QueryScores.load(queries_file(against)), scores)
    say(text_of(result_parts(result, baseline)))
    if json:
        write_json(json, result)
        scores.save(queries_file(json))
