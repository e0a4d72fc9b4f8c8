"""The one place that prints: foreign text reaches a terminal without effect, and a secret not at all.

A caption, a file name or a value of a recipe can hold control characters with which a terminal moves its
cursor, renames its window or fills its clipboard. They are printed as Python writes them: \\x1b.
"""

import re
import sys
from typing import TextIO

from data_prep.masked import masked

# All control characters but tab and line break; and surrogates, which no encoding can write.
_CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"
CONTROL = re.compile(f"[{_CONTROLS}]")
# Those, and what reorders or breaks lines; pages keep that, as it is text of Arabic and Hebrew.
UNSAFE = re.compile(f"[{_CONTROLS}\u2028-\u202e\u2066-\u2069]")


def safe(text: str, unsafe: re.Pattern = UNSAFE) -> str:
    """The text, with characters escaped that could do more on a terminal than be shown."""
    return unsafe.sub(lambda match: ascii(match[0])[1:-1], text)


def say(*values: object, sep: str = " ", file: TextIO | None = None, flush: bool = False) -> None:
    """print(), of safe and masked text; what the stream's encoding lacks is escaped."""
    stream = file or sys.stdout
    text, encoding = safe(masked(sep.join(map(str, values)))), getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=flush)
