"""One way to print a table: Markdown with padded columns, readable in a terminal and in a document."""

from collections.abc import Iterable, Sequence


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


def percent(value: float | None, digits: int = 1) -> str:
    """0.123 -> "12.3"; nothing for None. The unit belongs into the column's title."""
    return "" if value is None else f"{100 * value:.{digits}f}"
