"""Encodings of text, and the .txt of an image: each line is a caption, in folders and in tars alike."""

import codecs
import re
from collections.abc import Iterator

from data_prep.errors import UserError
from data_prep.inputs.cells import shortened
from data_prep.inputs.names import Problem
from data_prep.inputs.rows import Input, Row, check_text

MAX_TXT_CAPTIONS = 20  # lines of a .txt that are taken for captions without asking
# str.splitlines() also breaks at U+0085, which is what latin-1 makes of the ellipsis of Windows' code pages.
LINE_BREAK = re.compile(r"\r\n|\r|\n")


def rows_of_txt(table: Input, row: Row, name: str, data: bytes) -> Iterator[Row]:
    """The rows of an image with a .txt: each line that is not blank is a caption.

    Args:
        name: of the .txt, for messages.

    Raises:
        UserError: many lines, and no decision how many of them are captions.
    """
    try:
        captions = txt_captions(data, table.encoding)
    except UnicodeError as error:
        yield row._replace(problem=Problem("bad encoding", f"{name}: {error}; see --encoding"))
        return
    if len(captions) > MAX_TXT_CAPTIONS and not table.captions_per_txt:
        raise UserError(
            f"{name}: {len(captions)} lines (the second: {shortened(captions[1])!r}), and each line of a .txt"
            " is a caption of the image beside it; pass --captions-per-txt 1 for the first line of each .txt,"
            f" or --captions-per-txt {len(captions)} for all of these"
        )
    for caption in captions[: table.captions_per_txt or None] or [""]:
        yield check_text(row._replace(caption=caption))


def txt_captions(data: bytes, encoding: str = "utf-8-sig") -> list[str]:
    """The lines of a .txt that are not blank.

    Raises:
        UnicodeError: it is not in this encoding. Bad bytes of UTF-8 become lone surrogates, see check_text().
    """
    text = data.decode(*codec_of(encoding))
    return [line for line in LINE_BREAK.split(text) if line.strip()]


def codec_of(encoding: str) -> tuple[str, str]:
    """The encoding to decode with, and what it does with bad bytes.

    UTF-8 may begin with a byte order mark. It resynchronizes after a bad byte, so only that row is rejected;
    in other encodings one bad byte can shift all that follows.
    """
    is_utf8 = codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")
    return ("utf-8-sig", "surrogateescape") if is_utf8 else (encoding, "strict")


def check_encoding(source: str, encoding: str) -> None:
    """Refuse an encoding that does not exist.

    Raises:
        UserError: there is no such encoding of text.
    """
    try:
        "".encode(encoding)
    except LookupError as error:
        raise UserError(
            f"{source}: cannot be read ({error}); --encoding must be one that Python knows: utf-8, latin-1,"
            " cp1252, utf-16"
        ) from None
