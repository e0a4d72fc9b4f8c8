"""Rows of a CSV become records or rejects, and none is lost: records + rejects = rows.

CSV row (line, image, caption, group) --+--> Picture: one image, the rows that caption it
                                        +--> Reject: the line, and a named reason
"""

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from data_prep.errors import UserError


@dataclass(frozen=True)
class Row:
    line: int  # in the file, 1-based, counting the header and line breaks inside quotes
    image: str
    caption: str
    group: str


@dataclass(frozen=True)
class Reject:
    line: int
    image: str
    reason: str
    detail: str = ""


@dataclass
class Picture:
    """One image file and the rows that caption it, in the order of the CSV."""

    path: Path
    group: str
    rows: list[Row] = field(default_factory=list)

    @property
    def captions(self) -> list[str]:
        return [row.caption for row in self.rows]


def read_rows(
    csv: Path, image_column: str, caption_column: str, group_column: str = "", delimiter: str = ",", encoding: str = "utf-8-sig"
) -> list[Row]:
    """The rows of `csv`, cells as text ("null" and "NA" are words, an empty cell is "").

    Raises:
        UserError: the file is missing, cannot be decoded or parsed, lacks a column, or has no rows.
    """
    wanted = [column for column in (image_column, caption_column, group_column) if column]
    try:
        # The header is read as a row: else pandas takes a first row with one cell too many for one with an index,
        # and shifts every column. Blank lines are kept because lines are counted below.
        cells = pd.read_csv(
            csv, sep=delimiter, encoding=encoding, dtype=str, header=None, keep_default_na=False, na_filter=False, skip_blank_lines=False
        ).fillna("")  # what a short row lacks is empty, in every version of pandas
    except FileNotFoundError:
        raise UserError(f"{csv}: no such file; the first argument is the CSV of images and captions") from None
    except pd.errors.EmptyDataError:
        raise UserError(f"{csv}: the file is empty; a header and one row per caption are wanted") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{csv}: byte {error.start} is not {encoding}; pass --encoding, for example latin-1 or utf-16") from None
    except (OSError, LookupError, ValueError) as error:
        raise UserError(
            f"{csv}: cannot be read as a CSV ({str(error).strip()}); "
            "quote captions that hold the delimiter, and check --delimiter and --encoding"
        ) from None
    names = cells.iloc[0].tolist()
    missing = [column for column in wanted if column not in names]
    if missing:
        raise UserError(
            f"{csv}: no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, names))}: "
            "pass --image-column, --caption-column, --group-column (and --delimiter if that looks like one column)"
        )
    if repeated := [column for column in wanted if names.count(column) > 1]:
        raise UserError(f"{csv}: the header has {', '.join(map(repr, repeated))} more than once; rename all but one")
    # A quoted cell may hold line breaks: a row starts where the rows before it end.
    height = 1 + sum(cells[column].str.count("\n") for column in cells.columns)
    line = 1 + height.cumsum() - height
    table = cells.set_axis(names, axis=1)
    groups = table[group_column] if group_column else [""] * len(table)
    columns = zip(line.tolist(), table[image_column], table[caption_column], groups, (cells == "").all(axis=1), strict=True)
    rows = [Row(line, image, caption, group) for line, image, caption, group, blank in columns if not blank][1:]
    if not rows:
        raise UserError(f"{csv}: a header and no rows; one row per caption is wanted")
    return rows


def pair(rows: list[Row], images: Path) -> tuple[list[Picture], list[Reject]]:
    """Rows joined by image file, and the rows that cannot be used.

    A path is relative to the folder `images` (or absolute); one that leaves that folder, also by way of a
    symbolic link, is refused. A row without a group is a group of its own image.

    Raises:
        UserError: `images` is not a folder.
    """
    if not images.is_dir():
        raise UserError(f"{images}: no such folder; pass --images, the folder that the image paths are relative to")
    root = os.path.realpath(images)
    pictures: dict[str, Picture] = {}
    seen: dict[str, set[str]] = defaultdict(set)
    rejects: list[Reject] = []
    for row in rows:
        caption = " ".join(row.caption.split())
        name = row.image.strip()
        if not name or "\0" in name:
            rejects.append(Reject(row.line, row.image, "no image path"))
            continue
        if not caption:
            rejects.append(Reject(row.line, row.image, "empty caption"))
            continue
        path = os.path.realpath(os.path.join(root, name))
        inside = os.path.relpath(path, root)
        if inside.split(os.sep)[0] == os.pardir:
            rejects.append(Reject(row.line, row.image, "outside of the images folder", f"not under {images}; see --images"))
            continue
        if not os.path.isfile(path):
            rejects.append(Reject(row.line, row.image, "missing file", f"no such file under {images}; see --images"))
            continue
        picture = pictures.setdefault(inside, Picture(Path(path), row.group or f"image:{inside}"))
        if row.group and row.group != picture.group:
            rejects.append(Reject(row.line, row.image, "conflicting group", f"{row.group!r} here, {picture.group!r} before"))
        elif caption in seen[inside]:
            rejects.append(Reject(row.line, row.image, "duplicate row", "the same image and caption stand above"))
        else:
            seen[inside].add(caption)
            picture.rows.append(Row(row.line, inside, caption, picture.group))
    return [picture for picture in pictures.values() if picture.rows], rejects
