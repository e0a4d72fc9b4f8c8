"""One way to print a table: Markdown whose columns are padded, so that it reads in a terminal as in a document."""

from collections.abc import Iterable, Sequence


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The rows below their titles; the first column is aligned left, the others right.

    Args:
        columns: titles.
        rows: cells as text, as many in each row as there are titles; a "|" is escaped.

    Raises:
        ValueError: a row has more or fewer cells than there are titles.
    """
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (columns, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


def percent(value: float | None, digits: int = 1) -> str:
    """0.123 -> "12.3"; nothing for None. The unit belongs into the column's title."""
    return "" if value is None else f"{100 * value:.{digits}f}"
