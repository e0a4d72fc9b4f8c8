"""JSON that any reader reads: no NaN and no Infinity, which Python's json writes and reads as names. And JSON
of other people's files, which is read within bounds and checked by its shape.

In columns of data, an infinite or nested value becomes the text "NaN", "Infinity" or "-Infinity", and is
counted; in metrics, null.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from data_prep.errors import UserError

TEXT = re.compile('(?<!\\\\)"(?:NaN|-?Infinity)"')  # a value that strict_json has made
MAX_BYTES = 1 << 28  # of a file; in memory it takes about ten times as much
MAX_INTEGER = (1 << 63) - 1  # numpy, Parquet and SQLite have no larger ones, and few programs do
KINDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}
KINDS |= {bool: "true or false", type(None): "null"}
Shape = type | tuple | dict | list | Callable[[object], bool]


def as_text(value: float) -> str:
    """NaN, Infinity or -Infinity."""
    return json.dumps(value)


def as_null(_: float) -> None:
    """For numbers that were measured."""


def strict_json(value: object, nonfinite: Callable[[float], object] = as_text, **options) -> str:
    """`value` as JSON, numbers that are not finite replaced by what `nonfinite` returns.

    Args:
        options: of json.dumps.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value, nonfinite), allow_nan=False, **options)


def _finite(value: object, nonfinite: Callable[[float], object]) -> object:
    if isinstance(value, dict):
        return {name: _finite(inner, nonfinite) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner, nonfinite) for inner in value]
    return nonfinite(value) if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(text: str | bytes, **options) -> object:
    """The value of JSON of any origin, for which json.loads has two kinds of errors.

    Args:
        options: of json.loads.

    Raises:
        ValueError: it is none, or nested too deeply, or has a whole number of thousands of digits.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def load_json(path: Path, shape: Shape = object, max_bytes: int = MAX_BYTES, is_ours: bool = True):
    """The value of a JSON file that a program has written.

    Args:
        shape: that it must have, see problem_of().
        is_ours: False for files of other libraries, which may have any number, and any text that Python can
            hold: transformers writes 10**30 for no limit.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged: too large, no JSON in UTF-8, of another shape, or with a number or a text
            that other files cannot hold (NaN, an integer of more than 64 bits, half of a surrogate pair).
    """
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"more than {max_bytes:,} bytes")
    return read_bytes(data, shape, is_ours)


def read_bytes(data: bytes, shape: Shape = object, is_ours: bool = True):
    """The value of the bytes of a JSON file; arguments and errors are those of load_json()."""
    value = parse_json(data.decode(), **STRICT if is_ours else {})
    if is_ours and b"\\u" in data:
        json.dumps(value, ensure_ascii=False).encode()  # a UnicodeEncodeError is a ValueError
    if problem := problem_of(value, shape):
        raise ValueError(problem)
    return value


def read_json(path: Path, shape: Shape, fix: str, max_bytes: int = MAX_BYTES, is_ours: bool = True):
    """As load_json(), with a sentence for what it raises.

    Args:
        fix: what to do, for the message.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    try:
        return load_json(path, shape, max_bytes, is_ours)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {fix}") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); {fix}") from None


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _integer(text: str) -> int:
    if len(text) > 20 or not -MAX_INTEGER <= (value := int(text)) <= MAX_INTEGER:
        raise ValueError(f"{text:.24} has more than 64 bits")
    return value


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text:.24} is too large a number")
    return value


# Options of parse_json for numbers that any reader reads.
STRICT = {"parse_constant": _no_number, "parse_int": _integer, "parse_float": _float}


def problem_of(value: object, shape: Shape, place: str = "") -> str:
    """Where a value is not of a shape: "splits.train.samples is a text, not a whole number"; "" if it is.

    Args:
        shape: A type, of which float includes int, and int excludes bool; a tuple of shapes, one of which it
            must have; {"key": shape}, an object with these keys, a key "key?" where it may be missing, and
            any others; {str: shape}, an object of such values; [shape], a list of such items; or a function
            that says whether a value is valid.
    """
    if isinstance(shape, tuple):
        problems = [problem_of(value, each, place) for each in shape]
        return "" if "" in problems else problems[0]
    if isinstance(shape, list):
        return _problem(value, list, place) or next(
            filter(None, (problem_of(item, shape[0], f"{place}[{n}]") for n, item in enumerate(value))), ""
        )
    if isinstance(shape, dict):
        return _problem(value, dict, place) or next(filter(None, _problems_of_keys(value, shape, place)), "")
    if isinstance(shape, type):
        return _problem(value, shape, place)
    return "" if shape(value) else f"{place or 'it'} is not valid ({_shown(value)})"


def _problems_of_keys(value: dict, shape: dict, place: str):
    dot = f"{place}." if place else ""
    if str in shape:
        yield from (problem_of(inner, shape[str], f"{dot}{name}"[:200]) for name, inner in value.items())
        return
    for key, inner in shape.items():
        name = key.removesuffix("?")
        if name in value:
            yield problem_of(value[name], inner, dot + name)
        elif name == key:
            yield f"{dot}{name} is missing"


def _problem(value: object, kind: type, place: str) -> str:
    is_of_kind = isinstance(value, (int, float) if kind is float else kind)
    if is_of_kind and not (isinstance(value, bool) and kind in (int, float)):
        return ""
    found = KINDS.get(type(value), type(value).__name__)
    return f"{place or 'it'} is {found}, not {KINDS.get(kind, kind.__name__)}"


def _shown(value: object) -> str:
    try:
        return f"{value!r:.40}"
    except (ValueError, RecursionError):  # a number of thousands of digits; nested lists
        return type(value).__name__
