"""CSVs that people open in a spreadsheet: no cell of a stranger's text is a formula there.

A spreadsheet runs a cell that begins with = + - @ as a formula, which can fetch a URL with what is in other
cells. Such a text gets an apostrophe in front; numbers are left. read_cell() is the exact opposite, for CSVs
that our commands read again. JSON files and the CSVs of `eval export`, which programs read, hold texts as
they are. In lists that no command reads again, control characters are escaped as on a terminal, where people
show them, too.
"""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_prep.atomic import atomic_file, check_begins
from data_prep.terminal import safe

# Full-width signs count in spreadsheets of some languages.
FORMULA = re.compile("\\s*[=+\\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
NUMBER = re.compile(r"[+-]?[0-9.]+([eE][+-]?[0-9]+)?")


def cell(value: object) -> object:
    """A value as it is written: a text that would be a formula gets an apostrophe, and so does one that
    begins with apostrophes and would be one without them.
    """
    if not isinstance(value, str) or NUMBER.fullmatch(value):
        return value
    return f"'{value}" if FORMULA.match(value.lstrip("'")) else value


def read_cell(text: str) -> str:
    """The text that cell() has been given."""
    return text[1:] if text.startswith("'") and FORMULA.match(text.lstrip("'")) else text


def shown_cell(value: object) -> object:
    """A value as it is written where no command reads it again; see terminal.safe()."""
    return cell(safe(value) if isinstance(value, str) else value)


def check_csv(option: str, path: Path | None, header: Sequence[str]) -> None:
    """Refuse to replace a file that is no CSV with this header.

    Args:
        option: that was passed, for the message: "--csv".
        path: None where it was not passed.

    Raises:
        UserError: a file is there, and is another table.
    """
    if path and path.is_file():
        check_begins(option, path, ",".join(header).encode())


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence], is_input: bool = False) -> None:
    """Write a CSV for people, atomically, in a new folder if need be.

    Args:
        is_input: a command reads it again, by read_cell(), so that its texts are exact.
    """
    written = cell if is_input else shown_cell
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(map(written, header))
        writer.writerows(map(written, row) for row in rows)
