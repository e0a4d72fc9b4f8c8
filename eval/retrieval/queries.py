"""Questions beside the data's own captions: sentences that no image has as a caption, and parts of the data
by a column.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.embed import Embedded

MOST_SLICES = 40


class Asked(NamedTuple):
    """Sentences, and the images that each should find.

    Attributes:
        texts: the sentences [n].
        query_of, image_of: int64, all relevant pairs, sorted by query.
        missing: sentences none of whose images is in the split: they are listed, and not asked.
    """

    texts: list[str]
    query_of: np.ndarray
    image_of: np.ndarray
    missing: list[str]


def read_queries(path: Path, shards: Shards) -> Asked:
    """The sentences of a JSONL file, and the images that each should find.

    A line is {"text": "a bell that rings", "keys": [...]}; a key is that of a sample, or the path of its
    image. What is right is closed over groups, as everywhere.

    Raises:
        UserError: a line cannot be read (all such lines are counted, the first is shown), or no query has an
            image in this split.
    """
    numbers = {shards.key(number): number for number in range(len(shards))}
    numbers |= {shards.meta(number)["image"]: number for number in range(len(shards))}
    members: dict[int, list[int]] = {}
    for number, group in enumerate(shards.groups.tolist()):
        members.setdefault(group, []).append(number)
    texts, query_of, image_of, missing, problems = [], [], [], [], []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); a JSONL file in UTF-8 is wanted") from None
    for at, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, keys = row["text"], [str(key) for key in row["keys"]]
        except (ValueError, TypeError, KeyError) as error:
            problems.append(
                f"{path}:{at}: not a JSON object with text and keys ({type(error).__name__}: {error})"
            )
            continue
        groups = {int(shards.groups[numbers[key]]) for key in keys if key in numbers}
        if not str(text).strip():
            problems.append(f"{path}:{at}: an empty text")
            continue
        if not groups:
            missing.append(f"line {at}: {text} ({', '.join(keys[:3])})")
            continue
        images = sorted(number for group in groups for number in members[group])
        query_of += [len(texts)] * len(images)
        image_of += images
        texts.append(str(text))
    if problems:
        raise UserError(
            f"{problems[0]}; {len(problems)} of {len(lines)} lines cannot be used: put them right, or take"
            " them out"
        )
    if missing and not texts:
        raise UserError(
            f"{path}: none of {len(missing)} queries has an image in {shards.split} of {shards.folder}; the"
            f" first, {missing[0]}"
        )
    if not texts:
        raise UserError(
            f'{path}: no queries; a line like {{"text": "a bell", "keys": ["icons/bell.png"]}} is wanted'
        )
    return Asked(texts, np.array(query_of), np.array(image_of), missing)


def slices(
    values: dict[str, np.ndarray], embedded: Embedded, shards: Shards, column: str
) -> dict[str, dict[str, float]]:
    """R@1 of the queries of each value of a column, against the whole gallery; the most frequent values
    first.

    Args:
        values: "DIRECTION/NAME" -> float [queries]; see eval.retrieval.score.Queries.
        column: of the input of data_prep, as it stands in KEY.json.

    Raises:
        UserError: no sample has this column.
    """
    cells = [shards.meta(number).get("columns", {}).get(column) for number in range(len(shards))]
    if all(cell is None for cell in cells):
        having = sorted(
            {
                name
                for number in range(min(100, len(shards)))
                for name in shards.meta(number).get("columns", {})
            }
        )
        raise UserError(
            f"--slice {column}: no sample has this column; they have {', '.join(having) or 'none'}"
        )
    of_image = np.array(["(none)" if cell is None else str(cell) for cell in cells])
    of_text = of_image[embedded.captions.first_image()]
    found = {}
    names, counts = np.unique(of_image, return_counts=True)
    for name in names[np.argsort(-counts, kind="stable")][:MOST_SLICES].tolist():
        found[name] = {"n_images": int((of_image == name).sum())}
        for direction, cell in (("image_to_text", of_image), ("text_to_image", of_text)):
            if f"{direction}/R@1" in values and (cell == name).any():
                found[name][f"{direction}/R@1"] = float(values[f"{direction}/R@1"][cell == name].mean())
    return found
