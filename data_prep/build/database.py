"""SQLite tables as NamedTuples: the fields of a record are the columns that are read or written."""

import sqlite3
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

Record = TypeVar("Record", bound=NamedTuple)


class Count(NamedTuple):
    n: int


def insert(db: sqlite3.Connection, table: str, records: Iterable[NamedTuple]) -> None:
    """Insert records of one type, whose fields are columns of the table."""
    records = iter(records)
    first = next(records, None)
    if first is None:
        return
    names = first._fields
    query = f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join(f':{name}' for name in names)})"
    db.execute(query, first._asdict())
    db.executemany(query, (record._asdict() for record in records))


def select(db: sqlite3.Connection, record: type[Record], rest: str, **parameters) -> Iterator[Record]:
    """Read the columns that are the fields of `record`.

    Args:
        rest: of the query: "FROM table WHERE key = :key".
        parameters: by name.
    """
    cursor = db.cursor().execute(f"SELECT {', '.join(record._fields)} {rest}", parameters)
    return map(record._make, cursor)


def select_one(db: sqlite3.Connection, record: type[Record], rest: str, **parameters) -> Record | None:
    """The first row, or None."""
    return next(select(db, record, rest, **parameters), None)
