"""Queries that are no captions, from a JSONL file; and slices of the data by the values of a column."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.errors import UserError
from data_prep.shards import Shards
from data_prep.strict_json import parse_json
from eval.embed import Embedded
from train.metrics import DIRECTIONS

MAX_SLICES = 40


class QueryFile(NamedTuple):
    """Sentences, and the images that each should find.

    Attributes:
        texts: the sentences [n].
        query_of, image_of: int64, all relevant pairs, sorted by query.
        missing: sentences without an image in the split, which are not scored.
    """

    texts: list[str]
    query_of: np.ndarray
    image_of: np.ndarray
    missing: list[str]


def read_queries(path: Path, shards: Shards) -> QueryFile:
    """Read a JSONL file of sentences.

    A line is {"text": "a bell that rings", "keys": [...]}; a key is that of a sample, or the path of its
    image. All members of a relevant image's group are relevant.

    Raises:
        UserError: a line cannot be read (such lines are counted, the first is shown), or no query has an
            image in this split.
    """
    number_of = {shards.key(number): number for number in range(len(shards))}
    number_of |= {shards.meta(number)["image"]: number for number in range(len(shards))}
    members: dict[int, list[int]] = {}
    for number, group in enumerate(shards.groups.tolist()):
        members.setdefault(group, []).append(number)
    texts, query_of, image_of, missing, problems = [], [], [], [], []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a JSONL file in UTF-8") from None
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text, keys = _parse(line)
        except ValueError as error:
            problems.append(f"{path}:{line_number}: {error}")
            continue
        groups = {int(shards.groups[number_of[key]]) for key in keys if key in number_of}
        if not groups:
            missing.append(f"line {line_number}: {text} ({', '.join(keys[:3])})")
            continue
        images = sorted(number for group in groups for number in members[group])
        query_of += [len(texts)] * len(images)
        image_of += images
        texts.append(text)
    if problems:
        raise UserError(f"{problems[0]}; fix or remove the {len(problems)} of {len(lines)} lines with errors")
    if missing and not texts:
        raise UserError(
            f"{path}: none of {len(missing)} queries has an image in {shards.split} of {shards.folder};"
            f" the first is {missing[0]}"
        )
    if not texts:
        raise UserError(
            f'{path}: no queries; a line is like {{"text": "a bell", "keys": ["icons/bell.png"]}}'
        )
    return QueryFile(texts, np.array(query_of), np.array(image_of), missing)


def _parse(line: str) -> tuple[str, list[str]]:
    """Text and keys of a line; a ValueError says what is wrong with it."""
    try:
        row = parse_json(line)
        text, keys = str(row["text"]), [str(key) for key in row["keys"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"not a JSON object with text and keys ({type(error).__name__}: {error})") from None
    if not text.strip():
        raise ValueError("an empty text")
    return text, keys


def slices(
    values: dict[str, np.ndarray], embedded: Embedded, shards: Shards, column: str
) -> dict[str, dict[str, float]]:
    """R@1 of the queries of each value of a column, against the whole gallery; the most frequent values
    first.

    A text is a query of every slice that has an image with this caption.

    Args:
        values: "DIRECTION/METRIC" -> float [queries]; see eval.retrieval.score.QueryScores.
        column: of the input of data_prep, as KEY.json has it.

    Raises:
        UserError: no sample has this column.
    """
    columns = [shards.meta(number).get("columns", {}) for number in range(len(shards))]
    if all(cells.get(column) is None for cells in columns):
        known = sorted({name for cells in columns[:100] for name in cells})
        raise UserError(
            f"--slice {column}: no sample has this column; they have {', '.join(known) or 'none'}"
        )
    of_image = np.array([str("(none)" if cells.get(column) is None else cells[column]) for cells in columns])
    captions = embedded.captions
    names, counts = np.unique(of_image, return_counts=True)
    found = {}
    for name in names[np.argsort(-counts, kind="stable")][:MAX_SLICES].tolist():
        images = of_image == name
        texts = np.zeros(len(captions.texts), bool)
        texts[captions.text_of[images[captions.image_of]]] = True  # a text may be in several slices
        found[name] = {"n_images": int(images.sum())}
        for direction, queries in zip(DIRECTIONS, (images, texts), strict=True):
            metric = f"{direction}/R@1"
            if metric in values and queries.any():
                found[name][metric] = float(values[metric][queries].mean())
    return found
