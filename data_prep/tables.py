"""One way to print a table: Markdown with padded columns, readable in a terminal and in a document.

A result of several tables and sentences is a list of parts: text_of() joins them for a terminal, the macro
`parts` of templates/macros.html shows them on a page.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

PHONE_CHARACTERS, MAX_UNBROKEN = 56, 16  # of a table on a window of 390 px; longer words break there


class Table(NamedTuple):
    """A table; as text it is Markdown.

    Attributes:
        columns: titles; the first one names the table.
        rows: cells as text, as many in each row as there are titles.
        left: number of columns that are aligned left.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def __str__(self) -> str:
        return markdown_table(*self)

    @property
    def is_wide(self) -> bool:
        """Whether it does not fit a phone, although cells break before intervals, and long ones at spaces."""
        _, *columns = zip(self.columns, *self.rows, strict=True)
        widths = [max(map(_unbroken, column)) for column in columns]
        return MAX_UNBROKEN + sum(2 + width for width in widths) > PHONE_CHARACTERS


def _unbroken(cell: str) -> int:
    """Characters of the longest part of a cell that stays on one line."""
    parts = [
        word
        for part in cell.partition(" [")[::2]
        for word in ([part] if len(part) <= MAX_UNBROKEN else part.split())
    ]
    return min(max(map(len, parts)), MAX_UNBROKEN)


def text_of(parts: Iterable[str | Table]) -> str:
    """Tables and sentences, a blank line between them."""
    return "\n\n".join(text for part in parts if (text := str(part)))


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """The rows below their titles; the first `left` columns are aligned left, the others right.

    Args:
        columns: titles.
        rows: cells as text, as many in each row as there are titles; a "|" is escaped.

    Raises:
        ValueError: a row has more or fewer cells than there are titles.
    """
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (columns, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width if at < left else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
    padded = [
        [
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


def counted(number: int, noun: str) -> str:
    """1 image, 2 images, 1,000 images."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def are(number: int) -> str:
    """The verb after counted()."""
    return "is" if number == 1 else "are"


def percent(value: float | None, digits: int = 1) -> str:
    """0.123 -> "12.3"; nothing for None. The unit belongs into the column's title."""
    return "" if value is None else f"{100 * value:.{digits}f}"
