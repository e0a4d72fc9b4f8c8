"""The list that `python -m eval suspects` writes and the review page shows."""

import csv
import io
from pathlib import Path
from typing import NamedTuple

from data_prep.build.decisions import KEY
from data_prep.errors import UserError
from data_prep.sheets import read_cell

COLUMNS = ["key", "reason", "score", "image", "caption", "other_key", "other"]


class Suspect(NamedTuple):
    """A row: why an image should be looked at, about which of its captions, and the other image if there is
    one.
    """

    reason: str
    caption: str
    other_key: str
    other: str


def read_suspects(path: Path) -> dict[str, list[Suspect]]:
    """Key of an image -> its rows; keys in the order of the list, the worst first.

    Raises:
        UserError: it cannot be read, is another table, or lists no image.
    """
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")))
        header, rows = set(reader.fieldnames or ()), list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"--suspects {path}: cannot be read ({error})") from None
    make = f"make the list with: python -m eval suspects MODEL --data SHARDS --csv {path}"
    if not rows:
        what = "has only its header" if header.issuperset(COLUMNS) else "is empty"
        raise UserError(f"--suspects {path}: {what}, so no image is listed; review without it, or {make}")
    found: dict[str, list[Suspect]] = {}
    for line, row in enumerate(rows, 2):
        if not header.issuperset(COLUMNS) or not KEY.fullmatch(row["key"] or ""):
            raise UserError(
                f"--suspects {path}, line {line}: expected the columns {', '.join(COLUMNS)}, and a key of 16"
                f" digits and letters a to f; {make}"
            )
        found.setdefault(row["key"], []).append(
            Suspect(*(read_cell(row[name] or "") for name in Suspect._fields))
        )
    return found
