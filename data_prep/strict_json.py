"""JSON that any reader reads: no NaN and no Infinity, which Python's json writes and reads as names.

In columns of data, an infinite or nested value becomes the text "NaN", "Infinity" or "-Infinity", and is
counted; in metrics, null.
"""

import json
import math
import re
from collections.abc import Callable

TEXT = re.compile('(?<!\\\\)"(?:NaN|-?Infinity)"')  # a value that strict_json has made


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
